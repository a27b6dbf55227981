"""Small changes of position, size and direction that leave the class of an image as it is."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.sections import check_field


@dataclass(frozen=True)
class AugmentConfig:
    shift: float  # share of the side, in each direction, at most
    rotation: float  # degrees to each side, at most
    zoom: float  # share by which the size changes, at most
    flip: bool  # also the mirror image; wrong for characters

    def __post_init__(self) -> None:
        for field, most in (("shift", 0.5), ("rotation", 180.0), ("zoom", 0.5)):
            value = getattr(self, field)
            check_field(0 <= value <= most, field, value, f"from 0 to {most:g}")


def augmented(
    images: torch.Tensor, config: AugmentConfig, strength: float, rng: torch.Generator
) -> torch.Tensor:
    """(B, C, H, W), each image moved by a random amount of up to `strength` times the values of `config`. Outside of an
    image its border continues. Differentiable in the images."""

    def uniform() -> torch.Tensor:
        return 2 * torch.rand(len(images), generator=rng, device=images.device) - 1

    angle = uniform() * math.radians(config.rotation) * strength
    scale = 1 + uniform() * config.zoom * strength
    right, down = (2 * config.shift * strength * uniform() for _ in range(2))  # a side is 2 long
    side = uniform().sign() if config.flip else torch.ones_like(scale)
    first = torch.stack([side * scale * angle.cos(), -scale * angle.sin(), right], 1)
    second = torch.stack([side * scale * angle.sin(), scale * angle.cos(), down], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
