"""Read arrays of images and labels: one npz, or a folder of train.npz, test.npz and val.npz."""

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from data.readers.source import ArrayPart, Part, Source, part_of, require_equal_counts, with_parts
from data.trees.folder import FolderTree
from data.trees.tree import FileTree, left_out
from data.trees.zips import DAMAGED, zip_members
from utils.errors import UserError
from utils.text import listed, printable

_IMAGES = {"x", "images", "image", "imgs"}
_LABELS = {"y", "labels", "label", "targets"}
_UNNAMED = {"arr_0": "images", "arr_1": "labels"}  # as np.savez calls arrays that are given without a name
_CLASSES = {"classes", "class_names", "label_names"}
_NAMES = (
    "x and y, images and labels, each of them perhaps with train, val or test (x_train, train_images), two arrays "
    "without names, and class_names"
)


def read_npz(path: Path) -> Source:
    """One npz with a training part, and perhaps validation (joined to training) and test parts."""
    arrays, unread = _load(path)
    parts: dict[str, Part] = {}
    for part in dict.fromkeys(part for part, _ in arrays if part != "classes"):
        parts[part] = _npz_part(path, arrays, part)
    if "train" not in parts:
        there = ", ".join([*(key for key, _ in arrays.values()), *unread]) or "nothing"
        raise UserError(f"{path}: holds {printable(there)} and no training images; known names: {_NAMES}")
    source = with_parts(path, parts)
    notes = [*source.notes, *(f"{path.name}: {note}" for note in left_out(unread, f"known names: {_NAMES}"))]
    names = None
    if ("classes", "names") in arrays:
        key, array = arrays["classes", "names"]
        names = _as_class_names(array, f"{path}: {key}")
    return replace(source, class_names=names, notes=tuple(notes))


def read_npz_images(path: Path) -> ArrayPart:
    """The images of one npz, of all its parts; labels are not needed, and those of the result are all 0."""
    arrays, _ = _load(path)
    found = [
        _as_uint8(as_nhwc(array, f"{path}: {key}"), f"{path}: {key}")
        for (_, kind), (key, array) in arrays.items()
        if kind == "images"
    ]
    if not found:
        raise UserError(f"{path}: holds no images; known names: {_NAMES}")
    if len({images.shape[1:] for images in found}) > 1:
        raise UserError(f"{path}: its images have several sizes; give them in files of their own")
    images = np.concatenate(found)
    return ArrayPart(images, np.zeros(len(images), np.int64))


Arrays = dict[tuple[str, str], tuple[str, np.ndarray]]  # (part, images or labels) -> name in the file, array


def _load(path: Path) -> tuple[Arrays, list[str]]:
    """The arrays whose names are known, and the other names."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path}: one array, not an npz of several; images and labels are needed")
        with archive:
            zip_members(path)
            return _known_arrays(path, archive)
    except UserError:
        raise
    except (*DAMAGED, MemoryError) as error:
        raise UserError(f"{path}: corrupt, truncated or not an npz of plain arrays ({error})") from error


def _known_arrays(path: Path, archive: np.lib.npyio.NpzFile) -> tuple[Arrays, list[str]]:
    arrays: Arrays = {}
    unread = []
    for key in archive.files:
        role = _role(key)
        if role is None:
            unread.append(key)
            continue
        if role in arrays:
            raise UserError(f"{path}: {arrays[role][0]} and {key} mean the same part; keep one of them")
        array = archive[key]
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: {key} is not an array")
        arrays[role] = key, array
    more = [key for key in unread if re.fullmatch(r"arr_\d+", key)]
    if more:
        raise UserError(
            f"{path}: holds {listed(more)}; of arrays without names there may be two, images and labels"
        )
    return arrays, unread


def _role(key: str) -> tuple[str, str] | None:
    """What an array of this name is: (part, "images" or "labels"), ("classes", "names"), or None."""
    folded = key.casefold()
    if folded in _CLASSES:
        return "classes", "names"
    if folded in _UNNAMED:
        return "train", _UNNAMED[folded]
    tokens = re.split(r"[_\-. ]", folded)
    kinds = ["images" if word in _IMAGES else "labels" for word in tokens if word in _IMAGES | _LABELS]
    parts = [part for word in tokens if (part := part_of(word)) is not None]
    if len(kinds) != 1 or len(kinds) + len(parts) < len(tokens) or len(parts) > 1:
        return None
    return (parts or ["train"])[0], kinds[0]


def _npz_part(path: Path, arrays: Arrays, part: str) -> ArrayPart:
    for kind, other in (("images", "labels"), ("labels", "images")):
        if (part, kind) not in arrays:
            key, _ = arrays[part, other]
            raise UserError(f"{path}: holds {key} and no {kind} of the same part; known names: {_NAMES}")
    (image_key, images), (label_key, labels) = arrays[part, "images"], arrays[part, "labels"]
    where = f"{path}: {image_key}"
    images = _as_uint8(as_nhwc(images, where), where)
    labels = _as_label_vector(labels, f"{path}: {label_key}")
    require_equal_counts(f"{path}: {label_key}", images, labels)
    return ArrayPart(images, labels)


def _as_class_names(names: np.ndarray, where: str) -> tuple[str, ...]:
    if names.ndim != 1:
        raise UserError(f"{where}: shape {names.shape}; allowed: one name per class")
    return tuple(_as_text(names, where).tolist())


def _as_text(names: np.ndarray, where: str) -> np.ndarray:
    """Names as NumPy text; bytes must be UTF-8."""
    if names.dtype.kind != "S":
        return names.astype(str)
    try:
        return np.char.decode(names, "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {error.object!r} is not UTF-8") from error


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
    """(N, H, W) or (N, H, W, 3) from NHW, NCHW or NHWC; the channel axis is the one of size 1 or 3. If two are (a
    side has 1 or 3 pixels), it is the earlier one, as in the samples of a run. UserError for images of 0 pixels."""
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
    names = labels.dtype.kind in "US"
    if labels.ndim != 1 or not (names or np.issubdtype(labels.dtype, np.integer)):
        raise UserError(
            f"{where}: {labels.dtype} {labels.shape}; allowed: one integer or class name per image"
        )
    return _as_text(labels, where) if names else labels.astype(np.int64)


def read_npz_folder(tree: FileTree, names: list[str]) -> Source:
    """A folder of train.npz, test.npz and val.npz, or of one npz."""
    if not isinstance(tree, FolderTree):
        raise UserError(f"{tree.path}: holds {names[0]}; an npz in an archive is not read, unpack it")
    tree.opened.update(names)
    if len(names) == 1:
        return read_npz(tree.place(names[0]))
    files: dict[str, Path] = {}
    for name in names:
        part = part_of(PurePosixPath(name).stem)
        if part is None or part in files:
            raise UserError(
                f"{tree.path}: {name} is not one of train.npz, test.npz and val.npz; move it away, or give one file"
            )
        files[part] = tree.place(name)
    if "train" not in files:
        raise UserError(f"{tree.path}: several npz files but no train.npz; pass one of them as --source")
    found = {part: read_npz(path) for part, path in files.items()}
    for part, source in found.items():
        if source.test is not None:
            raise UserError(f"{files[part]}: has several parts itself; give it without the other files")
        if source.class_names != found["train"].class_names:
            raise UserError(
                f"{files[part]}: its classes are given in another form than those of {files['train'].name}"
            )
    joined = with_parts(tree.path, {part: source.train for part, source in found.items()})
    notes = [*joined.notes, *(note for source in found.values() for note in source.notes)]
    return replace(joined, class_names=found["train"].class_names, notes=tuple(notes))
