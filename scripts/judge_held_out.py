"""Compare settings without using the test images: python scripts/judge_held_out.py exp/dpdm/<run> exp/dpdm/<run>

Judges runs of eval.mode=val by the private images that they held out, in the place of the test images. That reads these
images without noise and is NOT private: it is for choosing presets on data that are public. privacy.json and the
privacy card of each run list it; its results stay as they are. Give the runs eval.metrics=[] as well: run.py then looks
at no test image either, and this judges by the metrics of the preset.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.configuration import evaluation_config
from pipeline.folder import working_in
from pipeline.record import values_of, write_account
from pipeline.revealed import COPIES, compared_by, without_failed
from utils.arguments import Parser
from utils.artefacts import PRIVACY, RESULTS, SAMPLES
from utils.config import Config
from utils.errors import UserError
from utils.files import read_json
from utils.log import to_terminal
from utils.program import program, run_process

REASON = "scripts/judge_held_out.py: accuracies on the private validation images without noise"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=" ".join(__doc__.splitlines()[2:]))
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run of eval.mode=val"
    )
    parser.add_argument("--data_root", type=Path, metavar="DIR", help="default: $DPIB_DATA_ROOT or dataset")
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    to_terminal()
    place = [] if arguments.data_root is None else ["--data_root", str(arguments.data_root)]
    configs = [evaluation_config(["--exp_path", str(run), *place]) for run in arguments.runs]
    for config in configs:  # all of them before any is judged
        require_held_out(config)
    for config in configs:
        with working_in(config.exp_path):
            report = judge(config)
        print(f"\n{config.exp_path}, on images that it held out: NOT private\n{report.table()}", flush=True)
    return 0


def require_held_out(config: Config) -> None:
    folder = config.exp_path
    if not (folder / RESULTS).exists():
        raise UserError(f"{folder}: not a finished run (it has no {RESULTS})")
    mode = values_of(folder)["eval.mode"]
    if mode != "val":
        raise UserError(
            f"{folder}: a run of eval.mode={mode}, which held no images out; needed is eval.mode=val"
        )
    if not config.eval.metrics:
        raise UserError(
            f"{folder}: a run without metrics; run it with eval=quick or another file of configs/eval"
        )


def judge(config: Config):
    """The report on the run's samples, with the run's held-out images instead of the test images."""
    from data.samples_file import read_samples
    from data.sensitive import load_sensitive, spec_of
    from evaluation.evaluator import Evaluator, EvaluatorSettings
    from evaluation.report import Report
    from pipeline.evaluation import RealImages, disclose, reveal
    from pipeline.existing_samples import require_same_split
    from utils.device import prepare_device

    folder = config.exp_path
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, gallery=None, ceiling="none"))
    spec, _ = spec_of(config.sensitive_data, "val", config.data_root)
    require_same_split(
        folder, dataclasses.replace(config, eval=dataclasses.replace(config.eval, mode="val")), spec
    )
    sensitive = load_sensitive(config.sensitive_data, "val", config.data_root)
    shown = disclose(sensitive.validation).reveal(REASON)
    train, _, reasons = reveal(config, RealImages(disclose(sensitive.train), shown, None))
    training = read_json(folder / PRIVACY)
    booked = [*training["revealed"], *reasons, REASON]
    write_account(folder, training, revealed=booked)
    device = prepare_device(config.setup)
    evaluator = Evaluator(EvaluatorSettings(config.eval, spec, config.weights_root, device, config.seed))
    report = evaluator.evaluate(read_samples(folder / SAMPLES), train=train, test=shown, select=None)
    own = read_json(folder / RESULTS)
    known = Report(own["metrics"] | report.metrics, own["metric_info"] | report.metric_info)
    others = (
        [COPIES] if COPIES in compared_by(training["revealed"]) else []
    )  # nothing searches for copies here
    write_account(folder, training, revealed=without_failed(booked, reasons, known, others))
    return report


if __name__ == "__main__":
    run_process(main)
