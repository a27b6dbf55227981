"""What a user can cause and repair."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. The programs print it as one line and exit with code 2.

    The message names the thing, its value and what is allowed.
    """


class FieldError(UserError):
    """A mistake in a section that stands at several places of the configuration. The message starts with the field's
    name; utils/typed.py, which knows the place, puts the section's key before it."""


class Unavailable(UserError):
    """Something that cannot be had here and now: a package, weights, enough images. The text says what would help.

    The report lists a metric that raises it as missing, with this text.
    """


class MissingWeights(Unavailable):
    """Weights of a network are absent or damaged; the text holds the command that fetches them."""


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that is in no table: names the nearest entry and lists what exists."""
    names = sorted(known)
    by_folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(str(value).casefold(), by_folded, n=1, cutoff=0.5)
    hint = f"; did you mean '{by_folded[near[0]]}'?" if near else ";"
    return UserError(f"unknown {kind} '{value}'{hint} Known: {', '.join(names)}")
