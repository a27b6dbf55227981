"""Accuracy of the configured classifiers trained on the real images: the upper bound of a private run.

    python scripts/test_classifier.py --method PDP-Diffusion --data_name mnist_28 --epsilon 10.0 -ed no-dp-mnist_28

Takes the flags and settings of run.py, so that the classifiers are those of the runs to compare with; --method and
--epsilon change nothing else. The result is NOT private: it is computed from the training images without noise.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import METHODS
from pipeline.folder import discarded_on_failure, new_folder, private_work
from utils.config import Config, format_config, load_config
from utils.files import require_writable
from utils.log import also_to, to_terminal
from utils.program import program, run_process
from utils.runtime import log

GROUP = "real"  # folder below exp_root, and the method's name in results.json


@program
def main(argv: list[str]) -> int:
    to_terminal()
    config = non_private(load_config(argv, METHODS, "test_classifier"))
    if config.print_config:
        print(format_config(config))
        return 0
    return measure(config)


def non_private(config: Config) -> Config:
    """The configuration of the upper bound: accuracy alone, chosen without private validation images."""
    judged = dataclasses.replace(config.eval, mode="syn", metrics=["accuracy"], ceiling="none")
    return dataclasses.replace(
        config, method=GROUP, epsilon=math.inf, preset_tier=None, borrowed=False, eval=judged
    )


def measure(config: Config) -> int:
    """Train on the real training images, test on the real test images, write results.json; the exit code."""
    from data.sensitive import load_sensitive, private_cache, spec_of
    from evaluation.evaluator import Evaluator, EvaluatorSettings
    from evaluation.report import evaluation_settings
    from evaluation.unfinished import unfinished
    from pipeline.evaluation import INCOMPLETE, kept_if_stopped, no_account
    from pipeline.evaluation_time import classifier_time_line
    from pipeline.record import results_of, write_results
    from utils.device import prepare_device

    spec, lines = spec_of(config.sensitive_data, config.eval.mode, config.data_root)
    device = prepare_device(config.setup)
    cache = private_cache(config.sensitive_data, config.data_root)
    evaluator = Evaluator(
        EvaluatorSettings(config.eval, spec, config.weights_root, device, config.seed, cache)
    )
    for line in (*config.notes, *lines):
        log.info(line)
    names = ", ".join(config.eval.classifiers)
    log.info(
        f"{names} on {spec.num_train:,} real training images of {spec.name}, recipe {config.eval.recipe}"
    )
    if config.dry_run:
        return 0
    sensitive = load_sensitive(config.sensitive_data, config.eval.mode, config.data_root)
    folder = new_folder(config.exp_root, GROUP, "-".join(filter(None, (spec.name, config.description))))
    with discarded_on_failure(folder, is_new=True), private_work(folder):
        require_writable(folder)
        also_to(folder / "stdout.txt")
        log.info(classifier_time_line(config, spec, spec.num_train, len(sensitive.test), device))
        start = time.perf_counter()
        kept = unfinished(evaluator.settings, sensitive.train, None)
        with kept_if_stopped(kept):
            report = evaluator.evaluate(
                sensitive.train, train=sensitive.train, test=sensitive.test, select=None, kept=kept
            )
        account = no_account(private=False, spent=math.inf)
        timing = {"evaluate": time.perf_counter() - start}
        settings = evaluation_settings(config)
        write_results(folder, results_of(folder, config, account, report, settings, timing, {}))
        kept.discard()
    log.info(f"\n{report.table()}\n\nNOT private: the classifiers were trained on the private images")
    log.info(f"run folder: {folder}")
    return INCOMPLETE if report.missing else 0


if __name__ == "__main__":
    run_process(main)
