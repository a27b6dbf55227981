"""The pixels themselves as features."""

from pathlib import Path
from typing import TYPE_CHECKING

from data.spec import DataSpec

if TYPE_CHECKING:
    import torch


class PixelExtractor:
    """C * H * W pixels in [0, 1]. It needs no weights."""

    name = "pixels"

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        self.identity = "v1"
        self.info: dict[str, str] = {}
        self.device = device

    @classmethod
    def check(cls, weights_root: Path) -> None:
        """Always available."""

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, None]":
        return images.flatten(1).float() / 255, None
