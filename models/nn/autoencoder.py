"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, appendix E).

Stock layers only, GroupNorm throughout: no image influences another, so private images may be encoded one by one.
Legend: B batch, C image channels, H W pixels, Z latent channels, h w = H W / factor.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.nn.layers import Upsample, conv3x3
from models.nn.unet import level_sizes

RES_BLOCKS = 2  # per level of the encoder; the decoder has one more


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents: mean and log-variance, (B, Z, h, w) each."""

    mean: torch.Tensor
    log_variance: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std * noise, noise (B, Z, h, w) standard normal."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def divergence(self) -> torch.Tensor:
        """(B,) KL divergence from the standard normal, summed over all coordinates."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)


class Pixels(nn.Module):
    """No autoencoder: the latents are the pixels, for networks that were made for those."""

    scale = 1.0

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.latent_shape = image_shape

    def encode(self, images: torch.Tensor) -> Posterior:
        return Posterior(images, torch.full_like(images, -torch.inf))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class Autoencoder(nn.Module):
    """encode: (B, C, H, W) in [-1, 1] -> Posterior; decode: (B, Z, h, w) -> (B, C, H, W), nominally in [-1, 1].

    ch: base width; ch_mult: width factor per level, each level at half the resolution, so the factor is
    2 ** (len(ch_mult) - 1); attn_resolutions: levels, by pixels, that attend; the middle always does.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        latent_channels: int,
        ch: int,
        ch_mult: list[int],
        attn_resolutions: list[int],
    ) -> None:
        super().__init__()
        sizes = level_sizes(image_size, len(ch_mult))  # those on the way up are the same, odd ones included
        attends = [size in attn_resolutions for size in sizes]
        self.latent_shape = (latent_channels, sizes[-1], sizes[-1])
        self.encoder = _Encoder(channels, 2 * latent_channels, ch, ch_mult, attends)
        self.decoder = _Decoder(channels, latent_channels, ch, ch_mult, attends, sizes)
        self.to_posterior = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.from_latent = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: torch.Tensor) -> Posterior:
        mean, log_variance = self.to_posterior(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.from_latent(latents))


class _Encoder(nn.Sequential):
    def __init__(
        self, channels: int, out_channels: int, ch: int, ch_mult: list[int], attends: list[bool]
    ) -> None:
        layers, width = [conv3x3(channels, ch)], ch
        for level, factor in enumerate(ch_mult):
            if level > 0:
                layers.append(_Downsample(width))
            for _ in range(RES_BLOCKS):
                layers += _block(width, factor * ch, attends[level])
                width = factor * ch
        super().__init__(*layers, *_middle(width), *_output(width, out_channels))


class _Decoder(nn.Sequential):
    def __init__(
        self,
        channels: int,
        latent_channels: int,
        ch: int,
        ch_mult: list[int],
        attends: list[bool],
        sizes: list[int],
    ) -> None:
        width = ch_mult[-1] * ch
        layers = [conv3x3(latent_channels, width), *_middle(width)]
        for level, factor in reversed(list(enumerate(ch_mult))):
            for _ in range(RES_BLOCKS + 1):
                layers += _block(width, factor * ch, attends[level])
                width = factor * ch
            if level > 0:
                layers.append(Upsample(width, sizes[level - 1]))
        super().__init__(*layers, *_output(width, channels))


def _block(in_channels: int, out_channels: int, attention: bool) -> list[nn.Module]:
    block = _ResidualBlock(in_channels, out_channels)
    return [block, _Attention(out_channels)] if attention else [block]


def _middle(width: int) -> list[nn.Module]:
    return [_ResidualBlock(width, width), _Attention(width), _ResidualBlock(width, width)]


def _output(width: int, channels: int) -> list[nn.Module]:
    return [_norm(width), nn.SiLU(), conv3x3(width, channels)]


class _ResidualBlock(nn.Module):
    """x + two times (norm, SiLU, conv)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            _norm(in_channels),
            nn.SiLU(),
            conv3x3(in_channels, out_channels),
            _norm(out_channels),
            nn.SiLU(),
            conv3x3(out_channels, out_channels),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.change(x)


class _Attention(nn.Module):
    """x + single-head self-attention over the positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.query, self.key, self.value, self.output = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        query, key, value = (
            layer(h).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, HW, channels)
        return x + self.output(mixed.transpose(1, 2).reshape(x.shape))


class _Downsample(nn.Module):
    """Half the resolution, rounded up: the published padding to the right and below, one pixel more where odd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = 1 + x.shape[-1] % 2
        return self.conv(F.pad(x, (0, extra, 0, extra)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, max(channels // 4, 1)), channels, eps=1e-6)
