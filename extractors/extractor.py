"""What every feature extractor offers."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Extractor(Protocol):
    """A frozen network. `identity` says which weights: it is part of the key of cached features."""

    name: str
    identity: str
    info: dict[str, str]
    device: str

    @classmethod
    def check(cls, weights_root: Path) -> Path | None:
        """Where its weights are; raises Unavailable with what to install or fetch."""
        ...

    def __call__(self, images: "torch.Tensor") -> tuple:
        """uint8 (B, C, H, W) on `device` -> features (B, D), logits (B, 1008) or None."""
        ...
