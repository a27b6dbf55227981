"""A wide residual network as a released classifier."""

from pathlib import Path

import torch

from data.spec import DataSpec
from models.nn.wide_resnet import WideResNet
from models.released.classifier import ReleasedClassifier


class WideResNetClassifier(ReleasedClassifier):
    """GroupNorm and standardised weights: no image influences another."""

    kind = "wide_resnet"

    def __init__(self, channels: int, num_classes: int, depth: int, width: int, groups: int) -> None:
        super().__init__()
        self._settings = {"depth": depth, "width": width, "groups": groups}
        self.network = WideResNet(channels, num_classes, depth, width, groups)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def settings(self) -> dict:
        return self._settings

    @classmethod
    def rebuild(
        cls, settings: dict, spec: DataSpec, weights_root: Path, device: str
    ) -> "WideResNetClassifier":
        return cls(spec.channels, spec.num_classes, **settings)
