"""Bounds as a person reads them."""

import math
from decimal import ROUND_CEILING, Context, Decimal


def at_most(bound: float) -> str:
    """A bound in four significant digits, rounded up, so that what is printed holds too."""
    if not math.isfinite(bound):
        return str(bound)
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(bound))))):.4g}"
