"""Errors that a user can cause and correct."""

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input. The programs print it as one line and exit with code 2.

    The message names the thing, its value and what is allowed.
    """


class FieldError(UserError):
    """A wrong value of a section that occurs at several keys. The message starts with the field's name; utils/typed.py
    puts the section's key before it."""


class Diverged(UserError):
    """Weights or samples of a network are NaN or infinite. The message names them; run.py adds advice."""


class Unavailable(UserError):
    """A package, weights or enough images are missing. The text says what helps.

    A metric that raises it is reported as missing, with this text.
    """


class MissingWeights(Unavailable):
    """Weights of a network are missing or damaged; the text contains the command that fetches them."""


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for an unknown name: suggests the nearest entry and lists all. `kind` is the key of the name, or a
    noun."""
    names = sorted(known)
    near = nearest(str(value), names)
    hint = f"; did you mean '{near}'?" if near else "."
    return UserError(f"unknown {kind} '{value}'{hint} Known: {', '.join(names)}")


def nearest(value: str, names: Iterable[str]) -> str | None:
    """The name that `value` probably means, ignoring case: a name that starts with it, has the same letters in another
    order, or has it as initials, else the most similar one; None if none is similar."""
    asked, by_folded = value.casefold(), {name.casefold(): name for name in names}

    def initials(name: str) -> str:
        return "".join(re.findall(r"(?<![a-z0-9])[a-z0-9]", name))

    likely = (
        [name for name in by_folded if asked and name.startswith(asked)],
        [name for name in by_folded if sorted(name) == sorted(asked)],
        [name for name in by_folded if len(asked) > 1 and initials(name) == asked],
        difflib.get_close_matches(asked, by_folded, n=1, cutoff=0.5),
    )
    found = next(filter(None, likely), None)
    return by_folded[min(found, key=len)] if found else None
