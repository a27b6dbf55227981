"""Per-example gradients by a slow loop of plain autograd, one example at a time."""

import torch
from torch import nn


class Flow(nn.Module):
    """A network from a list of modules and functions, applied in turn."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))

    def forward(self, x, labels):
        for step in self.steps:
            x = step(x, labels) if getattr(step, "takes_labels", False) else step(x)
        return x


def squared_loss(draws: int = 1):
    """The mean over `draws` scalings of each image of the mean squared output."""

    def loss(network, images, labels, rng):
        scales = torch.linspace(0.5, 1.5, draws, dtype=images.dtype).repeat(len(images))
        rows = images.repeat_interleave(draws, 0)
        rows = rows * scales.view(-1, *[1] * (rows.dim() - 1))
        output = network(rows, labels.repeat_interleave(draws))
        return (output + output.square()).flatten(1).mean(1).view(len(images), draws).mean(1)

    return loss


def loop_gradients(network, loss, images, labels):
    """Name -> (B, *shape), by one ordinary backward pass per example."""
    rows = []
    for i in range(len(images)):
        network.zero_grad()
        loss(network, images[i : i + 1], labels[i : i + 1], None).sum().backward()
        rows.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
                for name, p in network.named_parameters()
                if p.requires_grad
            }
        )
    network.zero_grad(set_to_none=True)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def loop_clipped_sum(gradients, bound):
    flat = torch.cat([g.reshape(len(g), -1) for g in gradients.values()], 1)
    weights = (bound / flat.norm(dim=1)).clamp(max=1)
    return {name: torch.einsum("b,b...->...", weights, g) for name, g in gradients.items()}


def relative_error(found, expected) -> float:
    """Of the whole gradient, in the L2 norm."""
    assert found.keys() == expected.keys()
    off = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return (off / sum(g.double().square().sum() for g in expected.values())).sqrt().item()


def norms_of(gradients) -> torch.Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], 1).norm(dim=1)
