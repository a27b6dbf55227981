"""A critic of the literature that no method of this toolkit uses: a wide residual network with a projection head."""

import torch

from models.nn.discriminator import ProjectionHead
from models.nn.wide_resnet import WideResNet, WSConv2d


class WideResNetCritic(WideResNet):
    """WRN-(depth)-(widen): (images (B, C, H, W) in [-1, 1], labels (B,)) -> scores (B,).

    The network of De et al. (2022, arXiv:2204.13650), GroupNorm of 16 groups and WSConv2d, with a projection head in
    place of logits.
    """

    def __init__(self, channels: int, num_classes: int, depth: int = 16, widen: int = 4) -> None:
        super().__init__(channels, num_classes, depth, widen, conv=WSConv2d)
        self.head = ProjectionHead(self.num_features, num_classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images), labels)
