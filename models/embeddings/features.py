"""Distances between features of a frozen network."""

from pathlib import Path

import torch

from data.spec import DataSpec
from extractors import EXTRACTORS


class Features:
    """The features of the extractor that has the same name."""

    name: str

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        self._extractor = EXTRACTORS.resolve(self.name)(spec, weights_root, device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._extractor(images)[0].float()


class RandomConv(Features):
    name = "random_conv"


class Inception(Features):
    name = "inception"


class Clip(Features):
    name = "clip"


class Dinov2(Features):
    name = "dinov2"
