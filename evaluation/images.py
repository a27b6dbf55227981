"""Labelled images from anywhere in the form of a dataset: npz, class folders, flat <class>_<rest> files, zip or tar."""

from collections import Counter
from pathlib import Path

import numpy as np

from data.convert import conversion_notes
from data.labels import places_of
from data.readers.layouts import open_source
from data.readers.source import Part
from data.registry import SourceQuirks
from data.spec import DataSpec, Samples
from utils.errors import UserError
from utils.progress import progress


def read_images(path: Path, spec: DataSpec) -> tuple[Samples, tuple[str, ...]]:
    """The images at `path` as samples of `spec`, and lines that report how they were changed and which class is absent.

    Images of another size are cropped to the central square and resized (Lanczos). Colour images are converted to grey
    (ITU-R 601-2), or grey images to colour. UserError names the file or index of an image that cannot be evaluated:
    an unreadable file, a label that is no class, a pixel out of range or NaN.
    """
    if (path / "gen" / "gen.npz").exists():
        raise UserError(
            f"--images: {path} is the folder of a run; give --exp_path {path}, or its gen/gen.npz"
        )
    source = open_source(path, SourceQuirks(one_class=True))
    if source.test is not None:
        raise UserError(f"--images: {path} has a training part and a test part; give one of them alone")
    labels = _as_labels(source.train.labels, spec, path)
    images, notes = _converted(source.train, spec, path)
    notes += source.notes
    if images.max() <= 1:
        notes.append(f"{path}: no pixel is above 1 of 255; images of 0 to 1 must be floats")
    counts = np.bincount(labels, minlength=spec.num_classes)
    if not counts.all():
        absent = ", ".join(spec.class_names[label] for label in np.flatnonzero(counts == 0))
        notes.append(f"{path}: no image of class {absent}; classifiers learn the other classes only")
    return Samples(images, labels), tuple(notes)


def _converted(part: Part, spec: DataSpec, path: Path) -> tuple[np.ndarray, list[str]]:
    """(N, C, H, W) uint8 in the form of `spec`, and what was changed."""
    images, forms = np.empty((len(part), *spec.image_shape), np.uint8), Counter()
    for row, item in progress(part.items(), f"read {path.name}", total=len(part), unit="image"):
        images[row], form = part.convert(item, spec.resolution, spec.channels)
        forms[form] += 1
    notes = conversion_notes(forms, spec.resolution, spec.channels)
    return images, [f"{path}: {note}" for note in notes]


def _as_labels(labels: np.ndarray, spec: DataSpec, path: Path) -> np.ndarray:
    """Class names, or integers from 0, as int64 labels."""
    if labels.dtype.kind == "U":
        return _numbers_of(labels, spec, path)
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
    by_name = places_of(spec.class_names, found.tolist())
    table = by_name if len(by_name) == len(found) else numbers
    unknown = [name for name in found if name not in table]
    if unknown:
        raise UserError(
            f"{path}: '{unknown[0]}' is no class of {spec.name}; allowed are {', '.join(spec.class_names[:20])}, "
            f"or 0 to {spec.num_classes - 1}"
        )
    return np.array([table[name] for name in found], np.int64)[inverse]
