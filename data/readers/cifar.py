"""Read the Python pickles of CIFAR-10 and CIFAR-100. Unlike torchvision's reader, this one runs no code of the file."""

import io
import pickle
import re
from pathlib import PurePosixPath

import numpy as np

from data.readers.source import ArrayPart, Source, find_one, read_one
from data.trees.tree import FileTree
from utils.errors import UserError
from utils.text import listed


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


# What a damaged pickle raises.
_DAMAGED = (
    pickle.UnpicklingError, EOFError, AttributeError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError,
    RecursionError,
)  # fmt: skip
_NUM_BATCHES = 5  # of CIFAR-10
_MOST_LABELS = 1 << 31


def _unpickle(tree: FileTree, name: str) -> dict:
    """The dict of a CIFAR batch with str keys."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(read_one(tree, name)), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    except _DAMAGED as error:
        raise UserError(f"{tree.path}: {name} is not a CIFAR batch, or corrupt ({error})") from error


def read_cifar(tree: FileTree, names: list[str]) -> Source:
    """CIFAR-10 (data_batch_1..5, test_batch, batches.meta) or CIFAR-100 with fine labels (train, test, meta)."""
    batches = sorted(name for name in names if re.match(r"data_batch_\d+$", PurePosixPath(name).name))
    train_files = batches or [find_one(tree, names, "^train$")]
    test_file = find_one(tree, names, "^test_batch$" if batches else "^test$")
    meta = _unpickle(tree, find_one(tree, names, r"^(batches\.)?meta$"))
    class_names = meta.get("label_names") or meta.get("fine_label_names")
    if not isinstance(class_names, list) or not class_names:
        raise UserError(f"{tree.path}: the meta file has neither label_names nor fine_label_names")
    text = tuple(_text(name, f"{tree.path}: the meta file") for name in class_names)
    if batches:
        _require_all(tree, train_files)
    return Source(_cifar_part(tree, train_files), _cifar_part(tree, [test_file]), text)


def _text(name: object, where: str) -> str:
    try:
        return name.decode() if isinstance(name, bytes) else str(name)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the class name {name!r} is not UTF-8") from error


def _require_all(tree: FileTree, batches: list[str]) -> None:
    """UserError if a batch is missing or repeated. A batch states their number ("training batch 1 of 5")."""
    numbers = [int(name.rpartition("_")[2]) for name in batches]
    stated = re.search(r" of (\d+)$", _text(_unpickle(tree, batches[0]).get("batch_label", b""), batches[0]))
    expected = range(1, max(int(stated[1]) if stated else _NUM_BATCHES, *numbers) + 1)
    missing = [f"data_batch_{number}" for number in expected if number not in numbers]
    if missing:
        raise UserError(f"{tree.path}: {listed(missing)} of the {len(expected)} training batches missing")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{tree.path}: holds a training batch more than once: {listed(batches, 10)}")


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
        if (
            not isinstance(batch_labels, list)
            or len(batch_labels) != len(rows)
            or not all(type(label) is int and 0 <= label < _MOST_LABELS for label in batch_labels)
        ):
            raise UserError(
                f"{tree.path}: {name} has no 'labels' or 'fine_labels', one whole number per image"
            )
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(batch_labels, np.int64))
    return ArrayPart(np.concatenate(images), np.concatenate(labels))
