"""What a user can cause and repair."""

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. The programs print it as one line and exit with code 2.

    The message names the thing, its value and what is allowed.
    """


class FieldError(UserError):
    """A mistake in a section that stands at several places of the configuration. The message starts with the field's
    name; utils/typed.py, which knows the place, puts the section's key before it."""


class Diverged(UserError):
    """Weights or samples of a network are NaN or infinite. The message names them; run.py adds what helps."""


class Unavailable(UserError):
    """Something that cannot be had here and now: a package, weights, enough images. The text says what would help.

    The report lists a metric that raises it as missing, with this text.
    """


class MissingWeights(Unavailable):
    """Weights of a network are absent or damaged; the text holds the command that fetches them."""


def unknown(kind: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that is in no table: names the nearest entry and lists what exists. `kind` is the key that
    has the name as its value, or what such a name stands for."""
    names = sorted(known)
    near = nearest(str(value), names)
    hint = f"; did you mean '{near}'?" if near else "."
    return UserError(f"unknown {kind} '{value}'{hint} Known: {', '.join(names)}")


def nearest(value: str, names: Iterable[str]) -> str | None:
    """The name that `value` probably stands for, without regard to case: its beginning, its letters in another order,
    the initials of its words, else the most alike; None if none is alike."""
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
