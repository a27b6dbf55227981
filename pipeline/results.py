"""results.json and privacy.json: what plots and tables read."""

from datetime import datetime
from pathlib import Path

from pipeline.environment import git_commit, settings_of, versions
from utils.artefacts import PRIVACY, RESULTS
from utils.files import read_json, write_json

SCHEMA = 1
# What a later evaluation leaves alone.
OF_TRAINING = (
    "epsilon", "seed", "preset", "preset_tier", "borrowed", "precision", "eval_mode", "overrides", "git", "versions",
)  # fmt: skip


def write_privacy(folder: Path, training: dict, selection: dict | None = None) -> dict:
    """Write and return privacy.json: the training ledger's report, and one entry in `selection` per evaluation that
    asked the private validation images, known by its id. Earlier entries stay: judging a run again spends again. So
    does what was `revealed` before, by an evaluation that was interrupted, too. results.json, if there is one, tells
    their sum."""
    path = folder / PRIVACY
    before = read_json(path) if path.exists() else {"selection": [], "revealed": []}
    others = [entry for entry in before["selection"] if selection is None or entry["id"] != selection["id"]]
    privacy = {
        **training,
        "run": f"{folder.resolve().parent.name}/{folder.name}",
        "selection": others + ([] if selection is None else [selection]),
        "revealed": list(dict.fromkeys([*before["revealed"], *training["revealed"]])),
    }
    write_json(path, privacy)
    if (folder / RESULTS).exists():
        write_json(folder / RESULTS, read_json(folder / RESULTS) | _of_selection(privacy))
    return privacy


def results_of(
    folder: Path, config, privacy: dict, report, evaluation: dict, timing: dict[str, float], facts: dict
) -> dict:
    """The content of results.json, the last file that is written. `evaluation` are its settings, `timing` is in seconds
    per stage, `facts` is what it says of the samples.

    Judging a finished run again gives what `report` then holds; what describes its training stays as it was.
    """
    path = folder / RESULTS
    before = read_json(path) if path.exists() else {}
    evaluated = report.to_dict()
    content = {
        "schema": SCHEMA,
        "method": config.method,
        "data": config.data_name,
        "images": None if config.images is None else str(config.images),  # judged without a run
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
    """What results.json says of the noisy choices of epochs."""
    return {
        "selection_epsilon": sum(selection["spent"] for selection in privacy["selection"]),
        "noise_seeded": any(part["noise_seeded"] for part in (privacy, *privacy["selection"])),
    }
