"""Tar archives, compressed or not. Nothing is unpacked to disk, and a damaged archive is an error."""

import bz2
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.trees.links import link_target
from data.trees.tree import Entries, FileTree
from utils.errors import UserError

COMPRESSIONS = {
    b"\x1f\x8b": lambda: zlib.decompressobj(31),  # 31: gzip, with its checksum
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lzma.LZMADecompressor,
}
_CHUNK = 1 << 16
_LARGEST_PAX_HEADER = 1 << 24  # bytes; they hold names and times
_MOST_ZERO_BLOCKS = (
    2048  # 1 MiB at the end; programs write up to some kB, and more is a hole of a broken download
)
_DAMAGED = (
    tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, ArithmeticError, MemoryError,
    RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class _Member:
    name: str  # as the archive has it, below `prefix`
    prefix: str  # the folder that a tar in the tar stands for
    info: tarfile.TarInfo
    read: Callable[[], bytes]


class TarTree(FileTree):
    """A tar inside it counts as a folder named like it (ILSVRC2012_img_train.tar). Several tars one after another
    count as one. A place is the number of the member in the archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = Entries()
        for number, member in self._walk():
            _add(entries, number, member, path)
        super().__init__(path, entries)

    def _read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        names_of: dict[object, list[str]] = {}
        for name in wanted:
            names_of.setdefault(self._places[name], []).append(name)
        for number, member in self._walk():
            names = names_of.pop(number, ())
            if names:
                content = self._content(member)
                for name in names:
                    yield name, content
            if not names_of:
                return
        raise UserError(f"{self.path}: changed while it was read")

    def _content(self, member: _Member) -> bytes:
        try:
            return member.read()
        except _DAMAGED as error:
            raise self._damage(error) from error

    def _walk(self) -> Iterator[tuple[int, _Member]]:
        try:
            with self.path.open("rb") as file:
                yield from enumerate(_members(_decompressed(file), ""))
        except _DAMAGED as error:
            raise self._damage(error) from error

    def _damage(self, error: BaseException) -> UserError:
        return UserError(f"{self.path}: corrupt or truncated archive ({error})")


def is_tar(path: Path) -> bool:
    """True if the file begins like a tar, or is compressed and damaged: reading it then reports the damage."""
    with path.open("rb") as file:
        stream = _decompressed(file)
        try:
            start = stream.read(tarfile.BLOCKSIZE)
            tarfile.TarInfo.frombuf(start, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            return len(start) == tarfile.BLOCKSIZE and not any(start)  # a tar of no file
        except _DAMAGED:
            return stream is not file
    return True


def _members(stream: BinaryIO, prefix: str) -> Iterator[_Member]:
    # ignore_zeros: read on behind the blocks of zeros that end an archive, to the end of the file.
    with tarfile.TarFile(fileobj=stream, tarinfo=_checked_info(), ignore_zeros=True) as archive:
        for info in archive:
            read = _reader(archive, info)
            if info.isfile() and info.name.endswith(".tar"):
                yield from _members(io.BytesIO(read()), f"{prefix}{info.name.removesuffix('.tar')}/")
            else:
                yield _Member(info.name, prefix, info, read)


def _reader(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], bytes]:
    return lambda: archive.extractfile(info).read()


def _add(entries: Entries, number: int, member: _Member, path: Path) -> None:
    name = entries.name(member.prefix + member.name, path)
    if member.info.isfile():
        entries.add_file(name, number)
    elif member.info.islnk():
        entries.add_link(name, entries.name(member.prefix + member.info.linkname, path))
    elif member.info.issym():
        entries.add_link(name, link_target(name, member.info.linkname))
    elif member.info.isdir():
        entries.folders.add(name)
    else:
        entries.special.append(name)


# ------------------------------------------------------------------------------------------------------ strictness


def _checked_info() -> type[tarfile.TarInfo]:
    """A TarInfo for one archive that refuses what `tarfile` treats as the end: a damaged header, and an end of the file
    without a block of zeros before it."""

    class CheckedInfo(tarfile.TarInfo):
        zeros = 0  # blocks of zeros since the last header

        @classmethod
        def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
            if cls.zeros > _MOST_ZERO_BLOCKS:
                raise tarfile.ReadError("a long run of zeros, as in an unfinished download")
            if not any(buf):
                whole = len(buf) == tarfile.BLOCKSIZE
                if not whole and not cls.zeros:
                    raise tarfile.ReadError("it stops without the blocks of zeros that end a tar")
                cls.zeros += whole
                return super().frombuf(buf if whole else b"", encoding, errors)
            cls.zeros = 0
            try:
                info = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"damaged header: {error}") from error
            return info

        @classmethod
        def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
            _check_pax_records(archive.fileobj)
            info = super().fromtarfile(archive)
            if info.size < 0:  # tarfile would go back and read the same header forever
                raise tarfile.ReadError("damaged header: a negative size")
            return info

    return CheckedInfo


def _check_pax_records(stream: BinaryIO) -> None:
    """ReadError if a pax header comes next whose records are damaged: `tarfile` would drop them, long names included.
    A record is "<its length> <key>=<value>\\n"."""
    header = _look_ahead(stream, tarfile.BLOCKSIZE)
    if header[156:157] not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
        return
    try:
        size = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").size
    except tarfile.HeaderError as error:  # tarfile would treat it as the end of the archive
        raise tarfile.ReadError(f"damaged header: {error}") from error
    if not 0 <= size <= _LARGEST_PAX_HEADER:
        raise tarfile.ReadError(f"damaged header: {size:,} bytes of pax records")
    content = _look_ahead(stream, tarfile.BLOCKSIZE + size)[tarfile.BLOCKSIZE :]
    while content:
        match = re.match(rb"([0-9]+) [^=]+=", content)
        length = int(match[1]) if match else 0
        if length < 1 or content[length - 1 : length] != b"\n":
            raise tarfile.ReadError("damaged header: a pax record")
        content = content[length:]


def _look_ahead(stream: BinaryIO, size: int) -> bytes:
    if isinstance(stream, _Decompressed):
        return stream.peek(size)
    place = stream.tell()
    content = stream.read(size)
    stream.seek(place)
    return content


def _decompressed(file: BinaryIO) -> BinaryIO:
    start = file.read(8)
    file.seek(0)
    new = next((new for magic, new in COMPRESSIONS.items() if start.startswith(magic)), None)
    return file if new is None else _Decompressed(file, new)


class _Decompressed:
    """The bytes of a gzip, bzip2 or xz file, read forwards. Unlike the modules of the standard library it refuses
    whatever follows the last compressed stream, and so notices if a second one is damaged."""

    def __init__(self, file: BinaryIO, new_decompressor: Callable) -> None:
        self._file = file
        self._new = new_decompressor
        self._decompressor = None  # between two streams
        self._rest = b""  # compressed, of the next stream
        self._buffer = bytearray()
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._buffer) < size:
            if not self._fill():
                break
        size = len(self._buffer) if size < 0 else size
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._position += len(content)
        return content

    def peek(self, size: int) -> bytes:
        while len(self._buffer) < size and self._fill():
            pass
        return bytes(self._buffer[:size])

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise io.UnsupportedOperation("a compressed archive is read forwards")
        while self._position < position and self.read(min(position - self._position, _CHUNK)):
            pass
        return self._position

    def _fill(self) -> bool:
        """Decompress the next chunk; False at the end of the file."""
        chunk, self._rest = self._rest or self._file.read(_CHUNK), b""
        if self._decompressor is None:
            chunk = chunk.lstrip(b"\0")  # padding
            if not chunk:
                return bool(self._file.peek(1))
            self._decompressor = self._new()
        elif not chunk:
            raise EOFError("the compressed data are truncated")
        self._buffer += self._decompressor.decompress(chunk)
        if self._decompressor.eof:
            self._rest, self._decompressor = self._decompressor.unused_data, None
        return True
