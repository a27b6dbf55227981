"""Privacy noise and secret sampling, seeded by the operating system, independent of the experiment seed.

Randomness. Every draw of noise takes a fresh 128-bit key from the operating system. The counter-based generator
Philox4x64-10 (Salmon et al. 2011) expands it to one normal deviate per coordinate. So there is no state that a
checkpoint could store or a resumed run could use again, CPU and GPU runs get the same
bits, and drawing 4 million takes some 50 ms of one CPU thread while the gradients are still being computed. Philox
passes the statistical test batteries and no way to distinguish it from random is known, but it was not designed as a
cipher: the guarantee is computational and rests on this assumption.

Floating point. The low bits of a floating-point sum depend on both terms, so they reveal the sum through the noise
(Mironov 2012). Here both are rounded to whole multiples of one public power of two before
they are added (GRID_BITS), so every value that one data set can lead to can come from all others as well.
"""

import hashlib
import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch

from utils.draws import Draws, philox
from utils.seeding import derive_key

# The grid is 2^-GRID_BITS of the noise's scale. Rounding adds at most one step to the distance of two neighbouring
# sums in each of P coordinates, sqrt(P) steps in L2: for 4 million coordinates and a noise multiplier of 15 that is
# 7e-6 of the sensitivity, below the float32 rounding of the gradients. And the grid is 2^18 times coarser than the
# deviates, so that every step is hit.
GRID_BITS = 32


@dataclass(frozen=True)
class GridNoise:
    """Noise in whole multiples of `grid`, a power of two; grid 0: none."""

    multiples: torch.Tensor  # (D,) float64 on the CPU
    grid: float

    def add_to(self, total: torch.Tensor) -> torch.Tensor:
        """Total plus noise, float32, in the shape and on the device of `total`, which has D entries.

        The only place where noise is added to a sum. The result is a function of (total rounded to the grid) + noise
        only: scaling by a power of two is exact, and IEEE addition rounds the exact sum of two integers.
        """
        return self.added_to(total).float()

    def added_to(self, total: torch.Tensor) -> torch.Tensor:
        """The same in float64."""
        if self.grid == 0:
            return total.double()
        noise = self.multiples.to(total.device).view_as(total)
        steps = total.to(torch.float64, copy=True).div_(self.grid).round_()
        return steps.add_(noise).mul_(self.grid)


def on_grid(deviates: np.ndarray, scale: float) -> GridNoise:
    """Standard deviates (float64, overwritten) times `scale`, rounded to the grid that belongs to the scale."""
    if scale == 0:
        return GridNoise(torch.zeros(deviates.shape, dtype=torch.float64), 0.0)
    grid = grid_of(scale)
    return GridNoise(torch.from_numpy(deviates).mul_(scale / grid).round_(), grid)


def grid_of(scale: float) -> float:
    """The width of the grid for noise of this scale > 0: 2^(floor(log2 scale) - GRID_BITS)."""
    return math.ldexp(1.0, math.frexp(scale)[1] - 1 - GRID_BITS)


class NoiseSource:
    """Draws for mechanisms. With `seed=None` (always, outside tests) all of them start from OS entropy.

    A fixed seed makes a run repeatable and its noise public; the report then states `noise_seeded`. Seeded streams
    are derived per (release, step), so that a resumed test run equals an uninterrupted one.

    `key`: 32 secret bytes for everything on which all processes of a run must agree: the samples and the draws of the
    losses; None: fresh from the operating system. The noise does not come from it and is new at every call, so exactly
    one process may draw it.
    """

    def __init__(self, seed: int | None = None, key: bytes | None = None) -> None:
        self._seed = seed
        self.key = key or (secrets.token_bytes(32) if seed is None else derive_key(seed, "noise"))

    @property
    def seeded(self) -> bool:
        return self._seed is not None

    def gaussian(self, size: int, std: float, release: str, step: int) -> GridNoise:
        """`size` independent deviates of N(0, std^2)."""
        generator = self._noise_generator(f"gaussian/{release}/{step}")
        return on_grid(generator.standard_normal(size), std)

    def laplace(self, size: int, scale: float, release: str, step: int) -> GridNoise:
        """`size` independent deviates of Laplace(0, scale)."""
        generator = self._noise_generator(f"laplace/{release}/{step}")
        return on_grid(generator.laplace(size=size), scale)

    def sample(
        self, num_records: int, rate: float, release: str, step: int, max_size: int | None = None
    ) -> torch.Tensor:
        """Sorted indices of the records of one step, each with probability `rate`, independently (Poisson sampling); a
        sample of more than `max_size` is replaced by a uniformly random subset of that size. The same at every call.

        Exact: 64 random bits are below floor(rate * 2^64) with that probability, at most 2^-64 less than `rate`.
        """
        generator = philox(self._shared_key(f"poisson/{release}/{step}"))
        indices = np.arange(num_records)
        if rate < 1.0:
            bits = generator.bit_generator.random_raw(num_records)
            indices = indices[bits < np.uint64(math.floor(math.ldexp(rate, 64)))]
        if max_size is not None and len(indices) > max_size:
            indices = np.sort(generator.choice(indices, max_size, replace=False, shuffle=False))
        return torch.from_numpy(indices)

    def shards(self, num_records: int, count: int, release: str) -> np.ndarray:
        """(num_records,) int64: the shard of each record, independent and uniform, whatever the records are. So there
        is a coupling in which one record more or less moves no other to another shard. The same at every call."""
        return philox(self._shared_key(f"shards/{release}")).integers(count, size=num_records)

    def choice(self, count: int, release: str, step: int) -> int:
        """One of `count`, uniform and independent of all other steps. The same at every call."""
        return int(philox(self._shared_key(f"choice/{release}/{step}")).integers(count))

    def loss_draws(
        self, release: str, step: int, num_examples: int, device: str | torch.device = "cpu"
    ) -> Draws:
        """Secret randomness for one step's loss. It must not be repeatable: draws are dealt by position in the batch,
        so with known draws one record more would re-deal, and move, the contributions of all later ones. Unknown
        draws couple record by record between neighbouring sets, and the sensitivity is one clipped gradient."""
        return Draws(self._shared_key(f"loss/{release}/{step}"), 0, num_examples, device)

    def _noise_generator(self, stream: str) -> np.random.Generator:
        return philox(self._shared_key(stream) if self.seeded else secrets.token_bytes(16))

    def _shared_key(self, stream: str) -> bytes:
        return hashlib.blake2b(stream.encode(), key=self.key, digest_size=16).digest()
