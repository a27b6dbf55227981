"""Zip archives. Nothing is unpacked to disk."""

import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from data.trees.links import link_target
from data.trees.tree import Entries, FileTree, litter_in
from utils.errors import UserError
from utils.text import printable

# What the standard library raises for damaged members, by their compression; RuntimeError: encrypted or not supported.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError, ValueError, struct.error,
    OverflowError,
)  # fmt: skip
_END = struct.Struct(
    "<4s4H2LH"  # signature, disks, counts, size, offset, length of the comment
)
_KNOWN_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class ZipTree(FileTree):
    def __init__(self, path: Path) -> None:
        entries = Entries()
        members = zip_members(path)
        try:
            with zipfile.ZipFile(path) as archive:
                for member in members:
                    _add(entries, archive, member, path)
        except DAMAGED as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: corrupt archive ({error})") from error
        super().__init__(path, entries)

    def _read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in wanted:
                try:
                    content = archive.read(self._places[name])
                except DAMAGED as error:
                    raise UserError(f"{self.path}: {name} is corrupt or encrypted ({error})") from error
                yield name, content


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """All members of a zip. UserError if the file holds anything else, such as a second zip, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            fault = _fault(path, archive, members)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the name {printable(repr(error.object))} is marked as UTF-8 and is not; pack the files again"
        ) from error
    except DAMAGED as error:
        raise UserError(f"{path}: corrupt or truncated zip ({error})") from error
    if fault is not None:
        raise UserError(f"{path}: {fault}")
    return members


def _fault(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> str | None:
    """Why the table of contents is incomplete; None if it is complete. Readers of zip files search for it from
    the end of the file, so one that is truncated, or follows another one, may show the table of another zip."""
    end = path.stat().st_size - _END.size - len(archive.comment)
    with path.open("rb") as file:
        file.seek(end)
        signature, _, _, _, count, _, _, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\5\6" or comment != len(archive.comment):
        return "corrupt or truncated zip: data follow its end record"
    if count != min(len(members), 0xFFFF) and count != len(members) & 0xFFFF:
        return f"corrupt zip: its table has {len(members):,} of {count:,} files"
    before = min((member.header_offset for member in members), default=0)
    if before:
        return (
            f"{before:,} bytes precede its first file: several zips in one, or damaged; pack the files again"
        )
    encrypted = next((member.filename for member in members if member.flag_bits & 1), None)
    if encrypted is not None:
        return f"{printable(encrypted)} is encrypted; pack the files without a password"
    other = next((member for member in members if member.compress_type not in _KNOWN_COMPRESSION), None)
    if other is not None:
        return (
            f"{printable(other.filename)} is compressed by method {other.compress_type}, which is not supported or "
            f"corrupt; pack the files with deflate"
        )
    return None


def _add(entries: Entries, archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    raw = _text_of(member)
    name = entries.name(raw, path)
    unread = [member] if raw.endswith(("/", "\\")) or litter_in(name) else []
    if name in entries.files:
        unread += [entries.files[name], member]
    # A damaged name must not hide an image: opening compares it with the name at the file itself.
    for other in unread:
        archive.open(other).close()
    if stat.S_ISLNK(member.external_attr >> 16):
        entries.add_link(name, link_target(name, archive.read(member).decode("utf-8", "surrogateescape")))
    elif raw.endswith(("/", "\\")):
        entries.folders.add(name)
    else:
        entries.add_file(name, member)


def _text_of(member: zipfile.ZipInfo) -> str:
    """The name of a member. Without the mark of UTF-8 the format means code page 437; many programs write UTF-8."""
    marked = member.flag_bits & 0x800
    if marked or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename
