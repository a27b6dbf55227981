"""Find private images in the files of a run folder: exactly, within one grey level, or by the hash of their array.

A file is reduced to streams of grey levels (uint8). A stream holds a private image if a window of it, at any offset,
is the image's pixels in the order of the array, or of its channels-last or single-channel forms. Pictures and arrays
that show an image enlarged or inside a grid are searched as planes: any row of a private image's pixels must be found
at one position of the plane with every other row below it.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TOLERANCE = 1  # grey levels
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")


class PrivateNet:
    """Private images (N, C, H, W) uint8 to be searched for."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.planes = images.reshape(-1, *images.shape[2:])
        keep = self.planes.reshape(len(self.planes), -1).std(axis=1) > 2  # a blank image says nothing
        self.planes = self.planes[keep]
        flat = self.planes.reshape(len(self.planes), -1).astype(np.int64)
        self.sums = flat.sum(axis=1)
        self.order = np.argsort(self.sums)
        self.digests = {digest for array in (images, *images) for digest in _digests(array)}

    def leaks(self, folder: Path) -> list[str]:
        """ "file (part): what was found" of every leak in every file below `folder`."""
        return [
            f"{path.relative_to(folder)}: {found}"
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            for found in self.leaks_of(path)
        ]

    def leaks_of(self, path: Path) -> list[str]:
        found = [f"{name}: private pixels" for name, array in arrays_of(path) if self.holds_image(array)]
        content = path.read_bytes()
        if any(digest in content for digest in self.digests):
            found.append("hash of private pixels")
        return found

    def holds_image(self, array: np.ndarray) -> bool:
        return any(
            self._in_plane(plane) for levels in grey_levels(array) for plane in self._planes_of(levels)
        )

    def _planes_of(self, levels: np.ndarray) -> Iterator[np.ndarray]:
        """2-d views that could show an image: pictures of the array, and images flattened into rows of a matrix."""
        height, width = self.planes.shape[1:]
        if levels.ndim >= 2:
            pictures = levels.reshape(-1, *levels.shape[-2:])
            yield from pictures
            if levels.ndim >= 3:  # channels last
                yield from np.moveaxis(levels, -1, 0).reshape(-1, *levels.shape[-3:-1])
        size = height * width
        if levels.size >= size and (levels.ndim < 2 or levels.shape[-1] % size == 0):
            yield levels.reshape(-1)[: levels.size // size * size].reshape(-1, width)

    def _in_plane(self, plane: np.ndarray) -> bool:
        """True if a window of the plane equals a private image within TOLERANCE; enlarged ones are reduced first."""
        return any(
            self._has_window(plane[::scale, ::scale]) for scale in range(1, 9) if min(plane.shape) >= scale
        )

    def _has_window(self, plane: np.ndarray) -> bool:
        height, width = self.planes.shape[1:]
        if plane.shape[0] < height or plane.shape[1] < width:
            return False
        integral = np.zeros((plane.shape[0] + 1, plane.shape[1] + 1), np.int64)
        integral[1:, 1:] = plane.astype(np.int64).cumsum(0).cumsum(1)
        sums = integral[height:, width:] - integral[:-height, width:] - integral[height:, :-width]
        sums += integral[:-height, :-width]
        ordered, slack = self.sums[self.order], TOLERANCE * height * width
        low, high = np.searchsorted(ordered, sums - slack), np.searchsorted(ordered, sums + slack, "right")
        for y, x in zip(*np.nonzero(high > low), strict=True):
            window = plane[y : y + height, x : x + width].astype(np.int16)
            if window.std() <= 1:
                continue
            candidates = self.planes[self.order[low[y, x] : high[y, x]]].astype(np.int16)
            if (np.abs(candidates - window).max(axis=(1, 2)) <= TOLERANCE).any():
                return True
        return False


def _digests(array: np.ndarray) -> Iterator[bytes]:
    """Hex digests of an array's bytes by the usual hashes."""
    data = np.ascontiguousarray(array).tobytes()
    for name in ("md5", "sha1", "sha256", "blake2b"):
        yield hashlib.new(name, data).hexdigest()[:32].encode()
    yield hashlib.blake2b(data, digest_size=16).hexdigest().encode()


def grey_levels(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array as uint8: as it is, or floats read as pixels in [0, 255], [0, 1] and [-1, 1]."""
    if array.dtype == np.uint8:
        yield array
    elif array.dtype.kind in "iu":
        yield np.clip(array, 0, 255).astype(np.uint8)
    elif array.dtype.kind == "f":
        values = np.nan_to_num(array.astype(np.float64))
        for scaled in (values, values * 255, (values + 1) * 127.5):
            yield np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def arrays_of(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every array and picture in a file; nothing for a file of text without pictures."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        yield path.name, np.load(path)
    elif suffix == ".npz":
        with np.load(path) as content:
            yield from content.items()
    elif suffix in (".pth", ".pt"):
        yield from tensors_of(torch.load(path, weights_only=True), path.stem)
    elif suffix in PICTURES:
        yield path.name, np.asarray(Image.open(path))
    elif suffix in (".html", ".md", ".json", ".svg"):
        text = path.read_text(encoding="utf-8")
        for number, data in enumerate(re.findall(r"data:image/[\w+.-]+;base64,([A-Za-z0-9+/=\s]+)", text)):
            yield f"picture {number}", np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def tensors_of(value: object, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield name, value.detach().float().numpy() if value.is_floating_point() else value.numpy()
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors_of(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            yield from tensors_of(entry, f"{name}.{position}")
