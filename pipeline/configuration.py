"""From a command line to the configuration of a run or of an evaluation; a past run that it names is one more layer."""

import argparse
import shlex
from pathlib import Path

from models import METHODS
from pipeline.folder import find
from pipeline.record import command_of, free_text, require_same_config, values_of
from utils.artefacts import CONFIG, ENVIRONMENT
from utils.command_line import CommandLine, parse_epsilon, read_command_line
from utils.config import FLAG_KEYS, Config, compose_config
from utils.errors import UserError
from utils.places import path_of
from utils.runtime import log
from utils.sections import SHARED_SECTIONS
from utils.typed import leaf_types, unknown_key

# Another value than that of the run would let eval.mode=val query training images, or account for the query wrongly.
FIXED = (
    "sensitive_data.num_train", "sensitive_data.num_val", "sensitive_data.num_public", "sensitive_data.public_seed",
    "privacy.relation",
)  # fmt: skip
# Sections and keys that an evaluation uses.
USED = ("eval", "sensitive_data", "privacy", "setup", "seed", "preset")
SAMPLING_ONLY = ("model.ckpt", "pretrain.n_epochs", "train.n_epochs")


def run_config(command_line: CommandLine) -> Config:
    """The configuration of run.py.

    With --resume_exp, the values of that run are the base, and the command line may change what require_same_config
    allows. Raises UserError.
    """
    if command_line.flags.resume_exp is None:
        return compose_config(command_line, METHODS)
    folder = _past_run(command_line)
    command_line, base = _resumed(command_line, folder)
    config = compose_config(_without_own_checkpoint(command_line), METHODS, base)
    require_same_config(folder, config, first=tuple(command_line.settings))
    log.info(
        f"resuming with the original command: run.py {shlex.join(_merged_arguments(folder, command_line))}"
    )
    return config


def evaluation_config(argv: list[str]) -> Config:
    """The configuration of eval.py; with --exp_path the values of that run are the base.

    The run is evaluated as before, except for eval.mode=val, which spends budget of the validation images again: it
    must be given. Raises UserError.
    """
    command_line = read_command_line(argv, "eval")
    flags, settings, given, _ = command_line
    _check_flags(given)
    for key in settings:
        if "." not in key and key not in USED:
            sections = {name: kind for name, kind in SHARED_SECTIONS.items() if name in USED}
            raise unknown_key(key, leaf_types(sections))
        if key.split(".")[0] not in USED:
            raise UserError(f"{key}={settings[key]}: an evaluation does not use this setting; leave it out")
    if {"images", "list"} & given:
        flags.method = "Noise"  # the smallest one: no method matters here
    if flags.exp_path is None or "images" in given:
        return compose_config(command_line, METHODS)
    folder = path_of(flags.exp_path, "--exp_path")
    base = _evaluation_base(folder, command_line)
    if "plugin" not in given and (folder / ENVIRONMENT).exists():  # the method may be one of theirs
        flags.plugin = read_command_line(command_of(folder), "run").flags.plugin
    return compose_config(command_line, METHODS, base)


def _past_run(command_line: CommandLine) -> Path:
    """The folder of the run of --resume_exp."""
    flags = command_line.flags
    method = flags.method if "method" in command_line.given else None
    return find(path_of(flags.exp_root, "--exp_root"), flags.resume_exp, method)


def _resumed(command_line: CommandLine, folder: Path) -> tuple[CommandLine, dict[str, object]]:
    """The command line on top of the flags of the run in `folder`, and the values of that run."""
    original = read_command_line(command_of(folder), "run")
    base = values_of(folder)
    _require_keys(folder, base)
    _require_same_flags(folder, command_line, base)
    # A file that is chosen now replaces its section; how the data are split stays.
    chosen = {"eval", "setup"} & set(command_line.settings)
    base = {
        key: value for key, value in base.items() if key.split(".")[0] not in chosen or key == "eval.mode"
    }
    now = {name: value for name, value in vars(command_line.flags).items() if name in command_line.given}
    of_this_call = {name: getattr(command_line.flags, name) for name in ("dry_run", "print_config")}
    flags = {**vars(original.flags), **now, **of_this_call, "resume_exp": str(folder.resolve())}
    flags["plugin"] = list(dict.fromkeys([*original.flags.plugin, *command_line.flags.plugin]))
    # method, data_name and epsilon come from the base, whose values the original command line led to.
    given = command_line.given - set(FLAG_KEYS)
    return command_line._replace(flags=argparse.Namespace(**flags), given=given), base


def _require_same_flags(folder: Path, command_line: CommandLine, run: dict[str, object]) -> None:
    """Raise UserError if method, data or budget are given and differ from those of the run in `folder`."""
    for flag, key in FLAG_KEYS.items():
        text = getattr(command_line.flags, flag)
        if flag == "epsilon":
            same = parse_epsilon(text) == run[key]
        else:
            same = text.casefold() == str(run[key]).casefold()
        if flag in command_line.given and not same:
            raise UserError(
                f"--resume_exp: {folder.name} was started with --{flag} {run[key]} (now {text}); leave --{flag} out, "
                f"or start a new run. {free_text()}"
            )


def _merged_arguments(folder: Path, command_line: CommandLine) -> list[str]:
    """The command line of the run in `folder` with the settings that are given now."""
    settings = command_line.settings
    kept = [word for word in command_of(folder) if word.partition("=")[0] not in settings]
    return kept + [f"{key}={value}" for key, value in settings.items()]


def _without_own_checkpoint(command_line: CommandLine) -> CommandLine:
    """The published benchmark resumes a run to sample with model.ckpt=<its final checkpoint> pretrain.n_epochs=0
    train.n_epochs=0: these three are left out, so that the values of that run hold."""
    flags, settings, _, _ = command_line
    checkpoint, *epochs = (settings.get(key) for key in SAMPLING_ONLY)
    own = Path(flags.resume_exp) / "train/checkpoints/final_checkpoint.pth"
    if checkpoint is None or epochs != ["0", "0"] or Path(checkpoint).resolve() != own.resolve():
        return command_line
    others = {key: text for key, text in settings.items() if key not in SAMPLING_ONLY}
    return command_line._replace(settings=others)


def _evaluation_base(folder: Path, command_line: CommandLine) -> dict[str, object]:
    """The values of the run in `folder` that an evaluation of its samples takes over."""
    run = values_of(folder)
    _require_keys(folder, run)
    keys = [*FLAG_KEYS.values(), "seed", "preset", *FIXED]
    # A data_name that is given is checked later; a run without metrics says nothing about how to evaluate.
    if "data_name" not in command_line.given:
        keys += [key for key in run if key.startswith("sensitive_data.")]
    as_before = run["eval.metrics"] and not {"eval", "preset"} & set(command_line.settings)
    keys += [key for key in run if key.startswith("eval.")] if as_before else ["eval.mode"]
    base = {key: run[key] for key in keys}
    if base["eval.mode"] == "val":
        base["eval.mode"] = "syn"
    return base


def _require_keys(folder: Path, run: dict[str, object]) -> None:
    """Raise UserError if the values of the run in `folder` are incomplete."""
    needed = (*FLAG_KEYS.values(), "seed", "preset", *FIXED, "eval.mode", "eval.metrics")
    missing = [key for key in needed if key not in run]
    if missing:
        raise UserError(f"{folder}: its {CONFIG} is damaged (it has no {missing[0]})")


def _check_flags(given: set[str]) -> None:
    """Raise UserError for flags of eval.py that do not go together."""
    if "out" in given and "images" not in given:
        raise UserError("--out: needs --images; the results of a run go into its own folder")
    if {"images", "list"} <= given:
        raise UserError("--images: is not used with --list; leave one of them out")
    for flag in ("method", "epsilon", "exp_path"):
        if {"images", "list"} & given and flag in given:
            other = "images" if "images" in given else "list"
            raise UserError(f"--{flag}: is not used with --{other}; leave it out")
