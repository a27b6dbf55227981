"""Wide residual networks with standardised weights, for training with differential privacy.

GroupNorm and standardised convolutions replace BatchNorm, whose batch statistics DP-SGD forbids (De et al. 2022,
arXiv:2204.13650). Legend: B batch, C channels, H W pixels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opacus_ext.gradients.rules import convolution, pull_back, register_rule

MIN_VARIANCE = 1e-4  # floor of fan-in * variance: a constant filter stays finite
MIN_DEVIATION = 1e-5  # added to the deviation of a filter


class WSConv2d(nn.Conv2d):
    """Convolution with a standardised weight: each output channel's has mean 0, variance 1 / fan-in and a learned gain.

    Weight standardisation (Qiao et al. 2019, arXiv:1903.10520) in the scaled form of De et al. (2022). weight
    (O, I / groups, h, w) trains unstandardised, gain (O,) starts as one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, 0, 0, 0]))

    def standardised_weight(self) -> torch.Tensor:
        """(O, I / groups, h, w), differentiable in `weight` and `gain`."""
        return _scaled(self.weight, self.gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.standardised_weight(), self.bias)


class PlainWSConv2d(nn.Conv2d):
    """Convolution without bias and gain, whose filters have mean 0 and an unbiased deviation of 1, as in Park et al.
    (CVPR 2024)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)

    def standardised_weight(self) -> torch.Tensor:
        """(O, I / groups, h, w), differentiable in `weight`."""
        return _plain(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.standardised_weight(), None)


def _scaled(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    fan_in = weight[0].numel()
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = (variance * fan_in).clamp(min=MIN_VARIANCE).rsqrt() * gain[:, None, None, None]
    return (weight - mean) * scale


def _plain(weight: torch.Tensor) -> torch.Tensor:
    deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True)
    return (weight - mean) / (deviation + MIN_DEVIATION)


def _ws_conv_gradients(module: WSConv2d, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    """Per-example gradients: those of the standardised weight, pulled back to `weight` and `gain`."""
    gradients = convolution(module, x, g, batch)
    weight, gain = pull_back(_scaled, (module.weight, module.gain), gradients["weight"])
    return {**gradients, "weight": weight, "gain": gain}


def _plain_ws_conv_gradients(module: PlainWSConv2d, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    (weight,) = pull_back(_plain, (module.weight,), convolution(module, x, g, batch)["weight"])
    return {"weight": weight}


register_rule(WSConv2d, _ws_conv_gradients)
register_rule(PlainWSConv2d, _plain_ws_conv_gradients)

Convolution = Callable[..., nn.Conv2d]


class WideResNet(nn.Module):
    """WRN-(depth)-(widen) of Zagoruyko & Komodakis (2016): images (B, C, H, W) in [-1, 1] -> logits (B, num_outputs).

    GroupNorm of `groups` groups, or of as many as divide the channels; `conv` makes a convolution.
    """

    def __init__(
        self, channels: int, num_outputs: int, depth: int, widen: int, groups: int = 16,
        conv: Convolution = PlainWSConv2d,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (depth - 4) % 6 == 0, depth
        self.first = conv(channels, 16, 3, padding=1)
        self.blocks = nn.ModuleList()
        width_in = 16
        for width, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for block in range((depth - 4) // 6):
                self.blocks.append(
                    _WideBlock(width_in, width, first_stride if block == 0 else 1, groups, conv)
                )
                width_in = width
        self.norm = _norm(groups, width_in)
        self.num_features = width_in
        self.head = nn.Linear(width_in, num_outputs)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, num_features)."""
        h = self.first(images)
        for block in self.blocks:
            h = block(h)
        return F.relu(self.norm(h)).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class _WideBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; where the width changes, a 1x1 one on the activated input."""

    def __init__(self, width_in: int, width: int, stride: int, groups: int, conv: Convolution) -> None:
        super().__init__()
        self.norm_in, self.norm_out = _norm(groups, width_in), _norm(groups, width)
        self.conv_in = conv(width_in, width, 3, stride=stride, padding=1)
        self.conv_out = conv(width, width, 3, padding=1)
        changes = width_in != width or stride != 1
        self.shortcut = conv(width_in, width, 1, stride=stride) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.norm_in(x))
        h = self.conv_out(F.relu(self.norm_out(self.conv_in(activated))))
        return h + (x if self.shortcut is None else self.shortcut(activated))


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, channels), channels)
