"""Discrete noise schedules, and the choice of a few of their timesteps (Nichol & Dhariwal 2021, arXiv:2102.09672).

A schedule is alpha-bar, (T,) float64, decreasing: x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise.
"""

import math

import torch

from utils.arguments import WHOLE
from utils.errors import FieldError

MAX_BETA = 0.999  # keeps the last alpha-bar of the cosine schedule above 0


def cosine_schedule(num_timesteps: int) -> torch.Tensor:
    """alpha-bar proportional to cos^2, with an offset of 0.008 at t = 0 (equation 17)."""

    def height(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [height((t + 1) / num_timesteps) / height(t / num_timesteps) for t in range(num_timesteps)]
    return torch.tensor(ratios, dtype=torch.float64).clamp(min=1 - MAX_BETA).cumprod(0)


def linear_schedule(num_timesteps: int) -> torch.Tensor:
    """beta linear from 1e-4 to 0.02 for 1000 timesteps (Ho et al. 2020), in proportion larger for fewer."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def respaced(num_timesteps: int, respacing: str) -> list[int]:
    """The increasing timesteps that are kept: "100": that many, evenly spaced, ends included; "ddim100": that many at
    one whole stride, from 0 on; "10,20": the range in equal parts, each with so many of its own.

    Raises FieldError where it cannot be.
    """
    if respacing.startswith("ddim"):
        return _strided(num_timesteps, respacing)
    counts = [int(part) for part in respacing.split(",") if WHOLE.fullmatch(part.strip())]
    if len(counts) != len(respacing.split(",")):
        raise _refused(respacing, "a number such as 100, ddim100, or a list such as 10,20")
    borders = [_border(part, len(counts), num_timesteps) for part in range(len(counts) + 1)]
    kept = []
    for count, start, end in zip(counts, borders, borders[1:], strict=False):
        if not 1 <= count <= end - start:
            raise _refused(respacing, f"at least 1, and at most {end - start} of {end - start} timesteps")
        stride = (end - start - 1) / (count - 1) if count > 1 else 1
        kept += [start + round(stride * index) for index in range(count)]
    return kept


def _border(part: int, num_parts: int, num_timesteps: int) -> int:
    """First timestep of a part; where they cannot be equal the first ones are longer by one."""
    size, longer = divmod(num_timesteps, num_parts)
    return part * size + min(part, longer)


def _strided(num_timesteps: int, respacing: str) -> list[int]:
    count = respacing.removeprefix("ddim")
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if str(len(kept)) == count:
            return list(kept)
    raise _refused(respacing, f"ddim and a number that a whole stride over {num_timesteps} timesteps gives")


def _refused(respacing: str, allowed: str) -> FieldError:
    return FieldError(f"timestep_respacing: '{respacing}' is not allowed; it must be {allowed}")
