"""The interface of every feature extractor."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data.spec import DataSpec

if TYPE_CHECKING:
    import torch


class Extractor(Protocol):
    """A frozen function of one image: the rest of the batch has no influence on its features.

    `identity` names the exact weights and settings; it is part of the key of cached features. `info` goes into the
    `metric_info` of every value that is computed from the features.
    """

    name: str
    identity: str
    info: dict[str, str]
    device: str

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        """For images of the spec's size and channels. Raises Unavailable like `check`."""

    @classmethod
    def check(cls, weights_root: Path) -> Path | None:
        """The path of the weights file, if there is one. Raises Unavailable with what to install or fetch."""
        ...

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor | None]":
        """uint8 (B, C, H, W) on `device` -> features (B, D) and class logits (B, K), or None without classes."""
        ...
