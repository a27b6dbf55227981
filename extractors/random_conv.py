"""Features of a small random network: no weights file, no dependency."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.spec import DataSpec
from utils.images import to_float
from utils.seeding import numpy_rng

if TYPE_CHECKING:
    import torch


class RandomConvExtractor:
    """Three fixed random convolutions; means and deviations of 64 channels at full and half resolution: 256 features.

    It needs no weights file and accepts any size. Its values can only be compared with each other.
    """

    name = "random_conv"
    WIDTHS = (32, 64, 64)
    STRIDES = (1, 2, 1)

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        import torch

        self.identity = f"v1, {spec.channels} channels"
        self.info: dict[str, str] = {}
        self.device = device
        rng = numpy_rng(0, "random_conv")
        self._layers = []
        for width_in, width in zip((spec.channels, *self.WIDTHS), self.WIDTHS, strict=False):
            weight = rng.standard_normal((width, width_in, 3, 3)) * np.sqrt(2 / (9 * width_in))
            bias = rng.standard_normal(width) * 0.1
            self._layers.append([torch.tensor(x, dtype=torch.float32, device=device) for x in (weight, bias)])

    @classmethod
    def check(cls, weights_root: Path) -> None:
        """Always available."""

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, None]":
        import torch

        images = to_float(images, self.device)
        halved = torch.nn.functional.avg_pool2d(images, 2, ceil_mode=True)
        return torch.cat([*self._pooled(images), *self._pooled(halved)], dim=1), None

    def _pooled(self, hidden: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """(B, C, H, W) float32 in [-1, 1] -> means and standard deviations over positions, (B, 64) each."""
        import torch

        for (weight, bias), stride in zip(self._layers, self.STRIDES, strict=True):
            hidden = torch.relu(torch.nn.functional.conv2d(hidden, weight, bias, stride=stride, padding=1))
        return hidden.mean(dim=(2, 3)), hidden.std(dim=(2, 3), correction=0)
