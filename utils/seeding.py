"""Named random generators: every use of randomness has a name, and its own stream derived from the seed.

Privacy noise and Poisson sampling do not come from here: see opacus_ext/noise.py.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_key(seed: int, name: str) -> bytes:
    """32 bytes for the stream `name` of the experiment seed; equal inputs give equal streams."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def derive_seed(seed: int, name: str) -> int:
    """The same as a 63-bit number, for generators that are seeded with one."""
    return int.from_bytes(derive_key(seed, name)[:8], "big") >> 1


def torch_rng(seed: int, name: str, device: "str | torch.device" = "cpu") -> "torch.Generator":
    """A torch.Generator on `device` for the stream `name`."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(seed, name))
    return generator


def numpy_rng(seed: int, name: str) -> np.random.Generator:
    """A NumPy generator for the stream `name`."""
    return np.random.default_rng(derive_seed(seed, name))


@contextmanager
def seeded(seed: int, name: str, device: "str | torch.device" = "cpu") -> Iterator[None]:
    """Inside, PyTorch's global generators start from the stream `name` (initial weights, dropout); outside, those of
    the CPU and of `device` are as before."""
    import torch

    device = torch.device(device)
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, name))
        yield
