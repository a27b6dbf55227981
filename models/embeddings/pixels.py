"""Distances between pixels."""

from pathlib import Path

import torch

from data.spec import DataSpec


class Pixels:
    """The pixels themselves, in [0, 1]."""

    name = "pixels"

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        """Nothing to load."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255
