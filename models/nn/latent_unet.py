"""The UNet of latent diffusion: residual blocks and spatial transformers that attend to a class token (Rombach et al.
2022, arXiv:2112.10752; layout of Dhariwal & Nichol 2021, arXiv:2105.05233).

Cross-attention alone carries the class. The published benchmark gives cross-attention one token, the class:
a softmax over one token is constant, so query and key weights get no gradient, and under DP-SGD they do nothing but a
random walk of noise. Here the context has two tokens, the class and the null label, between which every position
chooses; the null label's row is in the published table already, so the number of parameters is the published one.

Stock layers only, GroupNorm throughout: no example influences another. Legend: B batch, Z latent channels, h w latent
pixels, D width of a block, T = h w positions.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.nn.layers import Upsample, conv3x3
from models.nn.unet import level_sizes, sinusoidal_embedding


class LatentUNet(nn.Module):
    """(latents (B, Z, h, w), noise condition (B,), labels (B,)) -> (B, Z, h, w).

    Labels run from 0 to label_dim - 1; `null_label` (= label_dim) stands for "no label". nf: base width; ch_mult:
    width factor per level; attn_resolutions: levels, by latent pixels, with transformers; the middle always has one.
    head_width: channels per attention head; context_dim: width of a token.
    """

    def __init__(
        self,
        *,
        latent_size: int,
        channels: int,
        label_dim: int,
        nf: int,
        ch_mult: list[int],
        attn_resolutions: list[int],
        num_res_blocks: int,
        head_width: int,
        context_dim: int,
    ) -> None:
        super().__init__()
        self.null_label = label_dim
        self.nf = nf
        condition = 4 * nf
        self.label_embedding = nn.Embedding(label_dim + 1, context_dim)
        self.condition = nn.Sequential(nn.Linear(nf, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.input_conv = conv3x3(channels, nf)

        def stage(in_channels: int, out_channels: int, attends: bool) -> _Stage:
            transformer = SpatialTransformer(out_channels, head_width, context_dim) if attends else None
            return _Stage(ResidualBlock(in_channels, out_channels, condition), transformer)

        sizes = level_sizes(latent_size, len(ch_mult))
        attends = [size in attn_resolutions for size in sizes]
        skips, width = [nf], nf
        self.down = nn.ModuleList()
        for level, factor in enumerate(ch_mult):
            if level > 0:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            for _ in range(num_res_blocks):
                self.down.append(stage(width, factor * nf, attends[level]))
                width = factor * nf
                skips.append(width)

        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])

        self.up = nn.ModuleList()
        for level, factor in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(width + skips.pop(), factor * nf, attends[level]))
                width = factor * nf
            if level > 0:
                self.up.append(Upsample(width, sizes[level - 1]))
        assert not skips

        self.output_norm = _norm(width)
        self.output_conv = _zero(conv3x3(width, channels))

    def forward(
        self, latents: torch.Tensor, noise_condition: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        condition = F.silu(self.condition(sinusoidal_embedding(noise_condition, self.nf)))
        tokens = torch.stack([labels, torch.full_like(labels, self.null_label)], dim=1)
        context = self.label_embedding(tokens)  # (B, 2, context_dim)
        h = self.input_conv(latents)
        skips = [h]
        for stage in self.down:
            h = stage(h, condition, context) if isinstance(stage, _Stage) else stage(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, condition, context)
        for stage in self.up:
            if isinstance(stage, _Stage):
                h = stage(torch.cat([h, skips.pop()], dim=1), condition, context)
            else:
                h = stage(h)
        return self.output_conv(F.silu(self.output_norm(h)))

    def transformers(self) -> "list[SpatialTransformer]":
        """All spatial transformers, in the order in which they are passed."""
        stages = [*self.down, *self.middle, *self.up]
        return [s.transformer for s in stages if isinstance(s, _Stage) and s.transformer is not None]


class _Stage(nn.Module):
    """A residual block, followed by a transformer where there is one."""

    def __init__(self, block: "ResidualBlock", transformer: "SpatialTransformer | None") -> None:
        super().__init__()
        self.block = block
        self.transformer = transformer

    def forward(self, h: torch.Tensor, condition: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.block(h, condition)
        return h if self.transformer is None else self.transformer(h, context)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, + condition, norm, SiLU, conv; added to the shortcut. `condition` (B, 4 nf)."""

    def __init__(self, in_channels: int, out_channels: int, condition: int) -> None:
        super().__init__()
        self.norm_in = _norm(in_channels)
        self.conv_in = conv3x3(in_channels, out_channels)
        self.condition = nn.Linear(condition, out_channels)
        self.norm_out = _norm(out_channels)
        self.conv_out = _zero(conv3x3(out_channels, out_channels))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.condition(condition)[:, :, None, None]
        return self.shortcut(x) + self.conv_out(F.silu(self.norm_out(h)))


class SpatialTransformer(nn.Module):
    """x + projection of a transformer block over the positions of x (B, D, h, w): self-attention, cross-attention to
    the context (B, tokens, context_dim), feed-forward, each with its LayerNorm and its shortcut."""

    def __init__(self, channels: int, head_width: int, context_dim: int) -> None:
        super().__init__()
        self.norm = _norm(channels, eps=1e-6)
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.norm_self, self.norm_cross, self.norm_feed = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = Attention(channels, channels, head_width)
        self.cross_attention = Attention(channels, context_dim, head_width)
        self.feed_forward = _FeedForward(channels)
        self.project_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.project_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, T, D)
        normed = self.norm_self(h)
        h = h + self.self_attention(normed, normed)
        h = h + self.cross_attention(self.norm_cross(h), context)
        h = h + self.feed_forward(self.norm_feed(h))
        return x + self.project_out(h.transpose(1, 2).reshape(x.shape))


class Attention(nn.Module):
    """Multi-head attention of positions (B, T, D) to tokens (B, S, token_dim), heads of `head_width` channels."""

    def __init__(self, channels: int, token_dim: int, head_width: int) -> None:
        super().__init__()
        self.head_width = min(head_width, channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(token_dim, channels, bias=False)
        self.value = nn.Linear(token_dim, channels, bias=False)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            self._heads(self.query(x)),
            self._heads(self.key(tokens)),
            self._heads(self.value(tokens)),
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, T, head_width)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, heads, T, head_width)"""
        return x.unflatten(2, (-1, self.head_width)).transpose(1, 2)


class _FeedForward(nn.Module):
    """Linear(a * gelu(b)) with (a, b) a linear map of the input, four times as wide (GEGLU, Shazeer 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, 8 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, gates = self.widen(x).chunk(2, dim=-1)
        return self.narrow(values * F.gelu(gates))


def _norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """The published 32 groups; of networks narrower than 32 channels, groups of four."""
    return nn.GroupNorm(32 if channels % 32 == 0 else max(channels // 4, 1), channels, eps=eps)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as zero, so that its branch starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
