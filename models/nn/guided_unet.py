"""The UNet of OpenAI's improved-diffusion and guided-diffusion checkpoints.

Nichol & Dhariwal 2021 (arXiv:2102.09672) and Dhariwal & Nichol 2021 (arXiv:2105.05233). Modules stand where they stand
in the published networks, so that the published weights load by name. Legend: B batch, C channels, H W pixels, L = H W.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils.sections import check_field

NORM_GROUPS = 32


@dataclass(frozen=True)
class GuidedUNetConfig:
    image_size: int  # pixels
    num_channels: int  # base width, a multiple of NORM_GROUPS
    channel_mult: list[int]  # width factor per level, each level at half the resolution
    num_res_blocks: int  # residual blocks per level
    attention_resolutions: list[int]  # pixels of the levels that attend
    num_heads: int  # of every attention block
    num_classes: int | None  # None: the network knows no labels
    learn_sigma: bool  # the network also estimates the variance of a step, which DDIM does not use
    use_scale_shift_norm: (
        bool  # timestep and label scale and shift the second norm of a block; False: are added
    )
    resblock_updown: bool  # residual blocks change the resolution; False: a convolution does

    def __post_init__(self) -> None:
        fits = self.num_channels > 0 and self.num_channels % NORM_GROUPS == 0
        check_field(fits, "num_channels", self.num_channels, f"a positive multiple of {NORM_GROUPS}")


class GuidedUNet(nn.Module):
    """network(noisy (B, 3, H, W), timesteps (B,), labels (B,) or None) -> (B, 3 or 6, H, W): the noise, and with
    `learn_sigma` three more channels."""

    def __init__(self, config: GuidedUNetConfig) -> None:
        super().__init__()
        self.width = config.num_channels
        self._config, self._embedded = config, 4 * config.num_channels
        self.time_embed = nn.Sequential(
            nn.Linear(self.width, self._embedded), nn.SiLU(), nn.Linear(self._embedded, self._embedded)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, self._embedded)
        first = config.channel_mult[0] * self.width
        self.input_blocks = nn.ModuleList([_Steps(nn.Conv2d(3, first, 3, padding=1))])
        kept, channels, size = self._go_down(first)
        self.middle_block = _Steps(self._block(channels), self._attention(channels), self._block(channels))
        self.output_blocks = nn.ModuleList()
        channels = self._go_up(kept, channels, size)
        num_out = 6 if config.learn_sigma else 3
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), _zeroed(nn.Conv2d(first, num_out, 3, padding=1)))

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        embedded = self.time_embed(sinusoids(timesteps, self.width))
        if labels is not None:
            embedded = embedded + self.label_emb(labels)
        hidden, kept = noisy, []
        for block in self.input_blocks:
            hidden = block(hidden, embedded)
            kept.append(hidden)
        hidden = self.middle_block(hidden, embedded)
        for block in self.output_blocks:
            hidden = block(torch.cat([hidden, kept.pop()], dim=1), embedded)
        return self.out(hidden)

    def _go_down(self, channels: int) -> tuple[list[int], int, int]:
        """Fill input_blocks; returns the widths that skip connections carry, the last width and the smallest size."""
        config, kept, size = self._config, [channels], self._config.image_size
        for level, factor in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                steps = [self._block(channels, factor * self.width)]
                channels = factor * self.width
                self.input_blocks.append(_Steps(*steps, *self._attention_at(size, channels)))
                kept.append(channels)
            if level < len(config.channel_mult) - 1:
                down = (
                    self._block(channels, change="down") if config.resblock_updown else _Downsample(channels)
                )
                self.input_blocks.append(_Steps(down))
                kept.append(channels)
                size //= 2
        return kept, channels, size

    def _go_up(self, kept: list[int], channels: int, size: int) -> int:
        """Fill output_blocks; returns the last width."""
        config = self._config
        for level in reversed(range(len(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                width = config.channel_mult[level] * self.width
                steps = [self._block(channels + kept.pop(), width), *self._attention_at(size, width)]
                channels = width
                if level > 0 and index == config.num_res_blocks:
                    up = self._block(channels, change="up") if config.resblock_updown else _Upsample(channels)
                    steps.append(up)
                    size *= 2
                self.output_blocks.append(_Steps(*steps))
        return channels

    def _block(self, channels: int, out: int | None = None, change: str = "none") -> "_ResBlock":
        return _ResBlock(channels, out or channels, self._embedded, self._config.use_scale_shift_norm, change)

    def _attention(self, channels: int) -> "_Attention":
        return _Attention(channels, self._config.num_heads)

    def _attention_at(self, size: int, channels: int) -> list["_Attention"]:
        return [self._attention(channels)] if size in self._config.attention_resolutions else []


def sinusoids(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    """(B,) -> (B, width): cosines, then sines, of frequencies from 1 down to 1 / 10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Steps(nn.Sequential):
    """Modules in turn; residual blocks are also shown the embedding of timestep and label."""

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        for step in self:
            hidden = step(hidden, embedded) if isinstance(step, _ResBlock) else step(hidden)
        return hidden


class _ResBlock(nn.Module):
    """Two convolutions; `change` ("up", "down") of the resolution comes before the first."""

    def __init__(self, channels: int, out: int, embedded: int, scale_shift: bool, change: str) -> None:
        super().__init__()
        self._scale_shift, self._change = scale_shift, change
        self.in_layers = nn.Sequential(_norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, 2 * out if scale_shift else out))
        # Position 2 is dropout in training, which these checkpoints were made without.
        self.out_layers = nn.Sequential(
            _norm(out), nn.SiLU(), nn.Identity(), _zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        norm, activation, convolution = self.in_layers
        hidden, x = self._resized(activation(norm(x))), self._resized(x)
        hidden = convolution(hidden)
        shift = self.emb_layers(embedded)[:, :, None, None]
        if self._scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + shift)
        return self.skip_connection(x) + hidden

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        if self._change == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self._change == "down" else x


class _Attention(nn.Module):
    """Self-attention over positions. The channels of `qkv` are ordered by head, then by query, key and value."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)  # (B, C, L)
        heads = self.qkv(self.norm(flat)).unflatten(1, (self._num_heads, 3, -1)).transpose(-1, -2)
        query, key, value = heads.unbind(2)  # (B, heads, L, C / heads) each
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(attended.transpose(-1, -2).flatten(1, 2)).view_as(x)


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels)


def _zeroed(module: nn.Module) -> nn.Module:
    """The last layer of a branch: an untrained network is the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
