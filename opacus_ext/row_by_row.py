"""Tests that a function treats every record by itself. Bounding each record's value rests on this.

They use public images only, because whether a run ends with an error must not depend on private images.
"""

from collections.abc import Callable

import torch

from utils.errors import UserError

# Relative: above the rounding of bfloat16, below the effect of one of three records on the statistics of a batch.
ROUNDING = 0.05
NUM_TRIED = {"values": 3, "choices": 16}  # public images on which functions are tried

PerRecord = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images (B, ...), labels (B,) -> (B, ...)


def require_row_by_row(name: str, rows: PerRecord, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise UserError if leaving out one of these public records changes what `rows` returns for the others.

    Finds, for example, networks in training mode, a scale computed from the batch, and randomness by position.
    """
    whole = rows(images, labels)
    if len(whole) != len(labels):
        raise ValueError(f"'{name}': {len(whole)} values for {len(labels)} records")
    for left_out in range(len(labels)):
        kept = torch.arange(len(labels), device=labels.device) != left_out
        if moved(rows(images[kept], labels[kept]), whole[kept], ROUNDING):
            raise mixing_error(name)


def require_same_choices(name: str, choices: PerRecord, images: torch.Tensor, labels: torch.Tensor) -> None:
    """`require_row_by_row` for votes and ballots, which change completely or not at all.

    Raise UserError if the choices of half of these public records change when the other half become copies of the
    brightest or the darkest one.
    """
    expected, places = choices(images, labels), torch.arange(len(labels), device=labels.device)
    brightness = images.flatten(1).sum(1)
    for changed in (places < len(places) // 2, places >= len(places) // 2):
        for extreme in (brightness.argmax(), brightness.argmin()):
            rows = torch.where(changed, extreme, places)
            if not torch.equal(choices(images[rows], labels[rows])[~changed], expected[~changed]):
                raise mixing_error(name)


def mixing_error(name: str) -> UserError:
    return UserError(
        f"'{name}': the value of one record depends on another's, so clipping each record bounds nothing; every record "
        f"must be treated by itself, for example by networks in eval mode"
    )


def moved(found: torch.Tensor, expected: torch.Tensor, tolerance: float, floor: float = 0.0) -> bool:
    """Whether found differs by more than `tolerance` times the norm of `expected` or `floor`, whichever is larger.

    True if either is nan, because then nothing is known.
    """
    return not bool((found - expected).norm() <= tolerance * expected.norm().clamp_min(floor) + 1e-12)
