"""The one place where uint8 images become network inputs and back, and where grids of samples are made."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import Diverged
from utils.files import atomic

if TYPE_CHECKING:
    import torch


def to_float(images: "np.ndarray | torch.Tensor", device: "str | torch.device" = "cpu") -> "torch.Tensor":
    """(N, C, H, W) uint8 array or tensor -> float32 tensor in [-1, 1] on `device`."""
    import torch

    return (
        torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
        .to(device)
        .to(torch.float32)
        .div_(127.5)
        .sub_(1.0)
    )


def to_uint8(images: "torch.Tensor") -> np.ndarray:
    """(N, C, H, W) float tensor, nominally in [-1, 1] -> uint8 array, rounded and clipped.

    Raises Diverged if a value is NaN or infinite: as a pixel it would look like a valid one.
    """
    import torch

    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        failed = len(finite) - int(finite.sum())
        raise Diverged(f"{failed} of {len(finite)} images of a batch have pixels that are NaN or infinite")
    return images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).byte().cpu().numpy()


def save_grid(
    images: np.ndarray, labels: np.ndarray, path: Path, per_class: int = 8, scale_to: int = 32
) -> None:
    """Write a PNG with one row per class of the first `per_class` images, enlarged to at least `scale_to` pixels.

    images (N, C, H, W) uint8, labels (N,). A class with fewer images leaves blank cells.
    """
    from PIL import Image

    classes = np.unique(labels)[:32]
    _, channels, height, width = images.shape
    factor = max(1, math.ceil(scale_to / height))
    gap = 2
    canvas = np.full(
        (len(classes) * (height * factor + gap), per_class * (width * factor + gap), 3), 255, np.uint8
    )
    for row, label in enumerate(classes):
        for column, image in enumerate(images[labels == label][:per_class]):
            tile = image.repeat(factor, axis=1).repeat(factor, axis=2)
            tile = np.broadcast_to(tile, (3, *tile.shape[1:])) if channels == 1 else tile
            top, left = row * (height * factor + gap), column * (width * factor + gap)
            canvas[top : top + height * factor, left : left + width * factor] = tile.transpose(1, 2, 0)
    with atomic(path) as temporary:
        Image.fromarray(canvas).save(temporary)
