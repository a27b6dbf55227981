"""Many networks of one layout, each with weights of its own, computed as one program.

Legend: S networks.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.func import functional_call, vmap


class Stack:
    """S networks: called with (S, ...) tensors, one slice for each; its parameters and buffers are (S, ...) too.

    Of vmap, grouped convolutions and matrix products on unfolded images none was faster throughout; vmap takes the
    network as it is written.
    """

    def __init__(self, network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.network = network.requires_grad_(False)  # the layout; its own weights are not used
        names = dict(network.named_parameters())
        self.weights = {key: value.detach().requires_grad_(key in names) for key, value in weights.items()}

    @classmethod
    def copies(cls, network: nn.Module, count: int) -> "Stack":
        """`count` networks that start as copies of one."""
        state = network.state_dict()
        return cls(network, {key: value.repeat(count, *[1] * value.dim()) for key, value in state.items()})

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return vmap(lambda weights, *rows: functional_call(self.network, weights, rows), randomness="error")(
            self.weights, *inputs
        )

    def parameters(self) -> list[torch.Tensor]:
        return [value for value in self.weights.values() if value.requires_grad]

    def part(self, start: int, stop: int) -> "Stack":
        """Copies of the networks start .. stop - 1."""
        return Stack(self.network, {key: value[start:stop].clone() for key, value in self.weights.items()})

    def put(self, start: int, other: "Stack") -> None:
        """Overwrite the networks from `start` on by those of `other`."""
        with torch.no_grad():
            for key, value in other.weights.items():
                self.weights[key][start : start + len(value)] = value

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The state of each network."""
        count = len(next(iter(self.weights.values())))
        return ({key: value[i].detach() for key, value in self.weights.items()} for i in range(count))
