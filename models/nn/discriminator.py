"""Discriminators that DP-SGD can train: no example influences another.

Legend: B batch, C channels, H W pixels, D features of the last block.
"""

import torch
import torch.nn.functional as F
from torch import nn

MAX_GROUPS = 32  # GroupNorm: 32 groups, or one per channel where there are fewer


class Discriminator(nn.Module):
    """The published DPGAN discriminator: (images (B, C, H, W) in [-1, 1], labels (B,)) -> scores (B,).

    BigGAN layout with GroupNorm in place of spectral norm. All blocks are 2 * d_conv_dim wide; one without pooling
    ends a network for 28 px and below, two end one for 32 px; from 64 px on every block halves the image.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int, d_conv_dim: int = 80) -> None:
        super().__init__()
        width = 2 * d_conv_dim
        pools = _pools(image_size)
        self.first = _FirstBlock(channels, width)
        self.blocks = nn.ModuleList(_Block(width, pool) for pool in pools[1:])
        self.head = ProjectionHead(width, num_classes)
        _orthogonal(self)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(images)
        for block in self.blocks:
            h = block(h)
        return self.head(F.relu(h).sum(dim=(2, 3)), labels)


class ProjectionHead(nn.Module):
    """(features (B, D), labels (B,)) -> (B,): a linear score plus <embedding of the label, features>.

    Projection discriminator (Miyato and Koyama 2018, arXiv:1802.05637).
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1)
        self.embedding = nn.Embedding(num_classes, features)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.score(features).squeeze(1) + (self.embedding(labels) * features).sum(1)


class _FirstBlock(nn.Module):
    """conv, norm, ReLU, conv, pool; the shortcut is pooled first. The image itself is not activated."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv_in, self.conv_out = _conv(channels, width, 3), _conv(width, width, 3)
        self.norm, self.shortcut_norm = _norm(width), _norm(channels)
        self.shortcut = _conv(channels, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_out(F.relu(self.norm(self.conv_in(x))))
        return F.avg_pool2d(h, 2) + self.shortcut(self.shortcut_norm(F.avg_pool2d(x, 2)))


class _Block(nn.Module):
    """Twice norm, ReLU, conv; with pooling, a 1x1 convolution of the normalised input is the shortcut."""

    def __init__(self, width: int, pool: bool) -> None:
        super().__init__()
        self.norm_in, self.norm_out = _norm(width), _norm(width)
        self.conv_in, self.conv_out = _conv(width, width, 3), _conv(width, width, 3)
        self.shortcut = nn.Sequential(_norm(width), _conv(width, width, 1)) if pool else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(F.relu(self.norm_in(x)))
        h = self.conv_out(F.relu(self.norm_out(h)))
        return x + h if self.shortcut is None else F.avg_pool2d(self.shortcut(x) + h, 2)


def _pools(image_size: int) -> tuple[bool, ...]:
    """Which blocks halve the image."""
    if image_size < 32:
        return (True, True, False)
    return (True, True, False, False) if image_size < 64 else (True, True, True, True)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(MAX_GROUPS, channels), channels)


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def _orthogonal(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            nn.init.orthogonal_(layer.weight)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.zeros_(layer.bias)
