"""Wide ResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146)."""

import torch
from torch import nn

from data.spec import DataSpec
from evaluation.classifiers.resnet import he_normal

DROPOUT = 0.3


def build(spec: DataSpec) -> nn.Module:
    """The published network: WRN 28-10 for the protocol "cifar", WRN 40-4 for "standard"."""
    depth, widen_factor = (28, 10) if spec.protocol == "cifar" else (40, 4)
    return WideResNet(depth, widen_factor, spec.channels, spec.num_classes)


class WideResNet(nn.Module):
    """Three stages of widths 16w, 32w, 64w with (depth - 4) / 6 pre-activation blocks each."""

    def __init__(self, depth: int, widen_factor: int, channels: int, num_classes: int) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, depth
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
        width_in = 16
        for width, first_stride in ((16, 1), (32, 2), (64, 2)):
            for block in range((depth - 4) // 6):
                layers.append(WideBlock(width_in, width * widen_factor, first_stride if block == 0 else 1))
                width_in = width * widen_factor
        layers += [nn.BatchNorm2d(width_in), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width_in, num_classes)
        he_normal(self, "fan_out")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # (B, C, H, W) float32 in [-1, 1] -> (B, num_classes)
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions, dropout between them.

    If the width changes, the 1x1 skip takes the activated input, like the authors' code.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(width_in), nn.ReLU(inplace=False))
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        same_shape = stride == 1 and width_in == width
        self.skip = None if same_shape else nn.Conv2d(width_in, width, 1, stride=stride, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        activated = self.activation(hidden)
        skipped = hidden if self.skip is None else self.skip(activated)
        return skipped + self.residual(activated)
