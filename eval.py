"""Judge the samples of a finished run again.

    python eval.py --method PrivImage --data_name digits_8 --epsilon 10 --exp_path exp/privimage/<run>

In eval.mode=val the choice of classifiers asks the private validation images once more; privacy.json adds it up.
"""

import sys
from pathlib import Path

from models import METHODS
from run import REVEALED, RealData, judge, validation_data
from utils.config import Config, format_config, load_config
from utils.environment import values_of
from utils.errors import UserError
from utils.log import also_to, to_terminal
from utils.results import PRIVACY
from utils.run_dir import RESULTS, read_json
from utils.runtime import Runtime, log


def main(argv: list[str]) -> int:
    to_terminal()
    try:
        config = load_config(argv, METHODS, program="eval")
        if config.print_config:
            print(format_config(config))
            return 0
        return evaluate(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def evaluate(config: Config) -> int:
    """Read the run's samples and privacy report, and judge; returns the exit code."""
    from data.samples_file import read_samples
    from data.sensitive import load_sensitive, spec_of
    from opacus_ext.ledger import Budget, Ledger
    from opacus_ext.noise import NoiseSource
    from opacus_ext.private_data import PrivateData
    from utils.device import prepare_device

    folder = config.exp_path
    if folder is None:
        raise UserError("--exp_path: missing; give the folder of the run to judge")
    report = folder / PRIVACY
    if not report.exists():
        raise UserError(f"--exp_path: {folder} is not the folder of a trained run (it has no {PRIVACY})")
    if not (folder / RESULTS).exists():
        raise UserError(
            f"--exp_path: {folder} is not finished; continue it with run.py --resume_exp {folder.name}"
        )
    require_run_of(folder, config)
    samples = read_samples(folder / "gen" / "gen.npz")
    spec, lines = spec_of(config.sensitive_data, config.eval.mode, config.data_root)
    for line in (*config.notes, *lines):
        log.info(line)
    if config.dry_run:
        log.info(f"{len(samples):,} samples of {folder} would be judged by {', '.join(config.eval.metrics)}")
        return 0
    runtime = Runtime(
        prepare_device(config.setup), config.seed, config.setup.precision, folder, config.data_root / ".cache"
    )
    also_to(folder / "stdout.txt")
    sensitive = load_sensitive(config.sensitive_data, config.eval.mode, config.data_root)
    # Nothing is asked of the training images here, so their ledger has an empty plan.
    ledger = Ledger(Budget(config.epsilon, config.privacy.delta or 0.0))
    ledger.adopt([])
    train = PrivateData(sensitive.train, spec, ledger)
    noise = NoiseSource(config.privacy.noise_seed)
    real = RealData(
        train.reveal(REVEALED),
        sensitive.test,
        validation_data(config, spec, sensitive.validation, noise, runtime.device),
    )
    return judge(config, spec, runtime, folder, samples, real, read_json(report), timing={})


def require_run_of(folder: Path, config: Config) -> None:
    """Raise UserError unless the flags say what the run is, and it kept the images aside that eval.mode=val asks."""
    run = values_of(folder)
    for flag, key, given in (
        ("method", "method", config.method),
        ("data_name", "data_name", config.data_name),
        ("epsilon", "privacy.epsilon", config.epsilon),
    ):
        if run.get(key) != given:
            raise UserError(
                f"--{flag}: {given}, but {folder} is a run with {run.get(key)}; give --{flag} {run.get(key)}"
            )
    if config.eval.mode == "val" and run.get("eval.mode") != "val":
        raise UserError(
            f"eval.mode: val, but {folder} was trained with eval.mode={run.get('eval.mode')} on the validation images "
            f"too; use eval.mode=syn or sen"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
