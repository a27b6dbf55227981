"""Checks that a function treats every record by itself, which is what bounding each record's value rests on.

They look at images that are public: whether a run ends with an error must tell nothing of the private ones.
"""

from collections.abc import Callable

import torch

from utils.errors import UserError

ROUNDING = 0.05  # relative: more than bfloat16 does, less than one of three records does to the statistics of a batch

PerRecord = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images (B, ...), labels (B,) -> (B, ...)


def require_row_by_row(name: str, rows: PerRecord, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise UserError if leaving out one of these public records moves what `rows` says of the others: a network in
    training mode, a scale taken from the batch, randomness dealt by position."""
    whole = rows(images, labels)
    if len(whole) != len(labels):
        raise ValueError(f"'{name}': {len(whole)} values for {len(labels)} records")
    for left_out in range(len(labels)):
        kept = torch.arange(len(labels), device=labels.device) != left_out
        if moved(rows(images[kept], labels[kept]), whole[kept], ROUNDING):
            raise mixing(name)


def require_same_choices(name: str, choices: PerRecord, images: torch.Tensor, labels: torch.Tensor) -> None:
    """`require_row_by_row` for votes and ballots, which move all at once or not at all: raise UserError if those of
    half of these public records change when all of the other half become copies of the brightest or the darkest."""
    expected, places = choices(images, labels), torch.arange(len(labels), device=labels.device)
    brightness = images.flatten(1).sum(1)
    for changed in (places < len(places) // 2, places >= len(places) // 2):
        for extreme in (brightness.argmax(), brightness.argmin()):
            rows = torch.where(changed, extreme, places)
            if not torch.equal(choices(images[rows], labels[rows])[~changed], expected[~changed]):
                raise mixing(name)


def mixing(name: str) -> UserError:
    return UserError(
        f"'{name}': the value of one record depends on another's, so bounding each bounds nothing; every record "
        f"must be treated by itself, for instance by networks in eval mode"
    )


def moved(found: torch.Tensor, expected: torch.Tensor, tolerance: float, floor: float = 0.0) -> bool:
    """By more than `tolerance` times the norm of `expected` or `floor`, whichever is larger. Also where there is no
    telling: nan is within no bound."""
    return not bool((found - expected).norm() <= tolerance * expected.norm().clamp_min(floor) + 1e-12)
