"""The clipped sum of per-example gradients: the one function behind which the speed of DP-SGD lives."""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

# (network, images (B, C, H, W), labels (B,), rng) -> losses (B,); the K noise draws of an example are averaged inside
PerExampleLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


class _Called:
    """Stands in for the network inside a loss: calls it with the parameters that are being differentiated."""

    def __init__(self, network: nn.Module, parameters: dict[str, torch.Tensor]) -> None:
        self._network, self._parameters = network, parameters

    def __call__(self, *args):
        return functional_call(self._network, self._parameters, args)

    def __getattr__(self, name: str):
        return getattr(self._network, name)


def clipped_gradient_sum(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    images: torch.Tensor,
    labels: torch.Tensor,
    max_grad_norm: float,
    rng: torch.Generator,
    chunk_size: int | None = None,
) -> dict[str, torch.Tensor]:
    """Sum over examples of the gradient of each one's own loss, clipped jointly over all trainable tensors.

    Returns name -> tensor, the L2 norm of one example's contribution being at most `max_grad_norm`. An example whose
    gradient is not finite contributes zero. No example: zeros. `chunk_size` examples are differentiated at a time,
    which bounds memory at chunk_size * parameters.
    """
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trainable.items()}
    if not len(labels):
        return total

    def loss_of_one(parameters, image, label):
        called = _Called(network, parameters)
        return per_example_loss(called, image[None], label[None], rng)[0]

    detached = {name: p.detach() for name, p in trainable.items()}
    per_example = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
    size = chunk_size or len(labels)
    for start in range(0, len(labels), size):
        gradients = per_example(detached, images[start : start + size], labels[start : start + size])
        coefficients = clip_coefficients(gradients, max_grad_norm)
        for name, gradient in gradients.items():
            finite = torch.where(torch.isfinite(gradient), gradient, torch.zeros_like(gradient))
            total[name] += torch.tensordot(coefficients, finite, dims=1)
    return total


def clip_coefficients(gradients: dict[str, torch.Tensor], max_grad_norm: float) -> torch.Tensor:
    """(B,) factors min(1, C / norm) of the joint norms of (B, ...) gradients; 0 where a norm is not finite."""
    squares = [
        torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) ** 2 for g in gradients.values()
    ]
    norms = torch.stack(squares).sum(0).sqrt()
    coefficients = (max_grad_norm / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), coefficients, torch.zeros_like(coefficients)).float()
