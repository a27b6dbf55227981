"""What one record does to the clipped sum of DP-SGD, measured."""

import torch
from torch import nn

from opacus_ext.gradients.per_example import PerExampleLoss, clipped_sum
from utils.draws import Draws


def record_influence(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    max_grad_norm: float,
    draws: Draws,
) -> float:
    """How far leaving out one record moves the clipped sum, as a multiple of `max_grad_norm`: the largest of all
    records. Must be at most 1 up to rounding. Each record is tried in last place, so that the others keep their
    draws."""
    moved = []
    for shift in range(len(labels)):
        batch, classes = images.roll(shift, 0), labels.roll(shift, 0)
        last = len(labels) - 1
        whole, _ = clipped_sum(network, per_example_loss, batch, classes, max_grad_norm, draws[: last + 1])
        rest, _ = clipped_sum(
            network, per_example_loss, batch[:last], classes[:last], max_grad_norm, draws[:last]
        )
        moved.append(torch.cat([(whole[name] - rest[name]).flatten() for name in whole]).norm().item())
    return max(moved) / max_grad_norm
