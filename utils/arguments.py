"""A strict parser of flags for all programs, and the one way to read a number of a command line."""

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any

from utils.errors import UserError, unknown

REPEATABLE = ("plugin",)
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?inf(inity)?", re.IGNORECASE)
PLAIN = (
    "write a decimal number such as 10, 0.5 or 1e-5, without leading zeros, underscores, colons, blanks and other "
    "notations"
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, suggests the nearest flag for an unknown one, completes no
    abbreviation, and refuses a flag that is given twice."""

    def __init__(self, **options: object) -> None:
        self.flags: dict[str, str] = {}  # option string -> name of the flag
        super().__init__(allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        options_of_it = [name for name in names if name.startswith("-")]
        self.flags.update(dict.fromkeys(options_of_it, max(names, key=len).lstrip("-")))
        if "type" in options:
            options["type"] = _with_message(options["type"])
        return super().add_argument(*names, **options)

    def error(self, message: str) -> None:
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, args: list[str], namespace: None = None) -> argparse.Namespace:
        self.given_flags(args)
        return super().parse_args(args, namespace)

    def given_flags(self, arguments: list[str]) -> set[str]:
        """Names of the flags in `arguments`; raises UserError for an unknown flag and for one that is given twice."""
        given = set()
        for argument in arguments:
            if not argument.startswith("-") or re.match(r"-\.?\d", argument):  # a negative number is a value
                continue
            flag = argument.partition("=")[0]
            if flag not in self.flags:
                raise self.unknown_flag(flag)
            name = self.flags[flag]
            if name in given and name not in REPEATABLE:
                raise UserError(f"--{name} is given twice")
            given.add(name)
        return given

    def unknown_flag(self, flag: str) -> UserError:
        return unknown("flag", flag, self.flags)


def _with_message(read: Callable[[str], object]) -> Callable[[str], object]:
    """`read`, whose UserError argparse reports with its message, which it drops for other errors."""

    def read_or_report(text: str) -> object:
        try:
            return read(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_or_report


def is_plain_number(text: str) -> bool:
    """True for a decimal number as everybody reads it. Python and YAML also accept 1_000, 0x10, 010 (as 8 or as 10)
    and the digits of other scripts."""
    return DECIMAL.fullmatch(text) is not None or INFINITE.fullmatch(text) is not None


def looks_like_number(text: str) -> bool:
    return re.match(r"\s*[-+]?\.?\d", text) is not None


def whole_number(text: str) -> int:
    """The type of a flag that is a whole number."""
    if not WHOLE.fullmatch(text):
        raise UserError(f"{text!r} is not allowed; {PLAIN.replace('10, 0.5 or 1e-5', '10')}")
    return int(text)


def decimal_number(text: str) -> float:
    """The type of a flag that is a number; inf is allowed."""
    if not is_plain_number(text):
        raise UserError(f"{text!r} is not allowed; {PLAIN}")
    return float(text)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of a flag whose value is one of `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise unknown("value", text, names)
        return text

    return read
