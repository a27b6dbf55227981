"""Random crops, mirror images and cutout of single images, addressed by position.

Legend: B batch, C channels, H W pixels.
"""

import torch
import torch.nn.functional as F

from utils.draws import Draws


def shifted(images: torch.Tensor, uniform: torch.Tensor, pad: int, mode: str) -> torch.Tensor:
    """(B, C, H, W) padded by `pad` pixels (F.pad's `mode`) and cropped at the place that `uniform` (B, 2) chooses."""
    if pad == 0:
        return images
    size = images.shape[-1]
    padded = F.pad(images, (pad,) * 4, mode=mode)
    top, left = (uniform * (2 * pad + 1)).long().clamp(max=2 * pad).unbind(1)
    rows = torch.arange(len(images), device=images.device)
    return padded.unfold(2, size, 1).unfold(3, size, 1)[rows, :, top, left]


def mirrored(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Each of (B, C, H, W) mirrored from left to right if its `uniform` (B,) is below a half."""
    return torch.where(uniform[:, None, None, None] < 0.5, images.flip(-1), images)


def cut_out(images: torch.Tensor, uniform: torch.Tensor, size: int) -> torch.Tensor:
    """Half of (B, C, H, W) with a square of `size` pixels set to 0 (DeVries & Taylor 2017, arXiv:1708.04552). Its
    centre is uniform, so it may reach over the edge. `uniform` (B, 3)."""
    if size == 0:
        return images
    pixels = torch.arange(images.shape[-1], device=images.device)
    centre = (uniform[:, :2] * images.shape[-1]).floor()
    inside = [
        (pixels >= c[:, None] - size // 2) & (pixels < c[:, None] - size // 2 + size)
        for c in centre.unbind(1)
    ]
    square = inside[0][:, :, None] & inside[1][:, None, :] & (uniform[:, 2] < 0.5)[:, None, None]
    return images.masked_fill(square[:, None], 0.0)


def several_views(images: torch.Tensor, rng: Draws, count: int, pad: int, flip: bool) -> torch.Tensor:
    """(B * count, C, H, W): `count` augmented copies of each image, next to each other."""
    places, sides = rng.uniform(count, 2), rng.uniform(count)
    views = shifted(images.repeat_interleave(count, dim=0), places.flatten(0, 1), pad, "reflect")
    return mirrored(views, sides.flatten()) if flip else views
