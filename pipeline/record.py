"""What a run records: configuration, environment, privacy.json with its card, results.json. The one writer of these
files."""

import importlib.metadata
import itertools
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from evaluation.report import Report
from opacus_ext.card import privacy_card
from pipeline.divergence import require_not_diverged
from pipeline.revealed import merged
from utils.artefacts import CARD, CONFIG, ENVIRONMENT, PRIVACY, PROVENANCE, RESULTS
from utils.config import FLAG_KEYS, Config, format_config
from utils.config_files import flatten, read_yaml
from utils.errors import UserError
from utils.files import read_json, write_json, write_text
from utils.text import listed

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "dp-accounting",
    "opacus",
    "torch-fidelity",
)

FREE_SECTIONS = ("setup.", "eval.")  # may differ in a resumed run, as may the method's changeable settings
PATH_KEYS = ("ckpt", "path")  # ends of the keys whose values are paths

SCHEMA = 1
# Entries that a later evaluation does not change.
OF_TRAINING = (
    "epsilon", "seed", "preset", "preset_tier", "borrowed", "precision", "eval_mode", "overrides", "git", "versions",
)  # fmt: skip


def write_start(folder: Path, config: Config, data_identity: str) -> None:
    """Write config.yaml, provenance.txt and environment.json into a run's folder. `data_identity` is the random name of
    the prepared private images (DataSpec.identity).

    They contain no hash of the private data: a hash reveals without noise whether a guess of the whole set is right,
    and so whether one record is in it.
    """
    from omegaconf import OmegaConf

    write_text(folder / PROVENANCE, format_config(config) + "\n")
    write_json(folder / ENVIRONMENT, {**describe(config), "data_identity": data_identity})
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config.snapshot)))


def require_same_data(folder: Path, data_identity: str) -> None:
    """Raise UserError if the private images were prepared again since the run in `folder` began: images that it was
    trained on might be held out now, and queried as if they were others."""
    before = read_json(folder / ENVIRONMENT)["data_identity"]
    if before != data_identity:
        raise UserError(
            f"--resume_exp: the private images were prepared again since {folder.name} began; start a new run"
        )


def require_same_config(folder: Path, config: Config, first: Sequence[str] = ()) -> None:
    """Raise UserError with the settings in which `config` differs from the run in `folder`, beginning with the keys
    `first`.

    Keys of FREE_SECTIONS and of config.changeable may differ. eval.mode may not, because it splits the data.
    """
    before, now = values_of(folder), flatten(config.snapshot)
    bound = {key for key in {*before, *now} if not key.startswith(FREE_SECTIONS) or key == "eval.mode"}
    different = [key for key in bound.difference(config.changeable) if before.get(key) != now.get(key)]
    different.sort(key=lambda key: (key not in first, key not in FLAG_KEYS.values(), key))
    if different:
        changes = [f"{key}={before.get(key)} (now {now.get(key)})" for key in different]
        raise UserError(
            f"--resume_exp: {folder.name} was started with {listed(changes)}; keep that, or start a new run. "
            f"{free_text(config.changeable)}"
        )


def free_text(changeable: Sequence[str] = ()) -> str:
    """The settings that may differ in a resumed run."""
    return f"A resumed run may change {', '.join(['setup.*', 'eval.*', *changeable])}, but not eval.mode"


def values_of(folder: Path) -> dict[str, object]:
    """Dotted key -> value, as the run in `folder` was started; UserError if there is no run."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run (it has no {CONFIG})")
    return flatten(read_yaml(path))


def command_of(folder: Path) -> list[str]:
    """The command line with which the run in `folder` was started, without the program's name; UserError if it is
    damaged."""
    path = folder / ENVIRONMENT
    record = read_json(path)
    command = record.get("command") if isinstance(record, dict) else None
    if isinstance(command, list):  # read_json turns the arguments inf and nan into numbers
        command = [str(word) if isinstance(word, float) else word for word in command]
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise UserError(f"{path}: damaged (no command is in it); restore it or move it away")
    return command[1:]


def settings_of(folder: Path, config: Config) -> dict:
    """The settings that distinguish a run from another of the same name: those that the run in `folder` was started
    with, or those of `config` for images without a run. `overrides` are the key=value arguments, in their order."""
    values, words = flatten(config.snapshot) | {"eval.mode": config.eval.mode}, config.words
    if (folder / ENVIRONMENT).exists():
        values = values_of(folder)
        try:
            words = command_of(folder)
        except UserError:  # damaged: no reason to lose the results of a long evaluation
            words = None
    overrides = None if words is None else _overrides(words)
    return {
        "precision": values.get("setup.precision"),
        "eval_mode": values.get("eval.mode"),
        "overrides": overrides,
    }


def training_overrides(folder: Path, config: Config) -> list[str] | None:
    """The settings given for the training of the run in `folder`, as key=value, without those about secrets, the
    machine or the evaluation; None if the run's record of them is damaged.

    Paths are reduced to their last part: the card is made to be shared, and folders may have the names of people or
    studies.
    """
    hidden = ("setup.", "eval.", "sensitive_data.path", "privacy.noise_seed")
    words = settings_of(folder, config)["overrides"]
    return (
        None if words is None else [_without_folders(word) for word in words if not word.startswith(hidden)]
    )


def _without_folders(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if key.endswith(PATH_KEYS) else word


def _overrides(words: Sequence[str]) -> list[str]:
    """The key=value arguments that are neither a flag nor the value of one."""
    pairs = itertools.pairwise(["", *words])
    return [
        word
        for before, word in pairs
        if "=" in word and not word.startswith("-") and not _takes_value(before)
    ]


def _takes_value(word: str) -> bool:
    return word.startswith("-") and "=" not in word


def describe(config: Config) -> dict:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": ["run.py", *config.words],
        "git": git_commit(),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus},
        "seed": config.seed,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return commit.stdout.strip() or None


def write_privacy(
    folder: Path, training: dict, selection: dict | None = None, revealed: list[str] | None = None
) -> dict:
    """Write and return privacy.json: the training ledger's report, and one entry in `selection` per evaluation that
    queried the private validation images, identified by its id. Earlier entries stay, because evaluating a run again
    spends budget again. Earlier `revealed` entries also stay, including those of an interrupted evaluation, unless
    `revealed` replaces them. results.json, if there is one, gets the sum."""
    path = folder / PRIVACY
    before = read_json(path) if path.exists() else {"selection": [], "revealed": []}
    if revealed is None:
        revealed = [*before["revealed"], *training["revealed"]]
    others = [entry for entry in before["selection"] if selection is None or entry["id"] != selection["id"]]
    privacy = {
        **training,
        "run": f"{folder.resolve().parent.name}/{folder.name}",
        "selection": others + ([] if selection is None else [selection]),
        "revealed": merged(revealed),
    }
    write_json(folder / PRIVACY, privacy)
    if (folder / RESULTS).exists():
        write_results(folder, read_json(folder / RESULTS) | _of_selection(privacy))
    return privacy


def write_results(folder: Path, results: dict) -> None:
    """Write results.json, the last file of an evaluation: its presence means that everything else is there."""
    write_json(folder / RESULTS, results)


def results_of(
    folder: Path,
    config: Config,
    privacy: dict,
    report: Report,
    evaluation: dict,
    timing: dict[str, float],
    facts: dict,
) -> dict:
    """The content of results.json. `evaluation` are its settings, `timing` is in seconds
    per stage, `facts` are its entries about the samples.

    Evaluating a finished run again replaces the results by those in `report`; entries about its training are kept.
    """
    path = folder / RESULTS
    before = read_json(path) if path.exists() else {}
    evaluated = report.to_dict()
    content = {
        "schema": SCHEMA,
        "method": config.method,
        "data": config.data_name,
        "images": None if config.images is None else str(config.images),  # evaluated without a run
        "epsilon": config.epsilon,
        "delta": privacy["budget"]["delta"],
        "private": privacy["private"],
        "num_records": privacy.get("num_records"),  # None: images of no run
        "spent_epsilon": privacy["spent"],
        **_of_selection(privacy),
        "seed": config.seed,
        "preset": config.preset,
        "preset_tier": config.preset_tier,
        "borrowed": config.borrowed,
        **settings_of(folder, config),
        **facts,
        **{key: privacy[key] for key in ("public_data", "public_copies") if key in privacy},
        "warnings": report.warnings,
        "metrics": evaluated["metrics"],
        "metric_info": evaluated["metric_info"],
        "missing": evaluated["missing"],
        "evaluation": evaluation,
        "judged": f"{datetime.now():%Y-%m-%d %H:%M}",
        "judged_git": git_commit(),
        "timing": {**before.get("timing", {}), **{stage: round(taken, 2) for stage, taken in timing.items()}},
        "git": git_commit(),
        "versions": versions(),
    }
    return {**content, **{key: before[key] for key in OF_TRAINING if key in before}}


def _of_selection(privacy: dict) -> dict:
    """The entries of results.json about the noisy choices of epochs."""
    return {
        "selection_epsilon": sum(selection["spent"] for selection in privacy["selection"]),
        "noise_seeded": any(part["noise_seeded"] for part in (privacy, *privacy["selection"])),
    }


def write_account(
    folder: Path, training: dict, selection: dict | None = None, revealed: list[str] | None = None
) -> dict:
    """Write privacy.json (see `write_privacy`) and the card that explains it; returns the content of privacy.json."""
    privacy = write_privacy(folder, training, selection, revealed)
    write_text(folder / CARD, privacy_card(privacy))
    return privacy


def find_resumable(config: Config, data_identity: str) -> Path:
    """The folder of the run of --resume_exp. Raises UserError unless it was started with the same data, and did not
    diverge. run_config has compared the settings."""
    folder = Path(config.resume)
    require_same_data(folder, data_identity)
    require_not_diverged(folder)
    return folder
