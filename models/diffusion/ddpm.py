"""Noise-predicting diffusion on a discrete schedule (Ho et al. 2020), as in latent diffusion (Rombach et al. 2022).

The noisy latent at timestep t is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, with a_t the product of 1 - beta up to t; the
network sees x_t and t, and estimates e. Divided by sqrt(a_t) this is x_0 + sigma_t e with sigma_t^2 = (1 - a_t) / a_t:
the sampler below works in that scale, as those of models/diffusion/samplers.py do. Legend: B batch, K noise draws.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from utils.draws import Draws
from utils.sections import check_field, check_least


@dataclass(frozen=True)
class ScheduleConfig:
    num_timesteps: int
    beta_start: float  # beta of the first timestep
    beta_end: float  # beta of the last one
    type: str  # between them: linear, or scaled_linear, where sqrt(beta) is

    def __post_init__(self) -> None:
        check_least(self, 2, "num_timesteps")
        allowed = f"above 0 and at most beta_end = {self.beta_end}"
        check_field(0 < self.beta_start <= self.beta_end, "beta_start", self.beta_start, allowed)
        check_field(self.beta_end < 1, "beta_end", self.beta_end, "below 1")
        known = ("linear", "scaled_linear")
        check_field(self.type in known, "type", self.type, f"one of {', '.join(known)}")

    def sigmas(self) -> torch.Tensor:
        """(num_timesteps,) float32, increasing: the noise level of each timestep."""
        power = 2 if self.type == "scaled_linear" else 1
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        betas = torch.linspace(*ends, self.num_timesteps, dtype=torch.float64) ** power
        kept = torch.cumprod(1 - betas, dim=0)
        return ((1 - kept) / kept).sqrt().float()


@dataclass(frozen=True)
class NoiseLossConfig:
    n_noise_samples: int  # K noise draws per example, averaged before clipping
    label_dropout: float  # probability that an example is shown without its label

    def __post_init__(self) -> None:
        check_least(self, 1, "n_noise_samples")
        check_field(0 <= self.label_dropout <= 1, "label_dropout", self.label_dropout, "in [0, 1]")


@dataclass(frozen=True)
class DDIMConfig:
    type: str  # ddim
    num_steps: int  # timesteps that are visited, evenly spaced
    eta: float  # 0: deterministic; 1: as much fresh noise as the forward process has
    guid_scale: float  # guidance weight w; 0 = none

    def __post_init__(self) -> None:
        check_field(self.type == "ddim", "type", self.type, "ddim for a network that predicts noise")
        check_least(self, 1, "num_steps")
        check_field(0 <= self.eta <= 1, "eta", self.eta, "in [0, 1]")


def predict_noise(
    network: nn.Module,
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The noise e of noisy = x_0 + sigma_t e, (B, Z, h, w); timesteps (B,) int64."""
    sigma = sigmas[timesteps][:, None, None, None]
    return network(noisy * (1 + sigma**2).rsqrt(), timesteps.float(), labels)


class NoiseLoss:
    """(network, latents (B, Z, h, w), labels (B,), rng) -> (B,) mean squared errors of the noise, each the mean over K
    draws of timestep and noise.

    The K draws are averaged here, before any clipping: each example contributes one vector. Label dropout is drawn
    once per example.
    """

    def __init__(
        self,
        config: NoiseLossConfig,
        sigmas: torch.Tensor,
        unconditional: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.config = config
        self.sigmas = sigmas
        self.autocast = autocast  # context of the network's forward pass
        self.label_dropout = 1.0 if unconditional else config.label_dropout

    def __call__(
        self, network: nn.Module, latents: torch.Tensor, labels: torch.Tensor, rng: Draws
    ) -> torch.Tensor:
        draws = self.config.n_noise_samples
        labels = torch.where(rng.uniform() < self.label_dropout, network.null_label, labels)
        timesteps = (rng.uniform(draws) * len(self.sigmas)).long().flatten()
        noise = rng.normal(draws, *latents.shape[1:]).flatten(0, 1)  # the draws of one example adjacent
        noisy = latents.repeat_interleave(draws, dim=0) + self.sigmas[timesteps][:, None, None, None] * noise
        with self.autocast():
            estimate = predict_noise(network, noisy, self.sigmas, timesteps, labels.repeat_interleave(draws))
        return (estimate - noise).square().flatten(1).mean(1).reshape(len(latents), draws).mean(1)


@torch.no_grad()
def sample_ddim(
    network: nn.Module,
    sigmas: torch.Tensor,
    config: DDIMConfig,
    shape: tuple[int, ...],
    labels: torch.Tensor,
    rng: torch.Generator,
) -> torch.Tensor:
    """One latent per label: (B,) -> (B, *shape) (Song et al. 2021, equation 12).

    The timesteps are spaced so that the last one, where sampling starts, is among them; the published code starts at
    the last but three, from noise that is a little too strong there.
    """

    def noise() -> torch.Tensor:
        return torch.randn((len(labels), *shape), generator=rng, device=labels.device)

    def estimate(x: torch.Tensor, timestep: int) -> torch.Tensor:
        timesteps = torch.full_like(labels, timestep)
        conditional = predict_noise(network, x, sigmas, timesteps, labels)
        if config.guid_scale == 0:
            return conditional
        null = torch.full_like(labels, network.null_label)
        without = predict_noise(network, x, sigmas, timesteps, null)
        return (1 + config.guid_scale) * conditional - config.guid_scale * without

    levels = sigmas.tolist()
    x = noise() * (1 + levels[-1] ** 2) ** 0.5
    visited = [len(levels) * (i + 1) // config.num_steps - 1 for i in range(config.num_steps)]
    for step in range(config.num_steps - 1, -1, -1):
        sigma, sigma_next = levels[visited[step]], levels[visited[step - 1]] if step else 0.0
        direction = estimate(x, visited[step])
        fresh = config.eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
        x = x - sigma * direction + (sigma_next**2 - fresh**2) ** 0.5 * direction
        if fresh > 0:
            x = x + fresh * noise()
    return x
