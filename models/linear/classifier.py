"""The classifier of a linear fit, as a product."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from data.spec import DataSpec
from models.linear.features import FeatureConfig, FeatureMap
from models.released.classifier import ReleasedClassifier


class LinearClassifier(ReleasedClassifier):
    """A linear layer on fixed features; the intercept is the weight of the constant feature."""

    kind = "linear"

    def __init__(self, features: FeatureMap, layer: nn.Linear) -> None:
        super().__init__()
        self.features, self.layer = features, layer
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(self.features(images))

    def settings(self) -> dict:
        return asdict(self.features.config)

    @classmethod
    def rebuild(cls, settings: dict, spec: DataSpec, weights_root: Path, device: str) -> "LinearClassifier":
        features = FeatureMap(FeatureConfig(**settings), spec, weights_root, device)
        return cls(features, nn.Linear(features.num_features, spec.num_classes, bias=False))
