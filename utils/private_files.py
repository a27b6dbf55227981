"""Files and folders that only their owner can read, whatever the umask is."""

import errno
import os
import stat
from pathlib import Path

OF_OTHERS = 0o077  # the rights of everyone but the owner


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


def readable_by_others(path: Path) -> bool:
    """True if the rights of `path` let anyone but its owner in."""
    return bool(path.stat().st_mode & OF_OTHERS)
