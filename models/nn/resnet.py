"""Classifiers behind the semantic query; trained on public data only, so BatchNorm is welcome."""

import torch
import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.body = nn.Sequential(
            *_conv_norm(in_channels, width, 1, 1),
            nn.ReLU(),
            *_conv_norm(width, width, 3, stride),
            nn.ReLU(),
            *_conv_norm(width, out_channels, 1, 1),
        )
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_conv_norm(in_channels, out_channels, 1, stride))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50(channels: int, num_classes: int) -> nn.Module:
    """ResNet-50 for 32-px images: 3x3 stem without pooling (He et al. 2016, CIFAR variant)."""
    layers: list[nn.Module] = [*_conv_norm(channels, 64, 3, 1), nn.ReLU()]
    in_channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(in_channels, width, stride if block == 0 else 1))
            in_channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


def small_cnn(channels: int, num_classes: int) -> nn.Module:
    """Three convolutions: seconds on a CPU, for small pictures."""
    return nn.Sequential(
        *_conv_norm(channels, 32, 3, 1),
        nn.ReLU(),
        *_conv_norm(32, 64, 3, 2),
        nn.ReLU(),
        *_conv_norm(64, 128, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(512, num_classes),
    )


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


CLASSIFIERS = {"resnet50": resnet50, "small_cnn": small_cnn}
