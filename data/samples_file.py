"""Samples on disk: one npz with `x` (N, C, H, W) uint8 and `y` (N,) int64."""

import zipfile
from pathlib import Path

import numpy as np

from data.spec import Samples
from utils.errors import UserError
from utils.files import atomic


def write_samples(path: Path, samples: Samples) -> None:
    with atomic(path) as temporary:
        np.savez_compressed(temporary, x=samples.images, y=samples.labels)


def read_samples(path: Path) -> Samples:
    """Raises UserError naming the file if it does not hold such samples."""
    try:
        with np.load(path, allow_pickle=False) as content:
            images, labels = content["x"], content["y"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a file of samples with arrays x and y ({error})") from error
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != (len(images),):
        raise UserError(
            f"{path}: x is {images.dtype} {images.shape} and y {labels.shape}; x must be uint8 (N, C, H, W) and y (N,)"
        )
    return Samples(images, labels.astype(np.int64))
