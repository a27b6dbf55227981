"""The folder of one run: create, find, lock, discard."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from utils.artefacts import CLASSIFIER, CONFIG, ENVIRONMENT, PROVENANCE, RESULTS, SAMPLES, STDOUT, TIMING
from utils.errors import UserError
from utils.private_files import only_for_owner, replaceable_by_others
from utils.runtime import log
from utils.text import listed

AT_START = {CONFIG, PROVENANCE, ENVIRONMENT, STDOUT, TIMING}  # files of a run without a checkpoint


@contextmanager
def discarded_on_failure(folder: Path, is_new: bool) -> Iterator[None]:
    """Remove `folder`, if it is new, where the block ends with an error or is interrupted."""
    completed = False
    try:
        yield
        completed = True
    finally:
        if is_new and not completed:
            shutil.rmtree(folder, ignore_errors=True)


def create(exp_root: Path, method: str, data_name: str, epsilon: float, description: str) -> Path:
    """Make exp/<method>/<data>_eps<epsilon><description>-<time>/ and return it; never an existing folder."""
    return new_folder(exp_root, method.lower(), f"{data_name}_eps{float(epsilon)}{description}")


def new_folder(exp_root: Path, group: str, name: str) -> Path:
    """Make <exp_root>/<group>/<name>-<time>/ with the rights 0700 and return it; never an existing folder."""
    if re.search(r"[/\\\0]", name):
        raise UserError(f"--exp_description: '{name}' must not contain a path separator")
    stem = f"{name}-{datetime.now():%Y-%m-%d-%H-%M-%S}"
    for attempt in range(100):
        folder = exp_root / group / (stem if attempt == 0 else f"{stem}-{attempt}")
        try:
            folder.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            if folder.is_dir():
                continue
            raise UserError(f"--exp_root: {exp_root} is a file; give a folder that can be written") from None
        except OSError as error:
            raise UserError(
                f"--exp_root: cannot make {folder} ({error.strerror}); give a folder that can be written"
            ) from error
        return folder
    raise UserError(f"{exp_root}: no free name for {stem}")


@contextmanager
def private_work(folder: Path) -> Iterator[None]:
    """Only the owner can read what is written in the block. Warns if other users can replace `folder`, for example by
    a link to a folder of theirs."""
    open_folder = replaceable_by_others(folder)
    if open_folder is not None:
        log.warning(
            f"warning: every user can replace what lies in {open_folder}, also {folder.name}; "
            f"run: chmod o-w {open_folder}"
        )
    with only_for_owner():
        yield


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """`private_work` that also keeps other processes out of the run in `folder`: two that continue the same run would
    draw different noise for what is booked once. UserError if there is one already.

    The lock goes with the process, however it ends. Where the file system knows no locks, nothing is kept out.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        with private_work(folder):
            yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process works in this run; wait until it ends") from None
        except OSError:
            pass
        with private_work(folder):
            yield
    finally:
        os.close(handle)


def discard_unstarted(folder: Path) -> bool:
    """Remove the folder of a run that failed before it left anything to resume from: it holds only the files that every
    run writes at its start, so no checkpoint and no result of a private query. Returns whether it was removed."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    is_unstarted = files <= AT_START
    if is_unstarted:
        shutil.rmtree(folder)
    return is_unstarted


def is_finished(folder: Path) -> bool:
    return (folder / RESULTS).exists() and any((folder / name).exists() for name in (SAMPLES, CLASSIFIER))


def find(exp_root: Path, name: str, method: str | None = None) -> Path:
    """The folder of an earlier run, by name or by path. Of several with this name, the one of `method`."""
    named = sorted(exp_root.glob(f"*/{name}")) if re.fullmatch(r"[^/\\*?\[]+", name) else []
    found = [folder for folder in (*named, Path(name)) if (folder / CONFIG).is_file()]
    if not found:
        runs = sorted(path.parent.name for path in exp_root.glob(f"{(method or '*').lower()}/*/{CONFIG}"))
        known = f"; runs there: {listed(runs)}" if runs else ""
        raise UserError(
            f"--resume_exp: no run '{name}' in {exp_root}; give the name of a run's folder, or its path{known}"
        )
    of_method = [folder for folder in found if method and folder.parent.name == method.lower()]
    if len(of_method or found) > 1:
        raise UserError(f"--resume_exp: '{name}' may be {' or '.join(map(str, found))}; give the path of one")
    return (of_method or found)[0]
