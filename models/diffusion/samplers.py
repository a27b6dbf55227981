"""Samplers of the EDM family: functions of a denoiser, labels and a start (Karras et al. 2022)."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from models.diffusion.denoiser import Denoiser
from utils.sections import check_field, check_least, check_positive

# Most churn of one step (algorithm 2): the variance of the noise at most doubles.
MAX_GAMMA = math.sqrt(2) - 1


@dataclass(frozen=True)
class SamplerConfig:
    type: str  # ddim: deterministic Euler; edm: Heun with churn; dpmpp: DPM-Solver++(2M)
    num_steps: int  # grid points: n network calls for ddim and dpmpp, 2n - 1 for edm
    tmin: float
    tmax: float
    rho: float
    guid_scale: float  # guidance weight w; 0 = none
    s_churn: float  # edm only: how much noise is added back, over all steps; see MAX_GAMMA
    s_min: float  # edm only: churn between these noise levels
    s_max: float

    def __post_init__(self) -> None:
        check_field(self.type in SAMPLERS, "type", self.type, f"one of {', '.join(SAMPLERS)}")
        check_least(self, 2, "num_steps")
        check_field(0 < self.tmin < self.tmax, "tmin", self.tmin, f"between 0 and tmax = {self.tmax}")
        check_positive(self, "rho")
        check_field(self.guid_scale >= 0, "guid_scale", self.guid_scale, "0 (no guidance) or more")
        check_least(self, 0, "s_churn")


def noise_levels(config: SamplerConfig) -> list[float]:
    """The decreasing grid t_0 = tmax .. t_{n-1} = tmin (equation 5)."""
    high, low, last = config.tmax ** (1 / config.rho), config.tmin ** (1 / config.rho), config.num_steps - 1
    return [(high + i / last * (low - high)) ** config.rho for i in range(config.num_steps)]


def network_calls(config: SamplerConfig) -> int:
    """Evaluations of the network for one image."""
    calls = 2 * config.num_steps - 1 if config.type == "edm" else config.num_steps
    return calls * (1 if config.guid_scale == 0 else 2)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    config: SamplerConfig,
    shape: tuple[int, int, int],
    labels: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    """One image per label: (B,) -> (B, *shape) float32, nominally in [-1, 1]."""
    nothing = torch.zeros((len(labels), *shape), device=labels.device)
    return resample(denoiser, config, nothing, 0, labels, rng)


@torch.no_grad()
def resample(
    denoiser: Denoiser,
    config: SamplerConfig,
    images: torch.Tensor,
    first: int,
    labels: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    """Bring images (B, C, H, W) in [-1, 1] to level number `first` of the grid, and sample from there: the larger
    `first`, the more of them is left (SDEdit, Meng et al. 2022, arXiv:2108.01073)."""
    levels = noise_levels(config)[first:]
    start = images + levels[0] * torch.randn(images.shape, generator=rng, device=images.device)
    return SAMPLERS[config.type](denoiser, config, levels, start, labels, rng)


def _ddim(
    denoiser: Denoiser,
    config: SamplerConfig,
    levels: list[float],
    x: torch.Tensor,
    labels: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    """Euler steps of dx/dt = (x - D) / t, then one denoising at the last level."""
    for t, t_next in pairwise(levels):
        denoised = denoiser(x, _fill(t, labels), labels)
        x = x + (t_next - t) / t * (x - denoised)
    return denoiser(x, _fill(levels[-1], labels), labels)


def _edm(
    denoiser: Denoiser,
    config: SamplerConfig,
    levels: list[float],
    x: torch.Tensor,
    labels: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    """Stochastic second-order sampler (algorithm 2), S_noise = 1; the last step, to t = 0, is Euler."""
    for t, t_next in pairwise([*levels, 0.0]):
        churned = config.s_churn > 0 and config.s_min <= t <= config.s_max
        gamma = min(config.s_churn / config.num_steps, MAX_GAMMA) if churned else 0.0
        t_hat = t * (1 + gamma)
        if gamma > 0:
            extra = torch.randn(x.shape, generator=rng, device=x.device)
            x = x + extra * (t_hat**2 - t**2) ** 0.5
        slope = (x - denoiser(x, _fill(t_hat, labels), labels)) / t_hat
        moved = x + (t_next - t_hat) * slope
        if t_next > 0:
            slope_next = (moved - denoiser(moved, _fill(t_next, labels), labels)) / t_next
            moved = x + (t_next - t_hat) * (slope + slope_next) / 2
        x = moved
    return x


def _dpmpp(
    denoiser: Denoiser,
    config: SamplerConfig,
    levels: list[float],
    x: torch.Tensor,
    labels: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    """DPM-Solver++(2M), deterministic (Lu et al. 2022, arXiv:2211.01095, algorithm 2), then one denoising at the end.

    In lambda = -ln t the equation's linear part is solved exactly, and D is extrapolated linearly from its last two
    values: second order with one network call per step. alpha = 1, so exp(-h) = t_next / t.
    """
    before = h_before = None
    for t, t_next in pairwise(levels):
        denoised = denoiser(x, _fill(t, labels), labels)
        h = math.log(t / t_next)
        midway = denoised if before is None else denoised + h / (2 * h_before) * (denoised - before)
        x = t_next / t * x + (1 - t_next / t) * midway
        before, h_before = denoised, h
    return denoiser(x, _fill(levels[-1], labels), labels)


def _fill(t: float, labels: torch.Tensor) -> torch.Tensor:
    return torch.full((len(labels),), t, device=labels.device)


SAMPLERS = {"ddim": _ddim, "edm": _edm, "dpmpp": _dpmpp}
