"""The whole command line of a run that goes on, where --resume_exp says less than all of it."""

import shlex
from pathlib import Path

from pipeline.environment import values_of, words_of
from pipeline.folder import find, find_any
from utils.command_line import read_command_line
from utils.config import Config, load_config
from utils.config_files import flatten
from utils.places import path_of
from utils.registry import Registry
from utils.runtime import log

# The flags beside --resume_exp that are of this call and not of the run.
OF_THIS_CALL = {"exp_root", "dry_run", "print_config"}


def with_own_words(argv: list[str]) -> list[str]:
    """python run.py --resume_exp <run>, with settings or without: the words with which that run was started, and
    these. Who names method, data or budget gives the whole command."""
    flags, settings, given = read_command_line(argv, "run")
    if "resume_exp" not in given or given - {"resume_exp", *OF_THIS_CALL}:
        return argv
    folder = find_any(path_of(flags.exp_root, "--exp_root"), flags.resume_exp)
    words = [word for word in words_of(folder) if word.partition("=")[0] not in settings]
    words += [f"{key}={value}" for key, value in settings.items()]
    log.info(f"as it was started: run.py {shlex.join(words)}")
    words += [f"--{flag}" for flag in ("dry_run", "print_config") if getattr(flags, flag)]
    return [*words, "--resume_exp", str(folder.resolve())]


def how_to_continue(folder: Path) -> str:
    return f"to continue from the last snapshot: python run.py --resume_exp {shlex.quote(str(folder))}"


def as_started(config: Config, argv: list[str], methods: Registry) -> Config:
    """The settings with which the run of --resume_exp was started, where the command says that it only samples: in the
    published benchmark's words model.ckpt=<its final checkpoint> pretrain.n_epochs=0 train.n_epochs=0."""
    keys = ("model.ckpt", "pretrain.n_epochs", "train.n_epochs")
    checkpoint, *epochs = map(flatten(config.snapshot).get, keys)
    if config.resume is None or checkpoint is None or epochs != [0, 0]:
        return config
    folder = find(config.exp_root, config.method, config.resume)
    if Path(checkpoint).resolve() != (folder / "train/checkpoints/final_checkpoint.pth").resolve():
        return config
    started = values_of(folder)
    others = [word for word in argv if not word.startswith(tuple(f"{key}=" for key in keys))]
    own = ["null" if started[key] is None else started[key] for key in keys]
    return load_config([*others, *(f"{key}={value}" for key, value in zip(keys, own, strict=True))], methods)
