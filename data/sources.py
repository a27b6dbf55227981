"""Reads what the user already has: recognises the layout by content and lists labelled images, not yet converted.

Layouts: MNIST-style idx files, CIFAR pickles, npz, CelebA, zip with dataset.json, class folders, flat
`<class>_<rest>` files. Folders, zips and tars are all looked into (data/trees.py).
"""

import gzip
import io
import json
import pickle
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from data.convert import decode, square_array
from data.registry import NO_QUIRKS, SourceQuirks
from data.trees import FileTree, FolderTree, open_tree
from utils.errors import UserError

LAYOUTS = (
    "allowed: idx files of MNIST, python pickles of CIFAR, npz (x/y, images/labels or train_images/train_labels), "
    "train/<class>/* folders, flat <class>_<rest> files, or a zip of images with dataset.json"
)
CELEBA_LABEL = "Male"  # of CelebA's 40 attributes the one that is the label


# ------------------------------------------------------------------------------------------------------ records


Form = tuple[int, int, int]  # width, height, channels
Converted = tuple[np.ndarray, Form]  # (C, R, R) uint8, and what the image was before


@dataclass(frozen=True)
class ArrayPart:
    """Labelled images in memory: (N, H, W) or (N, H, W, 3) uint8; labels (N,) integers or class names."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "ArrayPart":
        return ArrayPart(self.images[rows], self.labels[rows])

    def join(self, other: "ArrayPart") -> "ArrayPart":
        labels = np.concatenate([self.labels, other.labels])
        return ArrayPart(np.concatenate([self.images, other.images]), labels)

    def first_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        return (*self.images.shape[1:3], self.images.shape[3] if self.images.ndim == 4 else 1)

    def items(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each row number with what `convert` takes."""
        return enumerate(self.images)

    def convert(self, item: np.ndarray, resolution: int, channels: int) -> Converted:
        from PIL import Image

        picture = Image.fromarray(np.ascontiguousarray(item))
        return square_array(picture, resolution, channels), _form(picture)


@dataclass(frozen=True)
class FilePart:
    """Labelled image files in a tree; labels (N,) integers or class names."""

    tree: FileTree
    names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "FilePart":
        return FilePart(self.tree, [self.names[row] for row in rows], self.labels[rows])

    def join(self, other: "FilePart") -> "FilePart":
        """The files of both, which lie in one tree."""
        return FilePart(self.tree, self.names + other.names, np.concatenate([self.labels, other.labels]))

    def first_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the first image."""
        name, content = next(self.tree.read([self.names[0]]))
        picture = decode(content, f"{self.tree.path}: {name}")
        width, height, channels = _form(picture)
        return height, width, channels

    def items(self) -> Iterator[tuple[int, tuple[str, bytes]]]:
        """Each row number with what `convert` takes, in the order in which the tree gives the files."""
        row_of = {name: row for row, name in enumerate(self.names)}
        for name, content in self.tree.read(self.names):
            yield row_of[name], (name, content)

    def convert(self, item: tuple[str, bytes], resolution: int, channels: int) -> Converted:
        name, content = item
        picture = decode(content, f"{self.tree.path}: {name}")
        return square_array(picture, resolution, channels), _form(picture)


def _form(picture) -> Form:
    """Of a grey or RGB picture."""
    return picture.width, picture.height, 1 if picture.mode == "L" else 3


Part = ArrayPart | FilePart


@dataclass(frozen=True)
class Source:
    """What was found at one path. `class_names` is in label order if the files state it, else None."""

    train: Part
    test: Part | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = field(default=())


# ------------------------------------------------------------------------------------------------------ detection


def open_source(path: Path, quirks: SourceQuirks = NO_QUIRKS) -> Source:
    """Find out what lies at `path` and list its images. Image files are not opened yet."""
    source = _open_by_layout(path, quirks)
    if len(source.train) == 0 or (source.test is not None and len(source.test) == 0):
        raise UserError(f"{path}: there are no images in its training or test part")
    return source


def _open_by_layout(path: Path, quirks: SourceQuirks) -> Source:
    if path.suffix == ".npz":
        return _read_npz(path)
    tree = open_tree(path)
    names = [name for name in tree.names if quirks.only_members in name]
    if not names:
        raise UserError(f"{path}: empty, there are no images in it; {LAYOUTS}")
    base_names = {PurePosixPath(name).name for name in names}
    if all(name.endswith(".npz") for name in names):
        return _read_npz_folder(tree)
    if any(_IDX_NAME.search(name) for name in base_names):
        return _read_idx(tree, names, quirks)
    if "data_batch_1" in base_names or {"train", "test", "meta"} <= base_names:
        return _read_cifar(tree, names)
    if any(name.startswith("list_attr_celeba") for name in base_names):
        return _read_celeba(tree, names)
    if "dataset.json" in base_names:
        return _read_dataset_json(tree, names)
    source = _read_image_files(tree, names, quirks)
    empty = tree.empty_folders if isinstance(tree, FolderTree) else []
    notes = (f"no file in the folder {name}: it is no class" for name in empty)
    return replace(source, notes=(*source.notes, *notes))


def _single(tree: FileTree, name: str) -> bytes:
    return next(tree.read([name]))[1]


def _find(tree: FileTree, names: list[str], pattern: str) -> str:
    """The one file whose base name matches; UserError if there is none."""
    found = [name for name in names if re.search(pattern, PurePosixPath(name).name)]
    if not found:
        raise UserError(f"{tree.path}: lacks a file named like '{pattern.strip('^$')}'")
    return found[0]


def _with_parts(path: Path, found: dict[str, Part]) -> Source:
    """The source of these parts by name: train, and perhaps test and val."""
    train, test, val = found["train"], found.get("test"), found.get("val")
    if val is None:
        return Source(train, test)
    if test is None:
        return Source(
            train, val, notes=(f"{path.name}: its {len(val):,} validation images are the test part",)
        )
    if isinstance(train, ArrayPart):
        shapes = [part.images.shape[1:] for part in (train, val)]
        if shapes[0] != shapes[1] or train.labels.dtype.kind != val.labels.dtype.kind:
            raise UserError(
                f"{path}: training images {shapes[0]} and validation images {shapes[1]}; both must be of one "
                f"shape, and their labels of one kind"
            )
    note = f"{path.name}: its {len(val):,} validation images join the training part"
    return Source(train.join(val), test, notes=(note,))


# ------------------------------------------------------------------------------------------------------ idx files

_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx\d")


def _read_idx(tree: FileTree, names: list[str], quirks: SourceQuirks) -> Source:
    def part(pattern: str) -> ArrayPart:
        images = _idx_array(tree, _find(tree, names, f"{pattern}-images[-.]idx3"), 3)
        label_file = _find(tree, names, f"{pattern}-labels[-.]idx1")
        labels = _idx_array(tree, label_file, 1).astype(np.int64) - quirks.first_label
        _require_equal_counts(f"{tree.path}: {label_file}", images, labels)
        return ArrayPart(images.transpose(0, 2, 1) if quirks.transposed else images, labels)

    has_test = any(re.search(r"(t10k|test)-images[-.]idx3", name) for name in names)
    return Source(part("train"), part("(t10k|test)") if has_test else None)


def _idx_array(tree: FileTree, name: str, num_dimensions: int) -> np.ndarray:
    """The uint8 array of one idx file (yann.lecun.com/exdb/mnist): 2 zero bytes, type 8, rank, big-endian sizes."""
    content = _single(tree, name)
    where = f"{tree.path}: {name}"
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where}: corrupt or truncated gzip file ({error})") from error
    header = 4 + 4 * num_dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, num_dimensions)):
        raise UserError(f"{where}: not an idx file of {num_dimensions}-dimensional uint8 data")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dimensions, 4))
    if 0 in shape[1:]:
        raise UserError(f"{where}: shape {shape}; images have at least one pixel")
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise UserError(f"{where}: truncated, {len(content) - header:,} bytes of data for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# ------------------------------------------------------------------------------------------------------ CIFAR


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain containers and NumPy arrays only: any other name in the file is refused, so no code runs."""

    def find_class(self, module: str, name: str) -> object:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes the bytes of an array
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(tree: FileTree, name: str) -> dict:
    """The dict of a CIFAR batch with str keys."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(_single(tree, name)), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
    ) as error:
        raise UserError(f"{tree.path}: {name} is not a CIFAR batch, or corrupt ({error})") from error


def _read_cifar(tree: FileTree, names: list[str]) -> Source:
    """CIFAR-10 (data_batch_1..5, test_batch, batches.meta) or CIFAR-100 with fine labels (train, test, meta)."""
    batches = sorted(name for name in names if re.match(r"data_batch_\d+$", PurePosixPath(name).name))
    train_files = batches or [_find(tree, names, "^train$")]
    test_file = _find(tree, names, "^test_batch$" if batches else "^test$")
    meta = _unpickle(tree, _find(tree, names, r"^(batches\.)?meta$"))
    class_names = meta.get("label_names") or meta.get("fine_label_names")
    if not class_names:
        raise UserError(f"{tree.path}: the meta file has neither label_names nor fine_label_names")
    text = tuple(name.decode() if isinstance(name, bytes) else name for name in class_names)
    return Source(_cifar_part(tree, train_files), _cifar_part(tree, [test_file]), text)


def _cifar_part(tree: FileTree, files: list[str]) -> ArrayPart:
    images, labels = [], []
    for name in files:
        batch = _unpickle(tree, name)
        rows = batch.get("data")
        batch_labels = batch.get("fine_labels", batch.get("labels"))
        if (
            not isinstance(rows, np.ndarray)
            or rows.ndim != 2
            or rows.shape[1] != 3072
            or rows.dtype != np.uint8
        ):
            raise UserError(f"{tree.path}: {name} has no uint8 'data' of 3072 values per image")
        if batch_labels is None or len(batch_labels) != len(rows):
            raise UserError(f"{tree.path}: {name} has no 'labels' or 'fine_labels', one per image")
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(batch_labels, np.int64))
    return ArrayPart(np.concatenate(images), np.concatenate(labels))


# ------------------------------------------------------------------------------------------------------ npz

_TRAIN_KEYS = (
    ("train_images", "train_labels"), ("x_train", "y_train"), ("x", "y"), ("images", "labels"),
    ("arr_0", "arr_1"),  # of arrays without a name
)  # fmt: skip
_VAL_KEYS = (("val_images", "val_labels"),)
_TEST_KEYS = (("test_images", "test_labels"), ("x_test", "y_test"))
_NAME_KEYS = ("classes", "class_names")


def _read_npz(path: Path) -> Source:
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
    source = _with_parts(path, {part: found for part, found in parts.items() if found is not None})
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
            images = _as_uint8(_as_nhwc(arrays[image_key], where), where)
            labels = _as_label_vector(arrays[label_key], f"{path}: {label_key}")
            _require_equal_counts(f"{path}: {label_key}", images, labels)
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


def _as_nhwc(images: np.ndarray, where: str) -> np.ndarray:
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


def _require_equal_counts(where: str, images: np.ndarray, labels: np.ndarray) -> None:
    if len(images) != len(labels):
        raise UserError(f"{where}: {len(labels):,} labels for {len(images):,} images")


def _read_npz_folder(tree: FileTree) -> Source:
    """A folder of train.npz, test.npz and val.npz, or of one npz."""
    if not isinstance(tree, FolderTree):
        raise UserError(f"{tree.path}: holds {tree.names[0]}; an npz in an archive is not read, unpack it")
    if len(tree.names) == 1:
        return _read_npz(tree.path / tree.names[0])
    files: dict[str, Path] = {}
    for name in tree.names:
        part = _part_of(PurePosixPath(name).stem)
        if part is None or part in files:
            raise UserError(
                f"{tree.path}: {name} is not one of train.npz, test.npz and val.npz; move it away, or give one file"
            )
        files[part] = tree.path / name
    if "train" not in files:
        raise UserError(f"{tree.path}: several npz files but no train.npz; pass one of them as --source")
    found = {part: _read_npz(path) for part, path in files.items()}
    for part, source in found.items():
        if source.test is not None:
            raise UserError(
                f"{files[part]}: has several parts itself; give it alone, without the files beside it"
            )
        if source.class_names != found["train"].class_names:
            raise UserError(f"{files[part]}: its classes are not stated like those of {files['train'].name}")
    joined = _with_parts(tree.path, {part: source.train for part, source in found.items()})
    return replace(joined, class_names=found["train"].class_names)


# ------------------------------------------------------------------------------------------------------ CelebA


def _read_celeba(tree: FileTree, names: list[str]) -> Source:
    """Aligned CelebA with one attribute as the label; official parts 0 (train) and 2 (test), 1 is unused."""
    labels = _celeba_labels(tree, names)
    partition = _celeba_rows(_single(tree, _find(tree, names, r"^list_eval_partition\.(txt|csv)$")))
    archive = next((name for name in names if PurePosixPath(name).name == "img_align_celeba.zip"), None)
    images = tree if archive is None else open_tree(tree.path / archive)
    path_of = {
        PurePosixPath(name).name: name for name in images.names if name.lower().endswith((".jpg", ".png"))
    }

    def part(code: str) -> FilePart:
        files = [file for file, fields in partition.items() if fields[-1] == code]
        missing = next((file for file in files if file not in path_of or file not in labels), None)
        if missing is not None:
            raise UserError(f"{images.path}: lacks the image {missing}, or list_attr_celeba its attributes")
        return FilePart(
            images, [path_of[file] for file in files], np.array([labels[file] for file in files], np.int64)
        )

    return Source(part("0"), part("2"))


def _celeba_labels(tree: FileTree, names: list[str]) -> dict[str, int]:
    name = _find(tree, names, r"^list_attr_celeba\.(txt|csv)$")
    content = _single(tree, name)
    header = next(
        (line for line in content.decode().splitlines() if CELEBA_LABEL in line.replace(",", " ").split()), ""
    )
    columns = header.replace(",", " ").split()
    if CELEBA_LABEL not in columns:
        raise UserError(f"{tree.path}: {name} has no attribute '{CELEBA_LABEL}'")
    # Counted from the end: the txt header does not name the first column, the csv header does.
    column = columns.index(CELEBA_LABEL) - len(columns)
    return {file: int(int(fields[column]) > 0) for file, fields in _celeba_rows(content).items()}


def _celeba_rows(content: bytes) -> dict[str, list[str]]:
    """File name -> the other fields of its line; header lines are skipped."""
    rows = (line.replace(",", " ").split() for line in content.decode().splitlines())
    return {row[0]: row[1:] for row in rows if row and row[0].lower().endswith((".jpg", ".png"))}


# ------------------------------------------------------------------------------------------------------ image files


def _read_dataset_json(tree: FileTree, names: list[str]) -> Source:
    """The StyleGAN convention: dataset.json {"labels": [[file, integer], ...]} beside the images; of several, each is
    that of the part which its folder names."""
    listings = [name for name in names if PurePosixPath(name).name == "dataset.json"]
    if len(listings) == 1:
        return Source(_listed_files(tree, names, listings[0]))
    parts = [_part_of(PurePosixPath(name).parent.name) for name in listings]
    if None in parts or len(set(parts)) < len(parts) or "train" not in parts:
        raise UserError(
            f"{tree.path}: holds {', '.join(listings[:4])}; allowed: one dataset.json, or one in each of the folders "
            f"train, test and val"
        )
    found = zip(parts, listings, strict=True)
    return _with_parts(tree.path, {part: _listed_files(tree, names, listing) for part, listing in found})


def _listed_files(tree: FileTree, names: list[str], listing: str) -> FilePart:
    """The files that one dataset.json lists."""
    where = f"{tree.path}: {listing}"
    try:
        entries = json.loads(_single(tree, listing))["labels"]
        labels = {str(PurePosixPath(listing).parent / file): label for file, label in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} has no list 'labels' of [file, integer] pairs ({error})") from error
    wrong = next((file for file, label in labels.items() if type(label) is not int), None)
    if wrong is not None:
        raise UserError(f"{where} labels {wrong} with {labels[wrong]!r}; allowed: one integer")
    missing = next(iter(labels.keys() - set(names)), None)
    if missing is not None:
        raise UserError(f"{where} lists {missing}, which is not there")
    files = sorted(labels)
    if not files:
        raise UserError(f"{where} lists no images")
    return FilePart(tree, files, np.array([labels[file] for file in files], np.int64))


def _read_image_files(tree: FileTree, names: list[str], quirks: SourceQuirks) -> Source:
    """Class folders or flat <class>_<rest> files, below train/ and test/ (or val/) folders if there are such."""
    depth = _shared_depth(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = PurePosixPath(name).parts[depth:]
        groups.setdefault((_part_of(parts[0]) if len(parts) > 1 else None) or "", []).append(name)
    if "train" not in groups:
        if len(groups) > 1 and "" not in groups:
            raise UserError(
                f"{tree.path}: its folders are named like the parts {' and '.join(sorted(groups))}, and none like "
                f"train; rename one, or give one of them alone"
            )
        only_one_part = len(groups) == 1 and "" not in groups  # a test folder passed on its own
        return Source(_labelled_files(tree, names, depth + only_one_part, quirks))
    if "" in groups:
        raise UserError(
            f"{tree.path}: {groups[''][0]} lies beside the folders of the parts; move it into one of them, or away"
        )
    found = {part: _labelled_files(tree, files, depth + 1, quirks) for part, files in groups.items()}
    return _with_parts(tree.path, found)


_PARTS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip


def _part_of(name: str) -> str | None:
    """The part that a folder, or a file without its ending, of this name holds: train, test, val or None."""
    return _PARTS.get(name.casefold())


def _shared_depth(names: list[str]) -> int:
    """How many leading folders all files share, not counting a folder that names a part (train, test, val)."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    depth = 0
    while all(len(parts) > depth for parts in folders) and len({parts[depth] for parts in folders}) == 1:
        if _part_of(folders[0][depth]) is not None:
            break
        depth += 1
    return depth


def _labelled_files(tree: FileTree, names: list[str], depth: int, quirks: SourceQuirks) -> FilePart:
    """Each file's class: its folder below `depth`, or for files without one the name up to the first underscore."""
    folders = [PurePosixPath(name).parts[depth:-1] for name in names]
    if not any(folders):
        if depth and not any("_" in PurePosixPath(name).name for name in names):
            only = PurePosixPath(names[0]).parts[depth - 1]
            if quirks.one_class:
                return FilePart(tree, names, np.array([only] * len(names)))
            raise UserError(f"{tree.path}: there is one class, '{only}'; at least 2 class folders are needed")
        labels = [_class_of_flat_file(tree, name) for name in names]
    elif all(folders):
        if not quirks.nested_classes:
            _refuse_parts_as_classes(tree, folders)
        labels = ["/".join(parts[1:] or parts) if quirks.nested_classes else parts[0] for parts in folders]
    else:
        stray = names[folders.index(())]
        advice = "move it into one of them, or away if it is no image"
        raise UserError(f"{tree.path}: {stray} lies beside the class folders; {advice}")
    return FilePart(tree, names, np.array(labels))


def _refuse_parts_as_classes(tree: FileTree, folders: list[tuple[str, ...]]) -> None:
    """UserError where train_set/cat and test_set/cat would become the classes train_set and test_set."""
    tops = sorted({parts[0] for parts in folders})
    like_parts = [name for name in tops if name.casefold().startswith(("train", "test", "val"))]
    if like_parts and all(len(parts) > 1 for parts in folders):
        raise UserError(
            f"{tree.path}: holds {', '.join(tops[:4])}, each with folders in it; name the parts train, test and val, "
            f"with a folder per class in each, or rename these classes"
        )


def _class_of_flat_file(tree: FileTree, name: str) -> str:
    label, underscore, _ = PurePosixPath(name).name.partition("_")
    if not underscore or not label:
        raise UserError(f"{tree.path}: {name} is in no class folder and not named <class>_<rest>; {LAYOUTS}")
    return label


COLOURS = {1: "grey", 3: "colour"}
_WEIGHTS = {1: " (0.299 red + 0.587 green + 0.114 blue)", 3: ""}


def conversion_notes(forms: Counter, resolution: int, channels: int) -> list[str]:
    """Lines that say how images of these forms were brought to one size and to one number of channels."""
    sizes: Counter = Counter()
    for (width, height, _), count in forms.items():
        sizes[width, height] += count
    notes = [_sizes_note(sizes, resolution)]
    converted = sum(count for (_, _, own), count in forms.items() if own != channels)
    if converted:
        before, after = COLOURS[4 - channels], COLOURS[channels] + _WEIGHTS[channels]
        notes.append(f"{before} images are converted to {after}: {converted:,} of {forms.total():,}")
    return [note for note in notes if note is not None]


def _sizes_note(sizes: Counter, resolution: int) -> str | None:
    """One line that says how images of other or of several sizes were brought to one, or None."""
    if set(sizes) <= {(resolution, resolution)}:
        return None
    most = sizes.most_common(4)
    listed = ", ".join(f"{width}x{height}: {count:,}" for (width, height), count in most)
    more = f" and {len(sizes) - len(most)} more sizes" if len(sizes) > len(most) else ""
    kinds = f"mixed image sizes ({listed}{more})" if len(sizes) > 1 else f"images of {listed.split(':')[0]}"
    return f"{kinds}: cropped to the central square and resized to {resolution}x{resolution}"
