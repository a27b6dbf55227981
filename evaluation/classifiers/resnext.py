"""ResNeXt for small images (Xie et al. 2017, arXiv:1611.05431, section 5.3)."""

import torch
from torch import nn

from data.spec import DataSpec
from evaluation.classifiers.resnet import he_normal

CARDINALITY = 8


def build(spec: DataSpec) -> nn.Module:
    """The published network: depth 28, widening 10 for the protocol "cifar"; 29 and 4 for "standard"."""
    depth, widen_factor = (28, 10) if spec.protocol == "cifar" else (29, 4)
    return ResNeXt(depth, widen_factor, spec.channels, spec.num_classes)


class ResNeXt(nn.Module):
    """Three stages of widths 64w, 128w, 256w with (depth - 2) // 9 bottleneck blocks each."""

    def __init__(self, depth: int, widen_factor: int, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)]
        layers.append(nn.ReLU(inplace=True))
        width_in = 64
        for base, first_stride in ((64, 1), (128, 2), (256, 2)):
            width = base * widen_factor
            for block in range((depth - 2) // 9):
                # The grouped convolution is CARDINALITY * base wide, independent of the widening factor.
                inner, stride = CARDINALITY * base, first_stride if block == 0 else 1
                layers.append(Bottleneck(width_in, inner, width, stride))
                width_in = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width_in, num_classes)
        he_normal(self, "fan_in")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # (B, C, H, W) float32 in [-1, 1] -> (B, num_classes)
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    """1x1 reduce, grouped 3x3, 1x1 expand, with a skip."""

    def __init__(self, width_in: int, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=CARDINALITY, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            projection = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.skip = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(hidden) + self.skip(hidden))
