"""Scattering features: fixed wavelets, no weights, no training (Bruna and Mallat 2013, arXiv:1203.1513)."""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.spec import DataSpec
from utils.images import to_float

if TYPE_CHECKING:
    import torch

SCALES, ANGLES = 2, 8  # J and L
STEP = 2**SCALES  # pixels between two positions at which coefficients are kept
NUM_CHANNELS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2  # of one colour channel: 81
AT_ONCE = 32  # images, whose coefficients fit into the cache of a processor
GROUPS = 27  # of the group norm (Tramèr and Boneh 2021, arXiv:2011.11660, section 3)


class ScatteringExtractor:
    """Two layers of Morlet wavelets (J = 2, L = 8), group-normalised per image.

    81 coefficients per colour channel at every fourth pixel: 3,969 features of a grey image of 28 pixels. Each image is
    normalised by itself, never by statistics of a set. Resolutions that 4 does not divide are padded by reflection.
    """

    name = "scattering"

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        import torch

        self.identity = f"v2, J={SCALES}, L={ANGLES}, {GROUPS} groups"
        self.info = {"J": str(SCALES), "L": str(ANGLES)}
        self.device = device
        height = spec.resolution + -spec.resolution % STEP + 2 * STEP
        lowpass, bands = filter_bank(height)
        self._lowpass = torch.tensor(lowpass, dtype=torch.float32, device=device)
        self._lowpass_at_half = 4 * _every(self._lowpass, 2)
        self._bands = torch.tensor(bands, dtype=torch.float32, device=device)  # (J, L, H, W)

    @classmethod
    def check(cls, weights_root: Path) -> None:
        """Always available."""

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, None]":
        import torch

        with torch.no_grad():
            parts = [self._scatter(to_float(part, self.device)) for part in images.split(AT_ONCE)]
            return torch.nn.functional.group_norm(torch.cat(parts), GROUPS).flatten(1), None

    def _scatter(self, images: "torch.Tensor") -> "torch.Tensor":
        """(B, C, H, W) in [-1, 1] -> (B, 81 C, H/4, W/4), the coefficients before normalisation."""
        import torch

        extra = -images.shape[2] % STEP
        padded = torch.nn.functional.pad(images, (STEP, STEP + extra, STEP, STEP + extra), mode="reflect")
        spectrum = torch.fft.fft2(padded)
        whole, half = self._lowpass, self._lowpass_at_half
        # (B, C, L, H, W), and for the coarser wavelets, which carry no finer detail, at every other pixel
        fine = torch.fft.fft2(self._modulus(spectrum, self._bands[0], 1))
        coarse = torch.fft.fft2(self._modulus(spectrum, self._bands[1], 2))
        second = torch.fft.fft2(self._modulus(fine, self._bands[1], 2))  # (B, C, L, L, H / 2, W / 2)
        coefficients = [self._average(spectrum, whole, STEP)[:, :, None], self._average(fine, whole, STEP)]
        coefficients += [
            self._average(coarse, half, STEP // 2),
            self._average(second, half, STEP // 2).flatten(2, 3),
        ]
        return torch.cat(coefficients, dim=2).flatten(1, 2)

    @staticmethod
    def _modulus(spectrum: "torch.Tensor", bands: "torch.Tensor", step: int) -> "torch.Tensor":
        """|x * band| at every `step`-th pixel, for each of the bands."""
        import torch

        return torch.fft.ifft2(_every(spectrum[..., None, :, :] * bands, step)).abs()

    @staticmethod
    def _average(spectrum: "torch.Tensor", lowpass: "torch.Tensor", step: int) -> "torch.Tensor":
        """Low-pass filter and keep every `step`-th pixel, without the padding."""
        import torch

        return torch.fft.ifft2(_every(spectrum * lowpass, step)).real[..., 1:-1, 1:-1]


def _every(spectrum: "torch.Tensor", step: int) -> "torch.Tensor":
    """The spectrum (..., H / step, W / step) of every `step`-th pixel: the frequencies that then look alike add up."""
    height, width = spectrum.shape[-2] // step, spectrum.shape[-1] // step
    columns = spectrum.unflatten(-1, (step, width)).sum(-2)
    return columns.unflatten(-2, (step, height)).sum(-3) / step**2


@functools.lru_cache(maxsize=4)
def filter_bank(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequency responses of the low-pass filter (size, size) and of the wavelets (J, L, size, size); all are real.

    Morlet wavelets with the constants of Andén et al. 2020 (Kymatio): sigma 0.8 * 2^j, centre 3 pi / 4 / 2^j, slant
    4 / L.
    """
    lowpass = _gabor(size, 0.8 * 2 ** (SCALES - 1), 0.0, 0.0, 1.0)
    lowpass /= lowpass.sum()
    bands = np.empty((SCALES, ANGLES, size, size))
    for scale in range(SCALES):
        for angle in range(ANGLES):
            shape = (0.8 * 2**scale, angle * math.pi / ANGLES)
            wave = _gabor(size, *shape, 3 * math.pi / 4 / 2**scale, 4 / ANGLES)
            envelope = _gabor(size, *shape, 0.0, 4 / ANGLES)
            bands[scale, angle] = np.fft.fft2(wave - envelope * wave.sum() / envelope.sum()).real
    return np.fft.fft2(lowpass).real, bands


def _gabor(size: int, sigma: float, angle: float, frequency: float, slant: float) -> np.ndarray:
    """A Gaussian times a complex wave on a periodic grid (size, size), with its centre at the origin."""
    total = np.zeros((size, size), np.complex128)
    axis = np.arange(size, dtype=np.float64)
    for row_shift in (-2, -1, 0, 1, 2):
        for column_shift in (-2, -1, 0, 1, 2):
            y, x = np.meshgrid(axis + row_shift * size, axis + column_shift * size, indexing="ij")
            along = x * math.cos(angle) + y * math.sin(angle)
            across = y * math.cos(angle) - x * math.sin(angle)
            distance = along**2 + (slant * across) ** 2
            total += np.exp(-distance / (2 * sigma**2) + 1j * frequency * along)
    return total / (2 * math.pi * sigma**2 / slant)
