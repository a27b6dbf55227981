"""The discriminator that sharpens autoencoders: it scores overlapping patches (Isola et al. 2017, arXiv:1611.07004).

It is for public images only. It uses GroupNorm instead of the paper's BatchNorm, so that the score of an image does not
depend on how a batch is spread over processes.
"""

import torch
from torch import nn

WIDTH = 64  # of the first layer; each further one is twice as wide, up to eight times
MOST_HALVINGS = 3  # a logit then sees 70 x 70 pixels


class PatchDiscriminator(nn.Sequential):
    """(B, C, H, W) in [-1, 1] -> (B, 1, h, w) logits, one per patch, high for real ones.

    Images too small for three halvings, which must leave 3 pixels, get fewer.
    """

    def __init__(self, image_size: int, channels: int) -> None:
        halvings = max(n for n in range(1, MOST_HALVINGS + 1) if n == 1 or image_size >> n >= 3)
        layers = [nn.Conv2d(channels, WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = WIDTH
        for stride in [2] * (halvings - 1) + [1]:
            wider = min(2 * width, 8 * WIDTH)
            conv = nn.Conv2d(width, wider, 4, stride, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(32, wider), nn.LeakyReLU(0.2)]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.GroupNorm):
                nn.init.normal_(layer.weight, mean=1.0, std=0.02)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss of the discriminator: (B, 1, h, w) logits each -> (B,) patch means (Lim & Ye 2017, arXiv:1705.02894)."""
    return 0.5 * ((1.0 - real).relu() + (1.0 + fake).relu()).flatten(1).mean(1)


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Loss of the network that generates the fakes: (B, 1, h, w) logits -> (B,)."""
    return -fake.flatten(1).mean(1)
