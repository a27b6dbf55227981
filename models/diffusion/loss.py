"""The EDM training loss, one value per example."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from models.diffusion.denoiser import SIGMA_DATA, denoise
from utils.draws import Draws
from utils.sections import check_field, check_least


@dataclass(frozen=True)
class LossConfig:
    p_mean: float  # mean of ln sigma
    p_std: float  # standard deviation of ln sigma
    n_noise_samples: int  # K noise draws per example, averaged before clipping
    label_dropout: float  # probability that an example is shown without its label

    def __post_init__(self) -> None:
        check_least(self, 1, "n_noise_samples")
        check_field(0 <= self.label_dropout <= 1, "label_dropout", self.label_dropout, "in [0, 1]")
        check_least(self, 0, "p_std")


class EDMLoss:
    """(network, images (B, C, H, W), labels (B,), rng) -> (B,) weighted squared errors, each the mean over K draws.

    The K draws are averaged here, before any clipping: each example still contributes one vector (noise
    multiplicity, Dockhorn et al. 2023). Label dropout is drawn once per example.
    """

    def __init__(
        self,
        config: LossConfig,
        unconditional: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.config = config
        self.autocast = autocast  # context of the network's forward pass
        self.label_dropout = 1.0 if unconditional else config.label_dropout

    def __call__(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, rng: Draws
    ) -> torch.Tensor:
        draws = self.config.n_noise_samples
        dropped = rng.uniform() < self.label_dropout
        labels = torch.where(dropped, network.null_label, labels)
        clean = images.repeat_interleave(draws, dim=0)  # (B*K, C, H, W), the draws of one example adjacent
        sigma = (rng.normal(draws) * self.config.p_std + self.config.p_mean).exp().flatten()
        noise = rng.normal(draws, *images.shape[1:]).flatten(0, 1)
        noisy = clean + noise * sigma[:, None, None, None]
        with self.autocast():
            error = denoise(network, noisy, sigma, labels.repeat_interleave(draws)) - clean
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        return (weight * error.square().flatten(1).mean(1)).reshape(len(images), draws).mean(1)
