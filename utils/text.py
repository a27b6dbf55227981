"""Names in messages."""

from collections.abc import Sequence

from utils.errors import UserError


def printable(text: str) -> str:
    """The text as UTF-8 can hold it: bytes of a file name that are not UTF-8 are shown as \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def require_utf8(words: Sequence[str], where: str) -> None:
    """UserError for text that cannot be written to a file: it would end the program after the work."""
    for word in words:
        if printable(word) != word:
            raise UserError(f"{where}: '{printable(word)}' is not UTF-8; allowed: names and paths in UTF-8")
