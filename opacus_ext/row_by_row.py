"""A check that a function treats every record by itself, which is what bounding each record's value rests on."""

from collections.abc import Callable

import torch

from utils.errors import UserError

ROUNDING = 0.05  # relative: more than bfloat16 does, less than one of three records does to the statistics of a batch


def require_row_by_row(
    name: str,
    rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """Raise UserError if leaving out the last of these records moves what rows(images, labels), (B, ...), says of the
    others: a network in training mode, a scale taken from the batch, randomness dealt by position. The records may be
    private: all that can be told of them is that the program is wrong."""
    if len(labels) > 1 and moved(rows(images[:-1], labels[:-1]), rows(images, labels)[:-1], ROUNDING):
        raise UserError(
            f"'{name}': the value of one record depends on another's, so bounding each bounds nothing; every record "
            f"must be treated by itself, for instance by networks in eval mode"
        )


def moved(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Also where there is no telling: nan is within no bound."""
    return not bool((found - expected).norm() <= tolerance * expected.norm() + 1e-12)
