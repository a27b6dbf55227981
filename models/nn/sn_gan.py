"""Generator and critic of GS-WGAN (Chen et al. 2020), on images in [0, 1].

Spectral norm is written out, one power iteration per call, so that many networks can compute as one (nn/stack.py).
Legend: B batch, C channels, H W pixels, Z noise.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = 3  # of either network; each changes the resolution by a factor of 2, unless the image is too small for that
SMALLEST = 4  # pixels that a generator starts from: the borders of its convolutions distinguish positions


class ResNetGenerator(nn.Module):
    """(noise (B, Z), labels (B,)) -> images (B, C, H, W) in [0, 1]. Three upsampling residual blocks, 4 * g_conv_dim
    wide, with pixel norm; images whose size is not a multiple of 8 are cut out of the next larger one. Below 32 pixels
    (not among the published sizes but for 28) only the last blocks upsample."""

    def __init__(self, image_size: int, channels: int, num_classes: int, z_dim: int, g_conv_dim: int) -> None:
        super().__init__()
        width = 4 * g_conv_dim
        self.image_size, self.num_classes, self.z_dim = image_size, num_classes, z_dim
        upsampling = min(BLOCKS, max(0, math.ceil(math.log2(image_size / SMALLEST))))
        self.base = math.ceil(image_size / 2**upsampling)
        self.first = SNLinear(z_dim + num_classes, width * self.base**2)
        self.blocks = nn.ModuleList(_UpBlock(width, BLOCKS - block <= upsampling) for block in range(BLOCKS))
        self.output = SNConv2d(width, channels, 3, padding=1)

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(torch.cat([noise, F.one_hot(labels, self.num_classes).to(noise.dtype)], dim=1))
        h = _pixel_norm(h.unflatten(1, (-1, self.base, self.base)))
        for block in self.blocks:
            h = block(h)
        edge = (h.shape[-1] - self.image_size) // 2
        window = slice(edge, edge + self.image_size)
        return torch.sigmoid(self.output(h))[..., window, window]


class _UpBlock(nn.Module):
    def __init__(self, width: int, upsamples: bool) -> None:
        super().__init__()
        self.scale = 2 if upsamples else 1
        self.conv_in, self.conv_out = (SNConv2d(width, width, 3, padding=1) for _ in range(2))
        self.shortcut = SNConv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(_upsample(F.relu(_pixel_norm(x)), self.scale))
        h = self.conv_out(F.relu(_pixel_norm(h)))
        # A 1x1 convolution and nearest upsampling commute; convolving first is four times cheaper.
        return h + _upsample(self.shortcut(x), self.scale)


class ConvCritic(nn.Module):
    """(images (B, C, H, W) in [0, 1], labels (B,)) -> scores (B,): three 5x5 convolutions of stride 2, d_conv_dim,
    twice and four times as wide; a linear score plus <embedding of the label, features>."""

    def __init__(self, image_size: int, channels: int, num_classes: int, d_conv_dim: int) -> None:
        super().__init__()
        widths = [channels, *(d_conv_dim * 2**i for i in range(BLOCKS))]
        self.convolutions = nn.ModuleList(
            SNConv2d(before, after, 5, stride=2, padding=2) for before, after in pairwise(widths)
        )
        features = widths[-1] * math.ceil(image_size / 2**BLOCKS) ** 2
        self.score = SNLinear(features, 1)
        self.embedding = SNEmbedding(num_classes, features)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = images
        for convolution in self.convolutions:
            h = F.leaky_relu(convolution(h), 0.2)
        h = h.flatten(1)
        return self.score(h).squeeze(1) + (self.embedding(labels) * h).sum(1)


class _SpectralNorm(nn.Module):
    """Mixed into a layer: its weight over its largest singular value, followed by one power iteration per call in
    training (Miyato et al. 2018, arXiv:1802.05957)."""

    def _prepare(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("left", F.normalize(torch.randn(self.weight.shape[0]), dim=0))

    def normalised_weight(self) -> torch.Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            right = F.normalize(matrix.t() @ self.left, dim=0)
            left = F.normalize(matrix @ right, dim=0)
            if self.training:
                self.left.copy_(left)
        return self.weight / (left @ (matrix @ right))


class SNConv2d(_SpectralNorm, nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.normalised_weight(), self.bias)


class SNLinear(_SpectralNorm, nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.normalised_weight(), self.bias)


class SNEmbedding(_SpectralNorm, nn.Embedding):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return F.embedding(labels, self.normalised_weight())


def _pixel_norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def _upsample(x: torch.Tensor, scale: int) -> torch.Tensor:
    return x if scale == 1 else F.interpolate(x, scale_factor=scale)
