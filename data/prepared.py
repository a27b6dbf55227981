"""The one format of prepared data on disk: uint8 images and int64 labels as .npy files, described by meta.json.

    <folder>/meta.json  train_images.npy (N, C, H, W)  train_labels.npy (N,)  [test_images.npy  test_labels.npy]

A folder is written next to its final place and renamed, so an existing folder is complete. Only the owner can read
private images and their meta.json, whose digests would confirm a guess of all images (0700, files 0600).
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.spec import Samples
from utils.errors import UserError
from utils.files import save_array
from utils.private_files import create_private_file

MEMORY_MAP_ABOVE = 2 * 1024**3  # bytes; larger files are memory-mapped, and their digest is not checked again
META_NAME = "meta.json"
GROUPS_NAME = "train_groups.npy"
ZEROS = 1 << 22  # bytes written at a time


@dataclass(frozen=True)
class PreparedMeta:
    """The content of meta.json. `sha256` maps each file name to the digest of its bytes. `identity` is random: it
    changes when the folder is prepared again, and reveals nothing about its content, so that runs may keep it."""

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...]
    num_train: int
    num_test: int  # 0: a set without a test part (public data)
    source: str
    sha256: dict[str, str]
    identity: str = ""
    images_per_person: int | None = None  # largest number of images in a group; None: groups are unknown
    images_per_person_is: str = ""  # declared (--images_per_person), or observed in the training part

    @property
    def content_hash(self) -> str:
        """A digest that changes with any byte of the images or labels."""
        return hashlib.sha256(json.dumps(self.sha256, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Prepared:
    meta: PreparedMeta
    train: Samples
    test: Samples | None


def is_prepared(folder: Path) -> bool:
    return (folder / META_NAME).is_file()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- writing


class PreparedWriter:
    """Fills the arrays of a new prepared folder; `finish` computes the digests and writes meta.json."""

    def __init__(self, folder: Path, image_shape: tuple[int, int, int], private: bool) -> None:
        self.folder = folder
        self.image_shape = image_shape
        self._private = private
        self._counts = {"train": 0, "test": 0}
        self._limit, self._limit_is = None, ""

    def new_part(self, part: str, labels: np.ndarray) -> np.ndarray:
        """Write the labels of `part` and return its (N, C, H, W) uint8 images, mapped and ready to be filled."""
        shape = (len(labels), *self.image_shape)
        require_free_space(self.folder, int(np.prod(shape)))
        save_array(self._new_file(f"{part}_labels.npy"), labels.astype(np.int64))
        self._counts[part] = len(labels)
        path = self._new_file(f"{part}_images.npy")
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        reserve(path)
        return np.lib.format.open_memmap(path, mode="r+")

    def write_groups(self, numbers: np.ndarray, limit: int, origin: str) -> None:
        """Store the group of every training image, and the limit of images per group ("declared" or "observed")."""
        save_array(self._new_file(GROUPS_NAME), numbers.astype(np.int64))
        self._limit, self._limit_is = limit, origin

    def finish(self, name: str, class_names: tuple[str, ...], source: str) -> PreparedMeta:
        channels, resolution, _ = self.image_shape
        digests = {path.name: sha256_of(path) for path in sorted(self.folder.glob("*.npy"))}
        meta = PreparedMeta(
            name,
            resolution,
            channels,
            tuple(class_names),
            self._counts["train"],
            self._counts["test"],
            source,
            digests,
            secrets.token_hex(8),
            self._limit,
            self._limit_is,
        )
        text = json.dumps(asdict(meta), indent=2, ensure_ascii=False)
        self._new_file(META_NAME).write_text(text + "\n", encoding="utf-8")
        return meta

    def _new_file(self, name: str) -> Path:
        path = self.folder / name
        if self._private:
            create_private_file(path)
        return path


@contextlib.contextmanager
def new_prepared(
    folder: Path, image_shape: tuple[int, int, int], *, private: bool = True
) -> Iterator[PreparedWriter]:
    """A writer whose folder is renamed to `folder` if the block succeeds, and removed if it fails.

    Only its owner can read a `private` folder; the permissions of another one follow the umask. An existing prepared
    folder is replaced; anything else at that path is an error.
    """
    if folder.exists() and not is_prepared(folder):
        raise UserError(
            f"{folder} exists and is not prepared data; move it away or choose another --data_root"
        )
    _make_writable(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir(mode=0o700 if private else 0o777)
        try:
            yield PreparedWriter(fresh, image_shape, private)
        except OSError as error:
            if error.filename is None or str(error.filename).startswith(scratch):
                error.filename = str(folder)
            raise
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(fresh, folder)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); choose another --data_root"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written to; choose another --data_root")


def reserve(path: Path) -> None:
    """Allocate the whole size of a file of zeros on disk, or raise OSError: once the file is mapped, writing a page to
    a full disk kills the process (SIGBUS)."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except AttributeError:  # macOS
            pass
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by the file system
                raise
        start = len(file.read(1 << 10))  # the header, which is kept
        for position in range(start, size, ZEROS):
            file.write(bytes(min(ZEROS, size - position)))
        file.flush()
        os.fsync(file.fileno())


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError before a mapped file outgrows the disk: writing to it later would kill the process."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + (16 << 20):
        needed, left = num_bytes / 1e9, free / 1e9
        raise UserError(
            f"disk full: {folder.parent} needs {needed:.2f} GB and has {left:.2f} GB; free space or move --data_root"
        )


# ---------------------------------------------------------------------------------------------------- reading


def read_meta(folder: Path) -> PreparedMeta:
    """meta.json of a prepared folder, checked for its keys and their types. Reads no image."""
    path = folder / META_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        meta = PreparedMeta(**{**fields, "class_names": tuple(fields["class_names"])})
        valid = meta.resolution > 0 and meta.channels in (1, 3) and meta.num_train > 0 <= meta.num_test
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not the meta.json of prepared data ({error}); run scripts/prepare_data.py again, with --force"
        ) from error
    if not valid:
        raise UserError(
            f"{path}: resolution, channels or counts are out of range; run scripts/prepare_data.py again, with --force"
        )
    return meta


def read_prepared(folder: Path, meta: PreparedMeta | None = None) -> Prepared:
    """Both parts of a prepared folder, whose `meta` is read if it is None. Arrays above 2 GB are memory-mapped,
    read-only.

    UserError, with the name of the file, if a file is missing or truncated, has another type or shape than meta.json
    states, or has changed bytes, and for labels out of range.
    """
    meta = read_meta(folder) if meta is None else meta
    train = _read_part(folder, meta, "train", meta.num_train)
    test = _read_part(folder, meta, "test", meta.num_test) if meta.num_test else None
    return Prepared(meta, train, test)


def read_groups(folder: Path, meta: PreparedMeta) -> np.ndarray | None:
    """(num_train,) int64: the group of every training image; None if the set was prepared without groups."""
    if meta.images_per_person is None:
        return None
    return _read_array(folder / GROUPS_NAME, np.int64, (meta.num_train,), meta)


def read_labels(folder: Path, meta: PreparedMeta) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels of the training part and of the test part, if there is one. Reads no image."""
    test = _read_labels(folder, meta, "test", meta.num_test) if meta.num_test else None
    return read_train_labels(folder, meta), test


def read_train_labels(folder: Path, meta: PreparedMeta) -> np.ndarray:
    """(num_train,) int64: the labels of the training part, checked like those of `read_prepared`. Reads no image."""
    return _read_labels(folder, meta, "train", meta.num_train)


def _read_part(folder: Path, meta: PreparedMeta, part: str, count: int) -> Samples:
    shape = (count, meta.channels, meta.resolution, meta.resolution)
    images = _read_array(folder / f"{part}_images.npy", np.uint8, shape, meta)
    return Samples(images, _read_labels(folder, meta, part, count))


def _read_labels(folder: Path, meta: PreparedMeta, part: str, count: int) -> np.ndarray:
    path = folder / f"{part}_labels.npy"
    labels = _read_array(path, np.int64, (count,), meta)
    low, high, last = labels.min(), labels.max(), len(meta.class_names) - 1
    if low < 0 or high > last:
        raise UserError(f"{path}: labels run from {low} to {high}; allowed are 0 to {last}")
    return labels


def _read_array(path: Path, dtype: type, shape: tuple[int, ...], meta: PreparedMeta) -> np.ndarray:
    advice = "run scripts/prepare_data.py again, with --force"
    if not path.is_file():
        raise UserError(f"{path}: missing; {advice}")
    mapped = path.stat().st_size > MEMORY_MAP_ABOVE
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: corrupt or truncated ({error}); {advice}") from error
    if array.dtype != dtype or array.shape != shape:
        found, wanted = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}"
        raise UserError(f"{path}: holds {found}; meta.json states {wanted}; {advice}")
    if not mapped and sha256_of(path) != meta.sha256.get(path.name):
        raise UserError(f"{path}: its content changed after it was written (sha256 differs); {advice}")
    return array
