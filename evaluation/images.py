"""Labelled images from anywhere in the form of a dataset: npz, class folders, flat <class>_<rest> files, zip or tar."""

import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from data.registry import SourceQuirks
from data.sources import ArrayPart, Part, open_source, sizes_note
from data.spec import DataSpec, Samples
from utils.errors import UserError
from utils.progress import progress

# Names of images and labels in an npz: this toolkit's, the usual ones, and those of arrays without a name.
NPZ_KEYS = (("x", "y"), ("images", "labels"), ("arr_0", "arr_1"))
COLOURS = {1: "grey", 3: "colour"}
WEIGHTS = {1: " (0.299 red + 0.587 green + 0.114 blue)", 3: ""}


def read_images(path: Path, spec: DataSpec) -> tuple[Samples, tuple[str, ...]]:
    """The images at `path` as samples of `spec`, and lines that say how they were changed and which class is absent.

    Images of another size are cropped to the central square and resized (Lanczos); colour becomes grey (ITU-R 601-2),
    or grey colour. UserError names the file or the index of what cannot be judged: an unreadable file, a label that
    is no class, a pixel out of range or NaN.
    """
    if (path / "gen" / "gen.npz").exists():
        raise UserError(
            f"--images: {path} is the folder of a run; give --exp_path {path}, or its gen/gen.npz"
        )
    part = _read_npz(path) if path.suffix == ".npz" else open_source(path, SourceQuirks(one_class=True)).train
    labels = _as_labels(part.labels, spec, path)
    images, notes = _converted(part, spec, path)
    if images.max() <= 1:
        notes.append(f"{path}: no pixel is above 1 of 255; images of 0 to 1 must be floats")
    counts = np.bincount(labels, minlength=spec.num_classes)
    if not counts.all():
        absent = ", ".join(spec.class_names[label] for label in np.flatnonzero(counts == 0))
        notes.append(f"{path}: no image of class {absent}; classifiers learn the other classes only")
    return Samples(images, labels), tuple(notes)


def _converted(part: Part, spec: DataSpec, path: Path) -> tuple[np.ndarray, list[str]]:
    """(N, C, H, W) uint8 in the form of `spec`, and what was changed."""
    channels = part.first_shape()[2]
    images, sizes = np.empty((len(part), *spec.image_shape), np.uint8), Counter()
    for row, item in progress(part.items(), f"read {path.name}", total=len(part), unit="image"):
        images[row], size = part.convert(item, spec.resolution, spec.channels)
        sizes[size] += 1
    notes = [sizes_note(sizes, spec.resolution)]
    if channels != spec.channels:
        to = COLOURS[spec.channels] + WEIGHTS[spec.channels]
        notes.append(f"{COLOURS[channels]} images are converted to {to}")
    return images, [f"{path}: {note}" for note in notes if note is not None]


def _read_npz(path: Path) -> ArrayPart:
    """Images and labels of one npz; uint8, or floats in [0, 1], as (N, H, W), (N, C, H, W) or (N, H, W, C)."""
    try:
        with np.load(path, allow_pickle=False) as content:
            pairs = [pair for pair in NPZ_KEYS if set(pair) <= set(content.files)]
            if not pairs:
                known = " or ".join(" and ".join(pair) for pair in NPZ_KEYS)
                raise UserError(f"{path}: holds {', '.join(content.files) or 'nothing'}; needed are {known}")
            images, labels = (content[key] for key in pairs[0])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: truncated, corrupt or not an npz of plain arrays ({error})") from error
    if len(images) != labels.size:
        raise UserError(f"{path}: {labels.size:,} labels for {len(images):,} images; give one per image")
    if len(images) == 0:
        raise UserError(f"{path}: there are no images in it")
    return ArrayPart(_as_nhwc(_as_uint8(images, path), path), labels.reshape(-1))


def _as_uint8(images: np.ndarray, path: Path) -> np.ndarray:
    """uint8 as they are, floats in [0, 1] times 255."""
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{path}: images are {images.dtype}; allowed are uint8, or floats in [0, 1]")
    for index, image in enumerate(images):
        least, most = image.min(), image.max()  # both NaN if any value is
        if np.isnan(least):
            raise UserError(f"{path}: image {index} has a value that is NaN; floats must be in [0, 1]")
        if least < 0 or most > 1:
            raise UserError(
                f"{path}: image {index} has values from {least:.4g} to {most:.4g}; floats must be in [0, 1], "
                f"values up to 255 be uint8"
            )
    return np.round(images * 255).astype(np.uint8)


def _as_nhwc(images: np.ndarray, path: Path) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3); the channel axis is the one of size 1 or 3, the second before the last."""
    if images.ndim == 3:
        return images
    if images.ndim == 4 and images.shape[1] in COLOURS:
        return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] in COLOURS:
        return images[..., 0] if images.shape[3] == 1 else images
    raise UserError(
        f"{path}: images are {images.shape}; allowed: (N, H, W), (N, C, H, W) or (N, H, W, C), C 1 or 3"
    )


def _as_labels(labels: np.ndarray, spec: DataSpec, path: Path) -> np.ndarray:
    """Class names, or integers from 0, as int64 labels."""
    if labels.dtype.kind == "U":
        return _numbers_of(labels, spec, path)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: labels are {labels.dtype}; allowed are integers")
    wrong = np.flatnonzero((labels < 0) | (labels >= spec.num_classes))
    if len(wrong):
        raise UserError(
            f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}; allowed are 0 to {spec.num_classes - 1}"
        )
    return labels.astype(np.int64)


def _numbers_of(names: np.ndarray, spec: DataSpec, path: Path) -> np.ndarray:
    """Labels of folders or files that are named like classes, or else like the numbers of classes."""
    numbers = {str(label): label for label in range(spec.num_classes)}
    found, inverse = np.unique(names, return_inverse=True)
    by_name = {name: label for label, name in enumerate(spec.class_names)}
    table = by_name if set(found) <= set(by_name) else numbers
    unknown = [name for name in found if name not in table]
    if unknown:
        raise UserError(
            f"{path}: '{unknown[0]}' is no class of {spec.name}; allowed are {', '.join(spec.class_names[:20])}, "
            f"or 0 to {spec.num_classes - 1}"
        )
    return np.array([table[name] for name in found], np.int64)[inverse]
