"""Distances between features of a frozen network."""

from pathlib import Path

import torch

from data.spec import DataSpec
from extractors import EXTRACTORS


class Features:
    """The features of the extractor that has the same name."""

    def __init__(self, name: str, spec: DataSpec, weights_root: Path, device: str) -> None:
        self.name = name
        self._extractor = EXTRACTORS.resolve(name)(spec, weights_root, device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._extractor(images)[0].float()
