"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on the linear layers of a pretrained network.

Every trained tensor sits in a stock nn.Linear without bias, so per-example gradients need no rule of their own.
Legend: r rank, I and O input and output width of the adapted layer.
"""

import hashlib
from collections.abc import Callable, Collection

import torch
from torch import nn

from utils.errors import UserError


class LoRALinear(nn.Module):
    """y = base(x) + up(down(x)) on any leading axes; `base` is frozen, down (r, I) and up (O, r) train.

    down starts as N(0, 1 / r^2) and up as zero: the adapted layer starts as the one it wraps.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, **place)
        self.up = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        """The base layer with up @ down added to its weight, in place; still frozen."""
        with torch.no_grad():
            self.base.weight += self.up.weight @ self.down.weight
        return self.base


def add_adapters(network: nn.Module, is_selected: Callable[[str], bool], rank: int) -> None:
    """Put an adapter on every nn.Linear of `network` whose name is selected, in place, and freeze all other parameters.

    Parameters that shall train besides (a label embedding) are unfrozen by the caller afterwards. Raises UserError if
    none is selected.
    """
    layers = {name: layer for name, layer in network.named_modules() if type(layer) is nn.Linear}
    selected = [name for name in layers if is_selected(name)]
    if not selected:
        raise UserError(f"LoRA layers: the selection is empty; known: {', '.join(layers) or 'none'}")
    network.requires_grad_(False)
    for name in selected:
        network.set_submodule(name, LoRALinear(layers[name], rank))


def adapters(network: nn.Module) -> dict[str, LoRALinear]:
    """Name -> adapter, for all adapters of the network."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoRALinear)}


def adapter_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the adapters' tensors alone: what a fine-tuned network adds to its pretrained weights."""
    return {key: parameter.detach().clone() for key, parameter in _adapter_parameters(network).items()}


def load_adapter_state(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Take what `adapter_state` gave for a network with the same adapters. Raises UserError if it does not fit."""
    parameters = _adapter_parameters(network)
    expected = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        wrong = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        raise UserError(
            f"LoRA state: '{wrong[0]}' has shape {found.get(wrong[0])}, the network {expected.get(wrong[0])}"
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def base_fingerprint(network: nn.Module, leave_out: Collection[str] = ()) -> str:
    """16 hex digits of a hash of the weights that adapters are made for: the same before adapters are put on a network
    and while they train, another one after they are merged. `leave_out`: names of parameters that train besides."""
    adapted = adapters(network)
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_weights(network.state_dict(), adapted).items()):
        if name not in leave_out:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _base_weights(state: dict[str, torch.Tensor], adapted: Collection[str]) -> dict[str, torch.Tensor]:
    """A network's state without adapters, under the names that it has without them."""
    weights = {}
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        layer, _, part = owner.rpartition(".")
        if layer not in adapted:
            weights[name] = tensor
        elif part == "base":
            weights[f"{layer}.{kind}"] = tensor
    return weights


def merge_adapters(network: nn.Module) -> None:
    """Replace every adapter by its base layer with the adapter added to the weight, in place."""
    for name, adapter in adapters(network).items():
        network.set_submodule(name, adapter.merged())


def _adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{part}.weight": getattr(adapter, part).weight
        for name, adapter in adapters(network).items()
        for part in ("down", "up")
    }
