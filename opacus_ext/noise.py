"""Privacy noise and secret sampling: seeded by the operating system, apart from the experiment seed."""

import hashlib
import secrets

import torch

from utils.draws import Draws
from utils.seeding import derive_key, derive_seed


class NoiseSource:
    """Draws for mechanisms. With `seed=None` (always, outside tests) every generator starts from OS entropy.

    A fixed seed makes a run repeatable and its noise public: the report then says `noise_seeded`. Seeded streams
    are derived per (release, step), so that a resumed test run equals an uninterrupted one.

    `key`: 32 secret bytes that all processes of a run must share; None: fresh from the operating system.
    """

    def __init__(self, seed: int | None = None, key: bytes | None = None) -> None:
        self._seed = seed
        self.key = key or (secrets.token_bytes(32) if seed is None else derive_key(seed, "noise"))
        self._generators: dict[str, torch.Generator] = {}

    @property
    def seeded(self) -> bool:
        return self._seed is not None

    def gaussian(
        self, shape: tuple[int, ...], std: float, release: str, step: int, device="cpu"
    ) -> torch.Tensor:
        """Independent N(0, std^2) of `shape`, float32 on `device`."""
        generator = self._generator(f"gaussian/{release}/{step}", device)
        return torch.randn(shape, generator=generator, device=device).mul_(std)

    def laplace(self, shape: tuple[int, ...], scale: float, release: str, step: int) -> torch.Tensor:
        """Independent Laplace(0, scale) of `shape`, float64: the difference of two exponentials."""
        generator = self._generator(f"laplace/{release}/{step}", "cpu")
        uniform = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
        exponential = -torch.log1p(-uniform)
        return (exponential[0] - exponential[1]) * scale

    def inclusion_mask(self, num_records: int, rate: float, release: str, step: int) -> torch.Tensor:
        """(num_records,) bool, each True with probability `rate`, independently."""
        generator = self._generator(f"poisson/{release}/{step}", "cpu")
        return torch.rand(num_records, generator=generator, dtype=torch.float64) < rate

    def loss_draws(self, release: str, step: int, num_examples: int, device="cpu") -> Draws:
        """Secret randomness for one step's loss. It must not be repeatable: draws are dealt by position in the batch,
        so with known draws one record more would re-deal, and move, the contributions of all later ones. Unknown
        draws couple record by record between neighbouring sets, and the sensitivity is one clipped gradient."""
        return Draws(self._stream_key(f"loss/{release}/{step}"), 0, num_examples, device)

    def _stream_key(self, stream: str) -> bytes:
        return hashlib.blake2b(stream.encode(), key=self.key, digest_size=32).digest()

    def _generator(self, stream: str, device) -> torch.Generator:
        if self._seed is not None:
            return torch.Generator(device=device).manual_seed(derive_seed(self._seed, stream))
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device=device).manual_seed(secrets.randbits(63))
        return self._generators[key]
