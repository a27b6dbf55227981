"""Why a metric has no value."""

from utils.errors import UserError


class Unavailable(UserError):
    """A metric that cannot be computed here and now; the report lists it as missing with this text."""


class MissingWeights(Unavailable):
    """The weights of a feature extractor are absent or damaged; the text holds the command that fetches them."""
