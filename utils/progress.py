"""Progress bars with an ETA for every long stage; quiet lines where the output is not a terminal."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from utils import distributed


def progress(
    iterable: Iterable, description: str, total: int | None = None, initial: int = 0, unit: str = "step"
):
    """Wrap `iterable` in a bar on stderr. In a log file it prints a line every half minute, not one per refresh. Of
    several processes only the main one shows it. There is no bar if no steps remain."""
    if total is None:
        total = len(iterable)
    if not distributed.is_main() or initial >= total:
        return iterable
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        file=sys.stderr,
        mininterval=0.2 if terminal else 30.0,
        maxinterval=10.0 if terminal else 60.0,
        dynamic_ncols=terminal,
    )


def duration(seconds: float) -> str:
    """A readable duration, such as "2.5 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"
