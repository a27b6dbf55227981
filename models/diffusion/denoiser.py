"""EDM preconditioning (Karras et al. 2022, section 5): a network becomes a denoiser."""

import math
from collections.abc import Callable

import torch
from torch import nn

# images (B, C, H, W) + noise of std sigma (B,), labels (B,) -> estimate of the clean images
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SIGMA_DATA = math.sqrt(1.0 / 3.0)  # std of a uniform on [-1, 1]: a constant, never estimated from data


def denoise(
    network: nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """D(x; sigma, y) = c_skip x + c_out F(c_in x, ln(sigma) / 4, y); sigma (B,)."""
    s = sigma[:, None, None, None]
    total = s**2 + SIGMA_DATA**2
    c_skip, c_out, c_in = SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt(), total.rsqrt()
    return c_skip * noisy + c_out * network(c_in * noisy, sigma.log() / 4, labels)


def guided(network: nn.Module, guidance: float) -> Denoiser:
    """The denoiser for sampling: (1 + w) D(x, y) - w D(x, null) for guidance weight w (Ho & Salimans 2022)."""

    def call(noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        conditional = denoise(network, noisy, sigma, labels)
        if guidance == 0:
            return conditional
        null = torch.full_like(labels, network.null_label)
        return (1 + guidance) * conditional - guidance * denoise(network, noisy, sigma, null)

    return call
