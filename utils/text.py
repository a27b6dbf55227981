"""Text for a person: names, bounds and tables."""

import math
from collections.abc import Collection, Sequence
from decimal import ROUND_CEILING, Context, Decimal

from utils.errors import UserError


def printable(text: str) -> str:
    """`text` with \\xNN in place of each byte of a file name that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def require_utf8(texts: Sequence[str], source: str) -> None:
    """Raise UserError for text that cannot be written to a file, so that no run fails on it after the work is done."""
    for text in texts:
        if printable(text) != text:
            raise UserError(f"{source}: '{printable(text)}' is not UTF-8; allowed: names and paths in UTF-8")


def at_most(bound: float) -> str:
    """A bound in four significant digits, rounded up, so that the printed number is a bound too."""
    if not math.isfinite(bound):
        return str(bound)
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(bound))))):.4g}"


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """One line per row; columns are two spaces apart, the columns `right` flush right, the others flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if column in right else "<" for column in range(len(widths))]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
