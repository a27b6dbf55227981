"""The common form of a folder, a zip and a tar: named files that can be read."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from data.trees.links import Links, resolve_links
from utils.errors import UserError
from utils.text import listed, printable

# What operating systems, file servers and version control leave next to the user's files; compared without case.
# Names that begin with a dot belong to it as well.
_LITTER = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
_DOCUMENT_NAMES = {
    "readme", "license", "licence", "copying", "copyright", "notice", "authors", "contributors", "changelog",
    "citation", "makefile", "md5sums", "sha1sums", "sha256sums",
}  # fmt: skip
_DOCUMENT_ENDINGS = {
    ".md", ".rst", ".txt", ".rtf", ".pdf", ".html", ".htm", ".csv", ".tsv", ".xls", ".xlsx", ".doc", ".docx", ".odt",
    ".ods", ".odp", ".ppt", ".pptx",
    ".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml", ".ini", ".cfg", ".log", ".bib", ".cff", ".url", ".lnk",
    ".py", ".ipynb", ".sh", ".bat", ".m", ".md5", ".sha1", ".sha256",
}  # fmt: skip


class FileTree(ABC):
    """Named files below one path.

    `names`: sorted paths relative to the top, with forward slashes. `notes`: the files that are not among them, with
    the reason. `opened`: the names that were read.
    """

    def __init__(self, path: Path, entries: "Entries") -> None:
        self.path = path
        self.notes = list(entries.notes)
        self._places = entries.settle(path, self.notes)
        self.names = sorted(self._places)
        self.opened: set[str] = set()
        self.empty_folders = _without_files(entries.folders, self.names)

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield each wanted file once with its bytes, in the order that is fastest."""
        self.opened.update(wanted)
        return self._read(wanted)

    @abstractmethod
    def _read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]: ...


class Entries:
    """Collects the content of a folder or an archive. A place is the handle by which the tree reads a file."""

    def __init__(self) -> None:
        self.files: dict[str, object] = {}  # name -> place
        self.links = Links()
        self.folders: set[str] = set()
        self.special: list[str] = []  # devices, pipes and the like
        self.repeated: list[str] = []  # names that an archive holds more than once
        self.backslashes = 0
        self.notes: list[str] = []

    def name(self, raw: str, path: Path) -> str:
        """`raw` as a relative path with forward slashes. Archives made on Windows may hold backslashes."""
        self.backslashes += "\\" in raw
        parts = [part for part in raw.replace("\\", "/").split("/") if part not in ("", ".")]
        if ".." in parts:
            raise UserError(f"{path}: {printable(raw)} leads out of it; pack the files again, without '..'")
        return "/".join(parts)

    def add_file(self, name: str, place: object) -> None:
        """Of several files of one name the last one counts, as for tar and unzip."""
        self._replace(name)
        self.files[name] = place

    def add_link(self, name: str, target: str | None) -> None:
        """`target` is relative to the top; None if it lies outside."""
        self._replace(name)
        self.links[name] = target

    def _replace(self, name: str) -> None:
        if name in self.files or name in self.links:
            self.repeated.append(name)
            self.files.pop(name, None)
            self.links.pop(name, None)

    def settle(self, path: Path, notes: list[str]) -> dict[str, object]:
        """Name -> place of every file except litter, with links resolved. UserError for links to nothing, and for names
        that are not UTF-8. `notes` gets a line for each kind of file that is skipped or counted twice."""
        visible = {name: target for name, target in self.links.items() if not litter_in(name)}
        linked = resolve_links(self.files, visible, path, notes)
        linked = {name: real for name, real in linked.items() if not litter_in(name)}
        places = {name: place for name, place in self.files.items() if not litter_in(name)}
        litter = {found for name in self.files if (found := litter_in(name))}
        twice = len(linked) + len(places) - len({*linked.values(), *places})
        places |= {name: self.files[real] for name, real in linked.items()}
        refuse_unreadable_text(places, path)
        if self.repeated:
            notes.append(
                f"it holds {listed(self.repeated)} more than once; the last one counts, as for tar and unzip"
            )
        notes += shared_note(twice)
        notes += left_out(litter, "hidden, or left by an operating system")
        notes += left_out(self.special, "neither a file nor a folder")
        if self.backslashes:
            notes.append(
                f"{self.backslashes:,} names have a backslash, which is read as the separator of folders"
            )
        return places


def shared_note(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count:,} names are links to files that are read under another name too; each name counts as one image, and "
        f"epsilon protects one image"
    ]


def left_out(names: Collection[str], reason: str) -> list[str]:
    return [f"left out ({reason}): {listed(sorted(names))}"] if names else []


def litter_in(name: str) -> str | None:
    """The path down to the first part that is hidden or litter, or None."""
    parts = name.split("/")
    for depth, part in enumerate(parts, 1):
        if part.startswith(".") or part.casefold() in _LITTER:
            return "/".join(parts[:depth])
    return None


def is_document(name: str) -> bool:
    """True for texts and tables, which accompany images, by their names."""
    path = PurePosixPath(name.casefold())
    return path.suffix in _DOCUMENT_ENDINGS or path.name.partition(".")[0] in _DOCUMENT_NAMES


def refuse_unreadable_text(names: Collection[str], path: Path) -> None:
    wrong = [name for name in names if not name.isascii() and printable(name) != name]
    if wrong:
        raise UserError(
            f"{path}: names that are not UTF-8: {listed(sorted(wrong))}; rename them, for example with: convmv -r "
            f"--notest -f latin1 -t utf-8 <folder>"
        )


def _without_files(folders: Collection[str], names: Collection[str]) -> list[str]:
    """Folders without any of `names` below them."""
    parents: set[str] = set()
    for name in names:
        parent = name.rpartition("/")[0]
        while parent and parent not in parents:
            parents.add(parent)
            parent = parent.rpartition("/")[0]
    return sorted(folder for folder in folders if folder and folder not in parents and not litter_in(folder))
