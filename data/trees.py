"""A folder, a zip or a tar seen as the same thing: a list of file names, and a way to read some of them.

Nothing is unpacked to disk, so a hostile archive cannot write outside its place.
"""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from utils.errors import UserError

_ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")  # what operating systems leave beside the user's files


class FileTree(Protocol):
    """`names` are sorted paths relative to the top, with forward slashes."""

    path: Path
    names: list[str]

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Each wanted file once with its bytes, in whatever order is quick."""


def open_tree(path: Path) -> FileTree:
    """The tree at `path`. A folder that holds a single archive and nothing else stands for that archive."""
    if path.is_dir():
        tree = FolderTree(path)
        single = len(tree.names) == 1 and tree.names[0].lower().endswith(_ARCHIVE_ENDINGS)
        return open_tree(path / tree.names[0]) if single else tree
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if zipfile.is_zipfile(path):
        return ZipTree(path)
    if tarfile.is_tarfile(path):
        return TarTree(path)
    raise UserError(f"{path}: neither a folder nor a readable .zip, .tar, .tar.gz or .npz file")


class FolderTree:
    def __init__(self, path: Path) -> None:
        self.path = path
        files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        self.names = sorted(name for name in files if _is_wanted(name))

    @property
    def empty_folders(self) -> list[str]:
        """Folders in which there is nothing that is wanted."""
        parents = {parent for name in self.names for parent in PurePosixPath(name).parents}
        folders = (
            PurePosixPath(folder.relative_to(self.path)) for folder in self.path.rglob("*") if folder.is_dir()
        )
        return sorted(str(folder) for folder in folders if folder not in parents and _is_wanted(str(folder)))

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in wanted:
            try:
                yield name, (self.path / name).read_bytes()
            except OSError as error:
                raise UserError(f"{self.path / name}: cannot be read ({error.strerror})") from error


class ZipTree:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                files = {member.filename for member in archive.infolist() if not member.is_dir()}
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: corrupt or truncated archive ({error})") from error
        self.names = sorted(name for name in files if _is_wanted(name))

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in wanted:
                try:
                    yield name, archive.read(name)
                except (
                    zipfile.BadZipFile,
                    zlib.error,
                    RuntimeError,
                    EOFError,
                ) as error:  # RuntimeError: encrypted
                    raise UserError(f"{self.path}: {name} is corrupt or encrypted ({error})") from error


class TarTree:
    """A tar, compressed or not. A tar inside it counts as a folder named like it (ILSVRC2012_img_train.tar)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted({name for name, _ in self._walk()})

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        remaining = set(wanted)
        for name, open_file in self._walk():
            if name in remaining:
                remaining.discard(name)
                yield name, open_file()
            if not remaining:
                return

    def _walk(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        try:
            with tarfile.open(self.path, "r:*") as archive:
                yield from _walk_tar(archive, "")
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise UserError(f"{self.path}: corrupt or truncated archive ({error})") from error


def _walk_tar(archive: tarfile.TarFile, prefix: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for member in archive:
        name = prefix + member.name.removeprefix("./")
        if not member.isfile() or not _is_wanted(name):
            continue
        if name.endswith(".tar"):
            inner = io.BytesIO(archive.extractfile(member).read())
            with tarfile.open(fileobj=inner) as nested:
                yield from _walk_tar(nested, name.removesuffix(".tar") + "/")
        else:
            yield name, lambda member=member: archive.extractfile(member).read()


def _is_wanted(name: str) -> bool:
    return not any(part.startswith(".") or part in _LITTER for part in PurePosixPath(name).parts)
