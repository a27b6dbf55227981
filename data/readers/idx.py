"""Read the idx files of MNIST and similar sets. Unlike torchvision's reader, this one refuses truncated files."""

import gzip
import re
import zlib

import numpy as np

from data.readers.source import ArrayPart, Source, find_one, read_one, require_equal_counts
from data.registry import SourceQuirks
from data.trees.tree import FileTree
from utils.errors import UserError

IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx\d")


def read_idx(tree: FileTree, names: list[str], quirks: SourceQuirks) -> Source:
    def part(pattern: str) -> ArrayPart:
        images = _idx_array(tree, find_one(tree, names, f"{pattern}-images[-.]idx3"), 3)
        label_file = find_one(tree, names, f"{pattern}-labels[-.]idx1")
        labels = _idx_array(tree, label_file, 1).astype(np.int64) - quirks.first_label
        require_equal_counts(f"{tree.path}: {label_file}", images, labels)
        return ArrayPart(images.transpose(0, 2, 1) if quirks.transposed else images, labels)

    has_test = any(re.search(r"(t10k|test)-images[-.]idx3", name) for name in names)
    return Source(part("train"), part("(t10k|test)") if has_test else None)


def _idx_array(tree: FileTree, name: str, num_dimensions: int) -> np.ndarray:
    """The uint8 array of one idx file (yann.lecun.com/exdb/mnist): 2 zero bytes, type 8, rank, big-endian sizes."""
    content = read_one(tree, name)
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
