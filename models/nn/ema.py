"""Exponential moving average of parameters, by name."""

import torch
from torch import nn


class EMA:
    """Average with decay min(decay, (1 + n) / (10 + n)) after n updates. Parameters only, keyed by name, so that a
    partly frozen network stays aligned. Post-processing of the weights: it costs no privacy."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(network.named_parameters())
        averages = [self.weights[name] for name in parameters]
        torch._foreach_lerp_(averages, list(parameters.values()), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.copy_(self.weights[name])

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        for name, weight in state["weights"].items():
            self.weights[name].copy_(weight)
