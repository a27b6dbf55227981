"""EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946): the architecture, and how published weights are loaded."""

import torch
from torch import nn

NUM_CLASSES = 1000  # of ImageNet

# (blocks, kernel size, stride of the first block, expansion, output channels), Tan and Le 2019, table 1; "Lite" has
# no squeeze-and-excitation, and ReLU6 in place of SiLU.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_WIDTH, HEAD_WIDTH = 32, 1280


class SameConv2d(nn.Conv2d):
    """A bias-free convolution with TensorFlow's "same" padding: an odd pixel of padding goes to the bottom right."""

    def __init__(
        self, width_in: int, width_out: int, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(width_in, width_out, kernel_size, stride, groups=groups, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = []
        for size in (images.shape[3], images.shape[2]):  # F.pad takes the last dimension first
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(images, padding) if any(padding) else images)


def _conv(
    width_in: int, width_out: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = SameConv2d(width_in, width_out, kernel_size, stride, groups)
    return [conv, nn.BatchNorm2d(width_out, eps=1e-3)]


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; the input is added if shapes allow (Sandler et al. 2018)."""

    def __init__(self, width_in: int, width_out: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = width_in * expansion
        expand = [] if expansion == 1 else [*_conv(width_in, width), nn.ReLU6()]
        self.layers = nn.Sequential(
            *expand,
            *_conv(width, width, kernel_size, stride, groups=width),
            nn.ReLU6(),
            *_conv(width, width_out),
        )
        self.adds_input = stride == 1 and width_in == width_out

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layers(hidden) if self.adds_input else self.layers(hidden)


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) normalised -> pooled features (B, 1280) and ImageNet logits (B, 1000). Any H and W from 32 on."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, STEM_WIDTH, 3, 2), nn.ReLU6()]
        width = STEM_WIDTH
        for num_blocks, kernel_size, stride, expansion, width_out in STAGES:
            for block in range(num_blocks):
                first = block == 0
                layers.append(
                    InvertedBottleneck(width, width_out, kernel_size, stride if first else 1, expansion)
                )
                width = width_out
        layers += [*_conv(width, HEAD_WIDTH), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(HEAD_WIDTH, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(images).mean(dim=(2, 3))
        return features, self.classifier(features)

    def load_published(self, state: dict[str, torch.Tensor]) -> None:
        """Load the state dict of the package. Its names differ from ours; the order of the layers is the same."""
        self.load_state_dict(dict(zip(self.state_dict(), state.values(), strict=True)))
