"""Atomic writes and strict JSON: a killed program leaves whole files or none."""

import errno
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.private_files import create_private_file, make_private_folder

if TYPE_CHECKING:
    import numpy as np

PROBE = 1 << 20  # bytes that must fit on the disk before samples are judged


@contextmanager
def atomic(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without an error, on the
    disk too: what was booked or answered must not be forgotten by a machine that loses power.

    A `private` file has the rights 0600, and its folder 0700, from the moment that they are made.
    """
    if private:
        make_private_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        if private:
            create_private_file(temporary)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # writing does not name the file
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # what is wrong with the disk is in the error that is raised already
            temporary.unlink()


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk, where the file system can tell."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM):
            raise


def require_writable(folder: Path) -> None:
    """Raise OSError if nothing can be written to `folder`, before work whose results would go there."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(folder)
        raise


def save_array(path: Path, array: "np.ndarray") -> None:
    """np.save by way of memory: NumPy's own writing to a file that fails loses the reason."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.write_bytes(buffer.getbuffer())


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    with atomic(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object, *, private: bool = False) -> None:
    """Strict JSON: an infinite or undefined number is written as the string "inf" or "nan"."""
    write_text(path, json.dumps(_strict(value), indent=2) + "\n", private=private)


def read_json(path: Path) -> object:
    """What `write_json` wrote; the strings "inf", "-inf" and "nan" become numbers again. UserError if it is damaged or
    missing."""
    try:
        return _loose(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; restore it") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore it or move it away") from error


def _loose(value: object) -> object:
    if isinstance(value, dict):
        return {key: _loose(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_loose(entry) for entry in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def _strict(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
