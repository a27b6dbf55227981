"""Randomness addressed by position: the draws of an example depend only on its position in the batch."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

# Positions that are drawn together: few launches, little waste for a small chunk.
UNITS = {"cpu": 16, "cuda": 128}


class Draws:
    """Random numbers for the examples at positions [start, stop) of one logical batch.

    The numbers at position i in the n-th call depend only on (key, n, i) and the requested shape, not on how the batch
    is cut into chunks or spread over processes; a chunk that is tried again gets the same numbers. Calls are counted
    from 0 in every object, so all chunks of a batch must make the same calls in the same order.

    The numbers are as secret as `key` (16 to 64 bytes). CPUs and GPUs draw different numbers from the same key.
    """

    def __init__(self, key: bytes, start: int, stop: int, device: str | torch.device = "cpu") -> None:
        self._key = key
        self._start, self._stop = start, stop
        self._device = torch.device(device)
        self._calls = 0

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> "Draws":
        """The draws of a sub-range, positions counted from this range's start; its calls start from 0 again."""
        first, last, _ = part.indices(len(self))
        return Draws(self._key, self._start + first, self._start + max(first, last), self._device)

    def stretched(self, length: int) -> "Draws":
        """The draws of `length` positions from the same start: these positions and those after them."""
        return Draws(self._key, self._start, self._start + length, self._device)

    def normal(self, *shape: int) -> torch.Tensor:
        """(len(self), *shape) float32, independent standard normal."""
        return self._draw(_fill_normal, shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        """(len(self), *shape) float32, independent and uniform on [0, 1)."""
        return self._draw(_fill_uniform, shape)

    def _draw(self, fill: Callable[[torch.Tensor, bytes], None], shape: tuple[int, ...]) -> torch.Tensor:
        size = UNITS.get(self._device.type, UNITS["cpu"])
        first, end = self._start // size, -(-self._stop // size)
        units = torch.empty(end - first, size, *shape, device=self._device)
        for row, unit in enumerate(range(first, end)):
            message = f"{self._calls}/{unit}".encode()
            fill(units[row], hashlib.blake2b(message, key=self._key, digest_size=16).digest())
        self._calls += 1
        offset = self._start - first * size
        return units.flatten(0, 1)[offset : offset + len(self)]


# torch's generator for the CPU keeps 32 bits of its seed, few enough to try them all; numpy's takes a 128-bit key.


def _fill_normal(unit: torch.Tensor, key: bytes) -> None:
    if unit.device.type == "cpu":
        philox(key).standard_normal(dtype=np.float32, out=unit.numpy())
    else:
        unit.normal_(generator=_device_generator(key, unit.device))


def _fill_uniform(unit: torch.Tensor, key: bytes) -> None:
    if unit.device.type == "cpu":
        philox(key).random(dtype=np.float32, out=unit.numpy())
    else:
        unit.uniform_(generator=_device_generator(key, unit.device))


def philox(key: bytes) -> np.random.Generator:
    """Philox4x64-10 with a 16-byte key, a counter-based generator (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def _device_generator(key: bytes, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(int.from_bytes(key[:8], "big"))
