"""Features of evaluated images: one pass through an extractor, cached on disk."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cache import PrivateCache
from extractors.extractor import Extractor
from utils.files import atomic
from utils.progress import progress
from utils.runtime import log
from utils.seeding import numpy_rng

# What NumPy raises for a damaged npz file; it depends on where the damage is.
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


class Features(NamedTuple):
    """Features (N, D) float32; class logits (N, K) float32, or None if the extractor has no classes."""

    features: np.ndarray
    logits: np.ndarray | None


def extract(
    extractor: Extractor,
    images: np.ndarray,
    *,
    batch_size: int,
    description: str,
    cache: PrivateCache | None = None,
) -> Features:
    """Features of uint8 images (N, C, H, W), in one pass.

    With `cache` the result is kept there, under a name that depends on the images and the extractor. Features identify
    the exact images, so features of private images, and of images of unknown origin, are as private as the images. An
    unusable cache costs time and a warning, nothing else.
    """
    path = None if cache is None else _cache_path(cache, extractor, images)
    if path is None:
        return _forward(extractor, images, batch_size, description)
    result = _read(path)
    if result is None:
        result = _forward(extractor, images, batch_size, description)
        try:
            _write(path, result)
        except OSError as error:
            log.warning(f"{path}: features are not cached ({error.strerror or error})")
    return result


def in_fixed_order(points: np.ndarray) -> np.ndarray:
    """The rows (N, D) in a fixed pseudo-random order that depends on their values alone, not on the order in which they
    came: for metrics that draw subsets.

    Rows are sorted, then shuffled by a fixed permutation, so that consecutive rows are not alike.
    """
    ordered = np.lexsort(points.T[::-1][-16:])  # rows that are equal in 16 features are copies, or nearly
    return points[ordered[numpy_rng(0, "order of points").permutation(len(points))]]


def _read(path: Path) -> Features | None:
    """The features in `path`; None if there are none, or none that can be read."""
    try:
        with np.load(path) as stored:
            return Features(stored["features"], stored.get("logits"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning(f"{path}: cached features are unreadable, computing them again ({reason})")
        return None


def _forward(extractor: Extractor, images: np.ndarray, batch_size: int, description: str) -> Features:
    import torch

    features, logits = [], []
    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        for start in progress(starts, description, unit="batch"):
            # np.array copies: PyTorch warns about the read-only pages of a memory map.
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(extractor.device)
            batch_features, batch_logits = extractor(batch)
            features.append(batch_features.cpu().numpy())
            logits.append(None if batch_logits is None else batch_logits.cpu().numpy())
    return Features(np.concatenate(features), None if logits[0] is None else np.concatenate(logits))


def _cache_path(cache: PrivateCache, extractor: Extractor, images: np.ndarray) -> Path | None:
    """The file of these features; its name depends on every value of the images, their shape and the extractor's
    weights. None if nothing can be cached."""
    folder = cache.folder
    if folder is None:
        return None
    digest = cache.new_hash()
    digest.update(f"{extractor.identity} {images.shape}".encode())
    for start in range(0, len(images), 1024):
        digest.update(np.ascontiguousarray(images[start : start + 1024]))
    return folder / f"{extractor.name}-{digest.hexdigest()}.npz"


def _write(path: Path, result: Features) -> None:
    arrays = {"features": result.features} | ({} if result.logits is None else {"logits": result.logits})
    with atomic(path, private=True) as temporary:
        np.savez(temporary, **arrays)
