"""Distances between pixels."""

from pathlib import Path

import torch

from data.spec import DataSpec


class Pixels:
    """The pixels themselves, in [0, 1]."""

    def __init__(self, name: str, spec: DataSpec, weights_root: Path, device: str) -> None:
        self.name = name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255
