"""Public pretraining on few images: augmentations that do not leak into the samples, and dropout.

Every image is flipped, scaled, rotated, stretched and shifted at random, and the network gets a description of this
as input (Karras et al. 2022, arXiv:2206.00364, appendix F.2). Samples are drawn for "not augmented". Without this a
diffusion network copies a few thousand images. Images are resampled bilinearly here; the published code filters with
wavelets.
Legend: B batch, C channels, H W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data.spec import Samples
from models.diffusion.config import ModelConfig
from models.diffusion.loss import EDMLoss
from models.diffusion.public_pretraining import PublicPretraining, PublicStageConfig
from utils.draws import Draws
from utils.images import to_float
from utils.sections import GenConfig, check_field

NUM_LABELS = 9  # flips (2), scale, rotation (2), stretch (2), shift (2)
SCALE, SHIFT = 0.2, 0.125  # deviations of log2 of the scale, and of the shift in widths


@dataclass(frozen=True)
class AugmentConfig:
    probability: float  # of each augmentation of an image; 0: none
    dropout: float  # share of inner features that training sets to 0

    def __post_init__(self) -> None:
        for field in ("probability", "dropout"):
            check_field(0 <= getattr(self, field) < 1, field, getattr(self, field), "in [0, 1)")


class AugmentedPretraining(PublicPretraining):
    """`PublicPretraining` of a network that knows how its images were augmented."""

    @dataclass(frozen=True)
    class Config:
        model: ModelConfig
        pretrain: PublicStageConfig
        gen: GenConfig
        augment: AugmentConfig

    def _build_network(self, label_dim: int) -> nn.Module:
        return self.config.model.network.make(label_dim, self.config.augment.dropout, NUM_LABELS)

    def _draw(self, network: nn.Module, *arguments: object) -> torch.Tensor:
        return super()._draw(network.eval(), *arguments)  # without dropout

    def _public_loss(self, loss: EDMLoss, batch: Samples, rng: Draws, flip: bool = False) -> torch.Tensor:
        images = to_float(batch.images, self.runtime.device)
        images, described = augmented(images, rng, self.config.augment.probability, flip)
        labels = torch.from_numpy(batch.labels).to(self.runtime.device)
        self.network.train()
        with self.runtime.seeded(f"dropout {self.step}"):
            return loss(_Described(self.network, described), images, labels, rng).sum()


class _Described:
    """The network for images that were augmented as `described` (B, NUM_LABELS) says; each may occur several times."""

    def __init__(self, network: nn.Module, described: torch.Tensor) -> None:
        self.network, self.described, self.null_label = network, described, network.null_label

    def __call__(self, images: torch.Tensor, condition: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        repeats = len(images) // len(self.described)
        return self.network(images, condition, labels, self.described.repeat_interleave(repeats, dim=0))


def augmented(
    images: torch.Tensor, rng: Draws, probability: float, flip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, H, W) -> the images after random augmentations, and (B, NUM_LABELS) what was done to each.

    Each augmentation happens with `probability`. With `flip` every other image is mirrored from left to right as well,
    and an image is turned upside down with half of `probability`; without it neither happens.
    """
    chance = rng.uniform(5)  # upside down, scale, rotation, stretch, shift
    chosen = (chance < probability).float()
    mirrored = (rng.uniform() < 0.5).float() * flip
    upside_down = (chance[:, 0] < probability / 2).float() * flip
    normal, turned = rng.normal(4), rng.uniform(2)
    scale, stretch = SCALE * normal[:, 0] * chosen[:, 1], SCALE * normal[:, 1] * chosen[:, 3]
    angle = (2 * turned[:, 0] - 1) * math.pi * chosen[:, 2]
    axis = (2 * turned[:, 1] - 1) * math.pi
    shift = SHIFT * normal[:, 2:] * chosen[:, 4:]
    flips = torch.stack([1 - 2 * mirrored, 1 - 2 * upside_down], 1)
    # From the pixels of the result back to those of the image.
    matrix = torch.diag_embed(flips) @ _rotation(-angle) @ _rotation(axis)
    matrix = matrix @ torch.diag_embed(torch.stack([-stretch, stretch], 1).exp2()) @ _rotation(-axis)
    matrix = matrix * (-scale).exp2()[:, None, None]
    theta = torch.cat([matrix, -2 * (matrix @ shift[:, :, None])], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    described = [
        mirrored, upside_down, scale / SCALE, angle.cos() - 1, angle.sin(),
        stretch / SCALE * axis.cos(), stretch / SCALE * axis.sin(), *(shift / SHIFT).unbind(1),
    ]  # fmt: skip
    return moved, torch.stack(described, 1)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """(B,) radians -> (B, 2, 2)."""
    rows = (angle.cos(), -angle.sin()), (angle.sin(), angle.cos())
    return torch.stack([torch.stack(row, 1) for row in rows], 1)
