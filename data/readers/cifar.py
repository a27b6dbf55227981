"""The python pickles of CIFAR-10 and CIFAR-100."""

import io
import pickle
import re
from pathlib import PurePosixPath

import numpy as np

from data.readers.source import ArrayPart, Source, find_one, read_one
from data.trees import FileTree
from utils.errors import UserError


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
        loaded = _ArrayUnpickler(io.BytesIO(read_one(tree, name)), encoding="bytes").load()
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


def read_cifar(tree: FileTree, names: list[str]) -> Source:
    """CIFAR-10 (data_batch_1..5, test_batch, batches.meta) or CIFAR-100 with fine labels (train, test, meta)."""
    batches = sorted(name for name in names if re.match(r"data_batch_\d+$", PurePosixPath(name).name))
    train_files = batches or [find_one(tree, names, "^train$")]
    test_file = find_one(tree, names, "^test_batch$" if batches else "^test$")
    meta = _unpickle(tree, find_one(tree, names, r"^(batches\.)?meta$"))
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
