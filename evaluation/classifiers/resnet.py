"""ResNet with basic blocks for small images (He et al. 2016, arXiv:1512.03385, section 4.2)."""

import torch
from torch import nn

from data.spec import DataSpec


def build(spec: DataSpec) -> nn.Module:
    """The published network: depth 164 for the protocol "cifar", 110 for "standard"."""
    depth = 164 if spec.protocol == "cifar" else 110
    return ResNet(depth, spec.channels, spec.num_classes)


class ResNet(nn.Module):
    """Three stages of widths 16, 32, 64 with (depth - 2) / 6 basic blocks each, then global average pooling."""

    def __init__(self, depth: int, channels: int, num_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, depth
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
        layers.append(nn.ReLU(inplace=True))
        width_in = 16
        for width, first_stride in ((16, 1), (32, 2), (64, 2)):
            for block in range((depth - 2) // 6):
                layers.append(BasicBlock(width_in, width, first_stride if block == 0 else 1))
                width_in = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(64, num_classes)
        he_normal(self, "fan_out")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # (B, C, H, W) float32 in [-1, 1] -> (B, num_classes)
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a skip, which is a strided 1x1 convolution if the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            projection = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.skip = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(hidden) + self.skip(hidden))


def he_normal(network: nn.Module, mode: str) -> None:
    """Draw the weights of every convolution from a normal of variance 2 / fan (He et al. 2015, arXiv:1502.01852).

    `mode` is "fan_in" or "fan_out"; other layers keep PyTorch's defaults.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
