"""Progress bars with an ETA for every long stage; quiet lines where the output is not a terminal."""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from utils import distributed

T = TypeVar("T")


class _Lines:
    """Writes what tqdm draws as lines of their own, for an output that cannot move its cursor back."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)  # tqdm draws in ASCII if it is not UTF-8

    def write(self, text: str) -> None:
        if line := text.strip():  # tqdm clears a line with spaces and ends a bar with a line end
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(
    iterable: Iterable[T], description: str, total: int | None = None, initial: int = 0, unit: str = "step"
) -> Iterable[T]:
    """Wrap `iterable` in a bar on stderr. In a log file it prints a line every half minute, not one per refresh. Of
    several processes only the main one shows it. There is no bar if no steps remain."""
    if total is None:
        total = len(iterable)
    if not distributed.is_main() or initial >= total:
        return iterable
    return open_bar(iterable, desc=description, total=total, initial=initial, unit=unit)


def open_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A bar on stderr, with the options of tqdm, for work that `progress` cannot wrap; close it at the end."""
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else 30.0,
        maxinterval=10.0 if terminal else 60.0,
        dynamic_ncols=terminal,
        **options,
    )


def above_bars(stream: TextIO) -> AbstractContextManager:
    """Context in which the bars are removed from the terminal, so that a line written to `stream` starts at its left
    edge; afterwards they are drawn again below it."""
    return tqdm.external_write_mode(file=stream)


def duration(seconds: float) -> str:
    """A readable duration, such as "2.5 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"
