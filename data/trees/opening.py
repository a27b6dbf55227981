"""Finds out whether a path is a folder, a zip or a tar."""

from pathlib import Path

from data.trees.folder import FolderTree
from data.trees.tars import TarTree, is_tar
from data.trees.tree import FileTree
from data.trees.zips import ZipTree
from utils.errors import UserError

ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def open_tree(path: Path) -> FileTree:
    """The tree at `path`. UserError for anything that is neither a folder nor an archive."""
    if path.is_dir():
        return FolderTree(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # By the beginning of the file: an archive may hold archives of the other kind.
    if start in (b"PK\3\4", b"PK\5\6"):
        return ZipTree(path)
    if is_tar(path):
        return TarTree(path)
    if start.startswith(b"PK"):
        raise UserError(f"{path}: corrupt or truncated zip")
    raise UserError(
        f"{path}: neither a folder nor a readable .zip, .tar, .tar.gz, .tar.bz2, .tar.xz or .npz file"
    )
