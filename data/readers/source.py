"""The result of a reader: labelled images, not yet converted; and helpers that several readers share."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from data.convert import decode, square_array
from data.trees.tree import FileTree
from utils.errors import UserError
from utils.text import listed

if TYPE_CHECKING:
    from PIL import Image

LAYOUTS = (
    "allowed: idx files of MNIST, python pickles of CIFAR, npz (x/y, images/labels or train_images/train_labels), "
    "train/<class>/* folders, flat <class>_<rest> files, or a zip of images with dataset.json"
)


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


def _form(picture: "Image.Image") -> Form:
    """The form of a grey or RGB picture."""
    return picture.width, picture.height, 1 if picture.mode == "L" else 3


Part = ArrayPart | FilePart


@dataclass(frozen=True)
class Source:
    """The labelled images at one path. `class_names` is in label order if the files state it, else None."""

    train: Part
    test: Part | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = field(default=())


def read_one(tree: FileTree, name: str) -> bytes:
    return next(tree.read([name]))[1]


def find_one(tree: FileTree, names: list[str], pattern: str) -> str:
    """The one file whose base name matches; UserError if there is none."""
    found = [name for name in names if re.search(pattern, PurePosixPath(name).name)]
    if not found:
        raise UserError(f"{tree.path}: no file named like '{pattern.strip('^$')}'")
    if len({PurePosixPath(name).name for name in found}) < len(found):
        raise UserError(
            f"{tree.path}: holds {listed(found)}; only one of them can be read; move the others away"
        )
    return found[0]


def with_parts(path: Path, found: dict[str, Part]) -> Source:
    """The source with these parts by name: train, optionally test and val."""
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


_PARTS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip


def part_of(name: str) -> str | None:
    """The part that a folder, or a file without its ending, of this name holds: train, test, val or None."""
    return _PARTS.get(name.casefold())


def require_equal_counts(where: str, images: np.ndarray, labels: np.ndarray) -> None:
    if len(images) != len(labels):
        raise UserError(f"{where}: {len(labels):,} labels for {len(images):,} images")
