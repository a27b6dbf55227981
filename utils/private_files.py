"""Files and folders that only their owner can read, whatever the umask is."""

import errno
import os
import stat
from pathlib import Path

OF_OTHERS = 0o077  # the rights of everyone but the owner


def make_private_folder(folder: Path) -> None:
    """Make `folder` with the rights 0700, or take the rights of others from one that exists.

    OSError if it cannot be made, is somebody else's, or lies in a file system that keeps no rights.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # never with wider rights, not even for a moment
    if stat.S_IMODE(folder.stat().st_mode) != 0o700:
        folder.chmod(0o700)
    if readable_by_others(folder):
        raise OSError(errno.EPERM, "others can read it", str(folder))
    if folder.stat().st_uid != os.geteuid():  # root may write to it, and its owner would read what is written
        raise OSError(errno.EPERM, "it belongs to another user", str(folder))


def create_private_file(path: Path) -> None:
    """Make an empty file with the rights 0600; it replaces one that exists. Writing to it keeps its rights."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def readable_by_others(path: Path) -> bool:
    """True if the rights of `path` let anyone but its owner in."""
    return bool(path.stat().st_mode & OF_OTHERS)
