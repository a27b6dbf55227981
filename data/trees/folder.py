"""A folder on disk. Links are followed; whatever cannot be read is an error."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from data.trees.tree import Entries, FileTree, litter_in, shared_note
from utils.errors import UserError
from utils.text import listed

Identity = tuple[int, int]  # device and inode


class FolderTree(FileTree):
    def __init__(self, path: Path) -> None:
        super().__init__(path, _Walk(path).entries)

    def place(self, name: str) -> Path:
        return self._places[name]

    def _read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        for name in wanted:
            try:
                yield name, self._places[name].read_bytes()
            except OSError as error:
                raise UserError(f"{self._places[name]}: cannot be read ({error.strerror})") from error


class _Walk:
    """Lists a folder with all folders in it. Problems are collected, so that one message names them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = Entries()
        self.unreadable: list[str] = []
        self.cycles: list[str] = []
        self.litter: list[str] = []
        self.seen: set[Identity] = set()  # of files
        self.shared = 0
        self._list_all()
        if self.unreadable:
            raise UserError(
                f"{path}: cannot be read: {listed(self.unreadable)}; make it readable, or remove it from there"
            )
        if self.entries.repeated:
            raise UserError(
                f"{path}: two files have the name {self.entries.repeated[0]} if a backslash separates folders"
            )
        if self.cycles:
            self.entries.notes.append(
                f"links to a folder that holds the link are not followed: {listed(self.cycles)}"
            )
        self.entries.notes += shared_note(self.shared)

    def _list_all(self) -> None:
        pending: list[tuple[str, str, tuple[Identity, ...]]] = [(str(self.path), "", ())]
        while pending:
            folder, prefix, above = pending.pop()
            try:
                status = os.stat(folder)
                with os.scandir(folder) as found:
                    inside = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                self.unreadable.append(f"{prefix or folder} ({error.strerror})")
                continue
            identity = status.st_dev, status.st_ino
            if identity in above:
                self.cycles.append(prefix.rstrip("/"))
                continue
            self.entries.folders.add(self.entries.name(prefix, self.path))
            for entry in inside:
                name = prefix + entry.name
                if litter_in(entry.name):
                    self.entries.files[self.entries.name(name, self.path)] = Path(entry.path)
                elif self._is_folder(entry, name):
                    pending.append((entry.path, f"{name}/", (*above, identity)))
                else:
                    self._add(entry, name, status.st_dev)

    def _is_folder(self, entry: os.DirEntry, name: str) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # _add reports the reason
            return False

    def _add(self, entry: os.DirEntry, name: str, device: int) -> None:
        linked = entry.is_symlink()
        try:
            status = os.stat(entry.path) if linked else None
        except OSError as error:
            reason = f"a link to nothing, {os.readlink(entry.path)}" if linked else error.strerror
            self.unreadable.append(f"{name} ({reason})")
            return
        if not entry.is_file():
            self.entries.special.append(name)
        elif not os.access(entry.path, os.R_OK):
            self.unreadable.append(f"{name} (no permission)")
        else:
            identity = (status.st_dev, status.st_ino) if linked else (device, entry.inode())
            self.shared += identity in self.seen
            self.seen.add(identity)
            self.entries.add_file(self.entries.name(name, self.path), Path(entry.path))
