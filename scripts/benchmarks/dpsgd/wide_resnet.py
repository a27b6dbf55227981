"""A critic of the literature that no method of this toolkit uses: a wide residual network with standardised weights.

Legend: B batch, C channels, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.nn.discriminator import ProjectionHead
from opacus_ext.gradients.rules import convolution, pull_back, register_rule

MIN_VARIANCE = 1e-4  # floor of fan-in * variance: a constant filter stays finite


class WSConv2d(nn.Conv2d):
    """Convolution with a standardised weight: each output channel's has mean 0, variance 1 / fan-in and a learned gain.

    Weight standardisation (Qiao et al. 2019, arXiv:1903.10520) in the scaled form of De et al. (2022,
    arXiv:2204.13650): it makes up for the batch statistics that DP-SGD forbids. weight (O, I / groups, h, w) trains
    unstandardised, gain (O,) starts as one.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, 0, 0, 0]))

    def standardised_weight(self) -> torch.Tensor:
        """(O, I / groups, h, w), differentiable in `weight` and `gain`."""
        return _standardise(self.weight, self.gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.standardised_weight(), self.bias)


def _standardise(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    fan_in = weight[0].numel()
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = (variance * fan_in).clamp(min=MIN_VARIANCE).rsqrt() * gain[:, None, None, None]
    return (weight - mean) * scale


def _ws_conv_gradients(module: WSConv2d, x: torch.Tensor, g: torch.Tensor, batch: int) -> dict:
    """Per-example gradients: those of the standardised weight, pulled back to `weight` and `gain`."""
    gradients = convolution(module, x, g, batch)
    weight, gain = pull_back(_standardise, (module.weight, module.gain), gradients["weight"])
    return {**gradients, "weight": weight, "gain": gain}


register_rule(WSConv2d, _ws_conv_gradients)


class WideResNetCritic(nn.Module):
    """WRN-(depth)-(widen): (images (B, C, H, W) in [-1, 1], labels (B,)) -> scores (B,).

    The network of De et al. (2022), GroupNorm of 16 groups and WSConv2d, with a projection head in place of logits.
    """

    GROUPS = 16

    def __init__(self, channels: int, num_classes: int, depth: int = 16, widen: int = 4) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, depth
        self.first = _ws_conv(channels, 16)
        self.blocks = nn.ModuleList()
        width_in = 16
        for width, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for block in range((depth - 4) // 6):
                self.blocks.append(_WideBlock(width_in, width, first_stride if block == 0 else 1))
                width_in = width
        self.norm = nn.GroupNorm(self.GROUPS, width_in)
        self.head = ProjectionHead(width_in, num_classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(images)
        for block in self.blocks:
            h = block(h)
        return self.head(F.relu(self.norm(h)).mean(dim=(2, 3)), labels)


class _WideBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; where the width changes, a 1x1 one on the activated input."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        groups = WideResNetCritic.GROUPS
        self.norm_in, self.norm_out = nn.GroupNorm(groups, width_in), nn.GroupNorm(groups, width)
        self.conv_in, self.conv_out = _ws_conv(width_in, width, stride=stride), _ws_conv(width, width)
        changes = width_in != width or stride != 1
        self.shortcut = _ws_conv(width_in, width, kernel=1, stride=stride) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.norm_in(x))
        h = self.conv_out(F.relu(self.norm_out(self.conv_in(activated))))
        return h + (x if self.shortcut is None else self.shortcut(activated))


def _ws_conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> WSConv2d:
    return WSConv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)
