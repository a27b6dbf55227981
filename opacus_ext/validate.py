"""Tests of the assumptions on which the sensitivity of DP-SGD rests. They use public images only."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from opacus_ext.gradients.per_example import PerExampleLoss, per_example_gradients, rows_of_layers
from opacus_ext.gradients.rules import refuse_parameters
from opacus_ext.row_by_row import moved
from utils.draws import Draws
from utils.errors import UserError

BATCHES_BETWEEN = 4  # batches of other images between two calls on the same images
EXTREME = 1000.0  # factor on one example, so that weak mixing, or mixing at a large loss only, shows


def validate_independence(
    network: nn.Module, per_example_loss: PerExampleLoss, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, set[int]]:
    """Raise UserError unless network and loss treat every one of these (public) examples by itself.

    Refuses:
    - a change or omission of one example that changes the gradients of the others
    - a parameter whose use cannot be attributed to single examples
    - a network that a forward pass changes
    - a loss whose value depends on earlier batches

    Returns the rows per example of each layer; training must call every layer with the same number.

    Finds what a list of forbidden layers cannot: batch statistics computed by hand, layouts in which the rows of a
    layer do not belong to one example, a loss that compares examples or divides by their number, a weight that is
    used outside its own layer, a buffer that keeps what it has seen. Losses may treat examples of one class alike, so
    `labels` must have equal ones among the first and the last, and different ones.
    """
    refuse_parameters(network)
    with _perturbed(network):
        return _validated_rows(network, per_example_loss, images, labels)


@contextmanager
def _perturbed(network: nn.Module) -> Iterator[None]:
    """Within: every weight is slightly perturbed, because a branch with zero weights hides what happens inside it until
    the first training step."""
    generator = torch.Generator().manual_seed(0)
    kept = [(parameter, parameter.detach().clone()) for parameter in network.parameters()]
    with torch.no_grad():
        for parameter, value in kept:
            width = parameter[0].numel() if parameter.dim() > 1 else 1
            move = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(value + 0.1 / math.sqrt(width) * move)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _validated_rows(
    network: nn.Module, per_example_loss: PerExampleLoss, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, set[int]]:
    state = {name: value.clone() for name, value in _state(network).items()}
    changed, extreme = images.clone(), images.clone()
    changed[0] = -changed[0].flip(-1) + 0.5
    extreme[0] *= EXTREME
    draws = Draws(b"public".ljust(32), 0, len(images), images.device)
    fewer = slice(0, len(images) - 1)
    before, after, beside, without = (
        per_example_gradients(network, per_example_loss, *batch)
        for batch in (
            (images, labels, draws[:]),
            (changed, labels, draws[:]),
            (extreme, labels, draws[:]),
            (images[fewer], labels[fewer], draws[fewer]),
        )
    )
    _require_finite(network, before)
    tolerance = _tolerance(before)
    floors = {}
    if tolerance > EXACT:
        nudged = per_example_gradients(
            network, per_example_loss, _nudged(images, tolerance), labels, draws[:]
        )
        floors = _floors(before, nudged)
    for name, rows in before.items():
        if any(
            moved(found, expected, tolerance, floors.get(name, 0.0))
            for found, expected in (
                (after[name][1:], rows[1:]),
                (beside[name][1:], rows[1:]),
                (without[name], rows[fewer]),
            )
        ):
            raise UserError(
                f"network: the gradient of '{name}' for one example moves when another example changes, so "
                f"per-example clipping bounds nothing; network and loss must not mix the examples of a batch"
            )
    _require_complete(network, per_example_loss, images, labels, draws, before, tolerance)
    for name, value in _state(network).items():
        if not torch.equal(value, state[name]):
            raise UserError(
                f"network: '{name}' is updated during the forward pass and would store examples without noise"
            )
    _require_same_again(network, per_example_loss, images, labels, draws, before, tolerance, floors)
    return rows_of_layers(network, per_example_loss, images, labels, draws[:])


def _require_finite(network: nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """Raise UserError if the network is broken before it has processed a private example."""
    broken = [name for name, value in _state(network).items() if torch.isnan(value).any()]
    if broken:
        found = f"'{broken[0]}' is NaN"
    else:
        broken = [name for name, rows in gradients.items() if not torch.isfinite(rows).all()]
        found = f"the gradient of '{broken[0]}' on random images is NaN or infinite" if broken else ""
    if broken:
        raise UserError(
            f"network: {found} before the first private step; if it was pretrained, the pretraining "
            f"diverged: lower its learning rate or give another checkpoint; else the loss is undefined"
        )


def _require_same_again(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    draws: Draws,
    before: dict[str, torch.Tensor],
    tolerance: float,
    floors: dict[str, float],
) -> None:
    """Raise UserError if other batches in between change the gradients `before` of these examples.

    The loss then keeps state, such as a list or a running mean outside of the network, and the gradient of one example
    depends on earlier examples.
    """
    for call in range(2, BATCHES_BETWEEN + 2):
        per_example_loss(network, images * (EXTREME if call == 2 else 1 / call), labels, draws[:])
    for name, rows in per_example_gradients(network, per_example_loss, images, labels, draws[:]).items():
        if moved(rows, before[name], tolerance, floors.get(name, 0.0)):
            raise UserError(
                f"network: the gradient of '{name}' of the same examples moves from call to call; the loss must not "
                f"keep what it has seen, nor count its calls, and must draw from its rng alone"
            )


def _state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, including those that a checkpoint omits."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


EXACT = 1e-3  # relative: more than rounding to float32 does
ALL_ROUNDING = 0.25  # relative: of a gradient that is more than rounding, rounding moves less


def _tolerance(gradients: dict[str, torch.Tensor]) -> float:
    """Relative tolerance for rounding, in the lowest precision in which the network computes."""
    return max(EXACT, *(8 * torch.finfo(rows.dtype).eps for rows in gradients.values()))


def _nudged(images: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The images, changed by about one unit in the last place of the short type."""
    generator = torch.Generator(device=images.device).manual_seed(1)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images * (1 + tolerance / 8 * noise)


def _floors(gradients: dict[str, torch.Tensor], nudged: dict[str, torch.Tensor]) -> dict[str, float]:
    """Name -> the norm below which a gradient may be all rounding in low precision, for those that are: a nudge of each
    example's own image makes others of them. Such is the bias of an attention's keys, which cancels; its rounding is
    a few thousandths of the largest gradient. A small gradient that is one stays held to `_tolerance`."""
    largest = max(float(rows.norm()) for rows in gradients.values())
    if not math.isfinite(largest):
        return {}
    return {
        name: 1e-2 * largest for name, rows in gradients.items() if moved(nudged[name], rows, ALL_ROUNDING)
    }


def _require_complete(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    draws: Draws,
    gradients: dict[str, torch.Tensor],
    tolerance: float,
) -> None:
    """Raise UserError unless the per-example gradients add up to the ordinary gradient, tensor by tensor."""
    ordinary = _ordinary_gradients(network, per_example_loss(network, images, labels, draws[:]).sum())
    scale = max((g.norm() for g in ordinary.values()), default=0.0)
    for name, rows in gradients.items():
        expected = ordinary.get(name, torch.zeros_like(rows[0]))
        if (rows.sum(0) - expected).norm() > tolerance * (expected.norm() + 1e-2 * scale):
            raise UserError(
                f"network: the per-example gradients of '{name}' do not add up to its gradient; it is used outside "
                f"its own layer's forward (call the layer, not a function on its weight), the module that holds it "
                f"mixes examples, or the gradient rule registered for its layer is wrong"
            )


def _ordinary_gradients(network: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that the loss reaches, by `backward`, which all kinds of checkpointing support."""
    kept = {name: parameter.grad for name, parameter in network.named_parameters()}
    try:
        network.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad.to_dense() for name, p in network.named_parameters() if p.grad is not None}
    finally:
        for name, parameter in network.named_parameters():
            parameter.grad = kept[name]
