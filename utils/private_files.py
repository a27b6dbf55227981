"""Files and folders that only their owner can read, whatever the umask is."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

OF_OTHERS = 0o077  # the rights of everyone but the owner
_usual_umasks: list[int] = []  # of the process, before each enclosing block of `only_for_owner`


@contextlib.contextmanager
def only_for_owner() -> Iterator[None]:
    """Only the owner can read the files and folders that this process creates in the block."""
    _usual_umasks.append(os.umask(OF_OTHERS))
    try:
        yield
    finally:
        os.umask(_usual_umasks.pop())


@contextlib.contextmanager
def for_everyone() -> Iterator[None]:
    """Within `only_for_owner`: create files with the permissions that are usual outside of it. For public results in a
    folder that users share."""
    if not _usual_umasks:
        yield
        return
    before = os.umask(_usual_umasks[0])
    try:
        yield
    finally:
        os.umask(before)


def make_private_folder(folder: Path) -> None:
    """Create `folder` with mode 0700, or remove the rights of other users from an existing one.

    Raises OSError if it cannot be created, belongs to another user, or is in a file system without permissions.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # never with wider rights, not even for a moment
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)
    if readable_by_others(folder):
        raise OSError(errno.EPERM, "others can read it", str(folder))
    if folder.stat().st_uid != os.geteuid():  # root may write to it, and its owner would read what is written
        raise OSError(errno.EPERM, "it belongs to another user", str(folder))


def create_private_file(path: Path) -> None:
    """Create an empty file with mode 0600, replacing an existing one. Writing to it keeps the mode."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def replaceable_by_others(path: Path) -> Path | None:
    """The nearest folder above `path` in which every user of the machine can replace entries; None if there is none.
    A folder with the sticky bit, such as /tmp, is safe."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return folder
    return None


def readable_by_others(path: Path) -> bool:
    """True if the rights of `path` let anyone but its owner in."""
    return bool(path.stat().st_mode & OF_OTHERS)
