"""Features of the images that are judged: what a frozen network (extractors/) makes of them, with a cache."""

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

# What NumPy raises for a damaged npz file, by where the damage is.
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


class Features(NamedTuple):
    """Features (N, D) float32; class logits (N, 1008) float32, or None where the extractor has no classes."""

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
    """One pass of uint8 images (N, C, H, W).

    With `cache` the result is kept there, under a name that depends on the images and the extractor. Features tell
    exactly which images they are of, so those of private images, and of images of unknown origin, are as private as
    these. A cache that cannot be used costs time and a warning, no more.
    """
    path = None if cache is None else _place(cache, extractor, images)
    if path is None:
        return _forward(extractor, images, batch_size, description)
    result = _cached(path)
    if result is None:
        result = _forward(extractor, images, batch_size, description)
        try:
            _write(path, result)
        except OSError as error:
            log.warning(f"{path}: features are not kept ({error.strerror or error})")
    return result


def _cached(path: Path) -> Features | None:
    """The features in `path`; None if there are none, or none that can be read."""
    try:
        with np.load(path) as stored:
            return Features(stored["features"], stored.get("logits"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning(f"{path}: kept features cannot be read and are computed again ({reason})")
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


def _place(cache: PrivateCache, extractor: Extractor, images: np.ndarray) -> Path | None:
    """The file of these features: its name changes with any value of the images, their shape and the extractor's
    weights. None if nothing can be kept."""
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
