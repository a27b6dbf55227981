"""Checks of what the sensitivity of DP-SGD rests on, on images that are not private."""

import torch
from torch import nn

from opacus_ext.per_example import PerExampleLoss, clipped_sum, per_example_gradients, rows_of_layers
from utils.draws import Draws
from utils.errors import UserError


def validate_independence(
    network: nn.Module, per_example_loss: PerExampleLoss, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, set[int]]:
    """Raise UserError if changing or leaving out one of these (public) examples moves the gradients of the others, if
    a parameter is used where its gradient cannot be told apart by example, or if looking at examples changes the
    network. Returns the rows per example of each layer, to which training is held.

    Finds what no list of layers can: batch statistics computed by hand, layouts in which the rows of a layer do not
    belong to one example, a loss that compares examples or divides by their number, a weight that is used outside
    its own layer, a buffer that keeps what it has seen.
    """
    state = {name: value.clone() for name, value in network.state_dict().items()}
    changed = images.clone()
    changed[0] = -changed[0].flip(-1) + 0.5
    draws = Draws(b"public".ljust(32), 0, len(images), images.device)
    fewer = slice(0, len(images) - 1)
    before, after, without = (
        per_example_gradients(network, per_example_loss, *batch)
        for batch in (
            (images, labels, draws[:]),
            (changed, labels, draws[:]),
            (images[fewer], labels[fewer], draws[fewer]),
        )
    )
    for name, rows in before.items():
        if _moved(after[name][1:], rows[1:]) or _moved(without[name], rows[fewer]):
            raise UserError(
                f"network: the gradient of '{name}' for one example moves when another example changes, so "
                f"per-example clipping bounds nothing; nothing in network or loss may mix the examples of a batch"
            )
    _require_complete(network, per_example_loss, images, labels, draws, before)
    for name, value in network.state_dict().items():
        if not torch.equal(value, state[name]):
            raise UserError(
                f"network: '{name}' changes when examples are seen, and would keep them without noise"
            )
    return rows_of_layers(network, per_example_loss, images, labels, draws[:])


def _moved(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() > 1e-3 * expected.norm() + 1e-12)


def _require_complete(
    network, per_example_loss, images, labels, draws, gradients: dict[str, torch.Tensor]
) -> None:
    """The per-example gradients must add up to the ordinary one, tensor by tensor."""
    parameters = {name: network.get_parameter(name) for name in gradients}
    loss = per_example_loss(network, images, labels, draws[:]).sum()
    ordinary = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    scale = max(g.norm() for g in ordinary if g is not None)
    for (name, rows), g in zip(gradients.items(), ordinary, strict=True):
        expected = torch.zeros_like(rows[0]) if g is None else g
        if (rows.sum(0) - expected).norm() > 1e-3 * expected.norm() + 1e-5 * scale:
            raise UserError(
                f"network: the per-example gradients of '{name}' do not add up to its gradient; it is used outside "
                f"its own layer's forward (call the layer, not a function on its weight)"
            )


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
