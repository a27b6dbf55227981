"""Arrays of images and labels: one npz, or a folder of train.npz, test.npz and val.npz."""

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from data.readers.source import ArrayPart, Source, part_of, require_equal_counts, with_parts
from data.trees import FileTree, FolderTree
from utils.errors import UserError

_TRAIN_KEYS = (
    ("train_images", "train_labels"), ("x_train", "y_train"), ("x", "y"), ("images", "labels"),
    ("arr_0", "arr_1"),  # of arrays without a name
)  # fmt: skip
_VAL_KEYS = (("val_images", "val_labels"),)
_TEST_KEYS = (("test_images", "test_labels"), ("x_test", "y_test"))
_NAME_KEYS = ("classes", "class_names")


def read_npz(path: Path) -> Source:
    """One npz with a training part, and perhaps validation (joined to training) and test parts."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: one array, not an npz of several; images and labels are needed")
        with archive:
            there, arrays = archive.files, _wanted_arrays(archive)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: corrupt, truncated or not an npz of plain arrays ({error})") from error
    train = _npz_part(path, arrays, _TRAIN_KEYS)
    if train is None:
        wanted = ", ".join("/".join(keys) for keys in _TRAIN_KEYS)
        raise UserError(
            f"{path}: holds {', '.join(there) or 'nothing'}; one of these pairs is needed: {wanted}"
        )
    validation, test = (_npz_part(path, arrays, keys) for keys in (_VAL_KEYS, _TEST_KEYS))
    parts = {"train": train, "test": test, "val": validation}
    source = with_parts(path, {part: found for part, found in parts.items() if found is not None})
    key = next((key for key in _NAME_KEYS if key in arrays), None)
    return (
        source if key is None else replace(source, class_names=_as_class_names(arrays[key], f"{path}: {key}"))
    )


def _as_class_names(names: np.ndarray, where: str) -> tuple[str, ...]:
    if names.ndim != 1:
        raise UserError(f"{where}: shape {names.shape}; allowed: one name per class")
    return tuple(str(name) for name in names)


def _wanted_arrays(archive: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    pairs = (*_TRAIN_KEYS, *_VAL_KEYS, *_TEST_KEYS)
    wanted = {*(key for pair in pairs for key in pair), *_NAME_KEYS}
    return {key: archive[key] for key in archive.files if key in wanted}


def _npz_part(
    path: Path, arrays: dict[str, np.ndarray], pairs: tuple[tuple[str, str], ...]
) -> ArrayPart | None:
    for image_key, label_key in pairs:
        if image_key in arrays and label_key in arrays:
            where = f"{path}: {image_key}"
            images = _as_uint8(as_nhwc(arrays[image_key], where), where)
            labels = _as_label_vector(arrays[label_key], f"{path}: {label_key}")
            require_equal_counts(f"{path}: {label_key}", images, labels)
            return ArrayPart(images, labels)
    return None


def _as_uint8(images: np.ndarray, where: str) -> np.ndarray:
    """uint8 as they are, floats in [0, 1] times 255."""
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{where}: dtype {images.dtype}; allowed: uint8, or floats in [0, 1]")
    for index, image in enumerate(images):
        least, most = image.min(), image.max()  # both NaN if any value is
        if np.isnan(least):
            raise UserError(f"{where}: image {index} has a value that is NaN; floats must be in [0, 1]")
        if least < 0 or most > 1:
            raise UserError(
                f"{where}: image {index} has values from {least:.4g} to {most:.4g}; floats must be in [0, 1], "
                f"values up to 255 be uint8"
            )
    return np.round(images * 255).astype(np.uint8)


def as_nhwc(images: np.ndarray, where: str) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) from NHW, NCHW or NHWC; the channel axis is the one of size 1 or 3. Where two are
    (a side has 1 or 3 pixels), it is the earlier one, as in the samples of a run. UserError for images of 0 pixels."""
    if 0 in images.shape[1:]:
        raise UserError(f"{where}: shape {images.shape}; images have at least one pixel")
    if images.ndim == 3:
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images[..., 0] if images.shape[3] == 1 else images
    raise UserError(
        f"{where}: shape {images.shape}; allowed: (N, H, W), (N, C, H, W) or (N, H, W, C) with C 1 or 3"
    )


def _as_label_vector(labels: np.ndarray, where: str) -> np.ndarray:
    """(N,) int64, or class names as they are."""
    if labels.ndim == 2 and 1 in labels.shape:
        labels = labels.reshape(-1)
    names = labels.dtype.kind == "U"
    if labels.ndim != 1 or not (names or np.issubdtype(labels.dtype, np.integer)):
        raise UserError(
            f"{where}: {labels.dtype} {labels.shape}; allowed: one integer or class name per image"
        )
    return labels if names else labels.astype(np.int64)


def read_npz_folder(tree: FileTree) -> Source:
    """A folder of train.npz, test.npz and val.npz, or of one npz."""
    if not isinstance(tree, FolderTree):
        raise UserError(f"{tree.path}: holds {tree.names[0]}; an npz in an archive is not read, unpack it")
    if len(tree.names) == 1:
        return read_npz(tree.path / tree.names[0])
    files: dict[str, Path] = {}
    for name in tree.names:
        part = part_of(PurePosixPath(name).stem)
        if part is None or part in files:
            raise UserError(
                f"{tree.path}: {name} is not one of train.npz, test.npz and val.npz; move it away, or give one file"
            )
        files[part] = tree.path / name
    if "train" not in files:
        raise UserError(f"{tree.path}: several npz files but no train.npz; pass one of them as --source")
    found = {part: read_npz(path) for part, path in files.items()}
    for part, source in found.items():
        if source.test is not None:
            raise UserError(
                f"{files[part]}: has several parts itself; give it alone, without the files beside it"
            )
        if source.class_names != found["train"].class_names:
            raise UserError(f"{files[part]}: its classes are not stated like those of {files['train'].name}")
    joined = with_parts(tree.path, {part: source.train for part, source in found.items()})
    return replace(joined, class_names=found["train"].class_names)
