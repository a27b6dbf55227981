"""Refuse networks in which one example can influence another's gradient."""

import torch
from torch import nn

from opacus_ext.per_example import PerExampleLoss, per_example_gradients
from utils.draws import Draws
from utils.errors import UserError


def validate_independence(
    network: nn.Module, per_example_loss: PerExampleLoss, images: torch.Tensor, labels: torch.Tensor
) -> None:
    """Raise UserError if changing the first of these (public) examples moves the gradients of the others.

    Finds what no list of layers can: batch statistics computed by hand, layouts in which the rows of a layer do not
    belong to one example, a loss that compares examples.
    """
    changed = images.clone()
    changed[0] = -changed[0].flip(-1) + 0.5
    before, after = (
        per_example_gradients(network, per_example_loss, batch, labels, _repeatable(batch))
        for batch in (images, changed)
    )
    for name in before:
        others, moved = before[name][1:], (after[name][1:] - before[name][1:])
        if moved.norm() > 1e-3 * others.norm() + 1e-12:
            raise UserError(
                f"network: the gradient of '{name}' for one example moves when another example changes, so "
                f"per-example clipping bounds nothing; nothing in network or loss may mix the examples of a batch"
            )


def _repeatable(images: torch.Tensor) -> Draws:
    return Draws(b"public".ljust(32), 0, len(images), images.device)
