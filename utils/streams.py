"""Standard output and standard error that never end a program. If a stream is closed, its disk is full, or its terminal
or reader (`| head`) has gone, only the printed text is lost. A run also writes its lines to stdout.txt."""

import contextlib
import io
import os
import select
import sys
from typing import TextIO


class _PatientOutput(io.RawIOBase):
    """Writes to a file descriptor, and drops output that the descriptor does not accept."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes | memoryview) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program has made it non-blocking, and its reader is slow
                select.select([], [self._descriptor], [])
            except OSError:
                return len(data)


def protect_standard_streams() -> None:
    """Replace sys.stdout and sys.stderr. Call it before any file is opened: otherwise the next file may get the number
    of a closed descriptor, and a library that prints would write into that file."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(
                    os.open(os.devnull, os.O_RDWR), True
                )  # takes the lowest number that is free
    sys.stdout, sys.stderr = _patient(sys.stdout), _patient(sys.stderr)


def _patient(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")  # lives as long as the process
    try:
        raw = _PatientOutput(stream.fileno())
    except (AttributeError, OSError):  # no file: somebody has replaced it
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",  # an ASCII console shows \xe9 for a letter outside ASCII
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
