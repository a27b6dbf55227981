"""The UNet of the published DP diffusion models: DDPM++ layout with BigGAN-style residual blocks (Song et al. 2021).

Stock layers only, GroupNorm throughout: no example influences another. Legend: B batch, C channels, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SKIP_SCALE = 1.0 / math.sqrt(2.0)  # keeps the variance of a sum of two branches
NEAR_ZERO = 1e-10  # initial scale of layers that start as (almost) nothing

PARAMETER_GROUPS = (
    "label_embedding",
    "condition",  # the two layers that mix label and noise level
    "input_conv",
    "attention",  # query, key, value and output projections
    "attention_norm",
    "blocks",  # residual blocks
    "output",
)

RESAMPLERS = {
    None: lambda x, size: x,
    "down": lambda x, size: F.avg_pool2d(x, 2, ceil_mode=True),
    "up": lambda x, size: F.interpolate(x, size=size),
}


class UNet(nn.Module):
    """(images (B, C, H, W), noise condition (B,), labels (B,)) -> (B, C, H, W).

    Labels run from 0 to label_dim - 1; `null_label` (= label_dim) stands for "no label", in training and in guidance.
    nf: base width; ch_mult: width factor per level; attn_resolutions: levels, by pixels, that attend.
    dropout: share of the inner features of residual blocks that training sets to 0; it draws from torch's global
    generator, so DP-SGD must have none. num_augment_labels: size of the description of how an image was augmented.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        label_dim: int,
        nf: int,
        ch_mult: list[int],
        attn_resolutions: list[int],
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        num_augment_labels: int = 0,
    ) -> None:
        super().__init__()
        self.null_label = label_dim
        self.nf = nf
        condition = 4 * nf
        self.augment_embedding = nn.Linear(num_augment_labels, nf, False) if num_augment_labels else None
        self.label_embedding = nn.Embedding(label_dim + 1, nf)
        self.condition_in = _linear(nf, condition)
        self.condition_out = _linear(condition, condition)
        self.input_conv = _conv(channels, nf)

        skips = [nf]
        width = nf
        sizes = level_sizes(image_size, len(ch_mult))
        self.down = nn.ModuleList()
        for level, factor in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.down.append(
                    _Stage(width, factor * nf, condition, attention=sizes[level] in attn_resolutions)
                )
                width = factor * nf
                skips.append(width)
            if level < len(ch_mult) - 1:
                self.down.append(_Stage(width, width, condition, resample="down"))
                skips.append(width)

        self.middle = nn.ModuleList(
            [_Stage(width, width, condition, attention=True), _Stage(width, width, condition)]
        )

        self.up = nn.ModuleList()
        for level, factor in reversed(list(enumerate(ch_mult))):
            for block in range(num_res_blocks + 1):
                last = block == num_res_blocks
                attention = last and sizes[level] in attn_resolutions
                self.up.append(
                    _Stage(width + skips.pop(), factor * nf, condition, attention=attention, takes_skip=True)
                )
                width = factor * nf
            if level > 0:
                self.up.append(_Stage(width, width, condition, resample="up"))
        assert not skips

        self.output_norm = _norm(width)
        self.output_conv = _conv(width, channels, scale=NEAR_ZERO)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.dropout = dropout

    def forward(
        self, images: torch.Tensor, noise_condition: torch.Tensor, labels: torch.Tensor,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`augment_labels` (B, num_augment_labels); None: images that are not augmented."""
        condition = sinusoidal_embedding(noise_condition, self.nf) + self.label_embedding(labels)
        if augment_labels is not None:
            condition = condition + self.augment_embedding(augment_labels)
        condition = self.condition_out(F.silu(self.condition_in(condition)))
        h = self.input_conv(images)
        skips = [h]
        for stage in self.down:
            h = stage(h, condition)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, condition)
        for stage in self.up:
            size = skips[-1].shape[-2:] if skips else None
            h = stage(torch.cat([h, skips.pop()], dim=1) if stage.takes_skip else h, condition, size)
        return self.output_conv(F.silu(self.output_norm(h)))

    def parameter_groups(self) -> dict[str, list[str]]:
        """Group -> names of its parameters; each parameter is in one group. An attention group may be empty."""
        groups = {group: [] for group in PARAMETER_GROUPS}
        for name, _ in self.named_parameters():
            groups[_group_of(name)].append(name)
        return groups


class _Stage(nn.Module):
    """A residual block, followed by attention if requested."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition: int,
        *,
        resample: str | None = None,
        attention: bool = False,
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.takes_skip = takes_skip
        self.block = ResidualBlock(in_channels, out_channels, condition, resample)
        self.attention = Attention(out_channels) if attention else None

    def forward(
        self, h: torch.Tensor, condition: torch.Tensor, size: torch.Size | None = None
    ) -> torch.Tensor:
        h = self.block(h, condition, size)
        return h if self.attention is None else self.attention(h)


class ResidualBlock(nn.Module):
    """norm, SiLU, [resample], conv, + condition, norm, SiLU, conv; shortcut; sum scaled by 1/sqrt(2)."""

    def __init__(
        self, in_channels: int, out_channels: int, condition: int, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = RESAMPLERS[resample]
        self.dropout = 0.0
        self.norm_in = _norm(in_channels)
        self.conv_in = _conv(in_channels, out_channels)
        self.condition = _linear(condition, out_channels)
        self.norm_out = _norm(out_channels)
        self.conv_out = _conv(out_channels, out_channels, scale=NEAR_ZERO)
        needs_map = in_channels != out_channels or resample is not None
        self.shortcut = _conv(in_channels, out_channels, kernel=1) if needs_map else nn.Identity()

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor, size: torch.Size | None = None
    ) -> torch.Tensor:
        """`size` (H, W) is where an up-sampling block goes to."""
        h = self.conv_in(self.resample(F.silu(self.norm_in(x)), size))
        h = h + self.condition(F.silu(condition))[:, :, None, None]
        h = F.silu(self.norm_out(h))
        h = self.conv_out(F.dropout(h, self.dropout, self.training) if self.dropout else h)
        return (self.shortcut(self.resample(x, size)) + h) * SKIP_SCALE


class Attention(nn.Module):
    """Single-head self-attention over the H*W positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.query, self.key, self.value = (_linear(channels, channels, scale=0.1) for _ in range(3))
        self.output = _linear(channels, channels, scale=NEAR_ZERO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        weights = torch.softmax(query @ key.transpose(1, 2) * channels**-0.5, dim=-1)
        h = self.output(weights @ value).transpose(1, 2).reshape(batch, channels, height, width)
        return (x + h) * SKIP_SCALE


def level_sizes(image_size: int, num_levels: int) -> list[int]:
    """Pixels of each level, the highest first; an odd size is halved upwards: 7 -> 4."""
    sizes = [image_size]
    while len(sizes) < num_levels:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _group_of(name: str) -> str:
    top = name.split(".")[0]
    if top in ("down", "middle", "up"):
        if ".block." in name:
            return "blocks"
        return "attention_norm" if ".attention.norm." in name else "attention"
    return top if top in PARAMETER_GROUPS else top.split("_")[0]  # condition_in -> condition


def sinusoidal_embedding(values: torch.Tensor, dim: int) -> torch.Tensor:
    """(B,) -> (B, dim): sines, then cosines, of frequencies 10000^(-i / (dim/2 - 1))."""
    half = dim // 2
    exponent = torch.arange(half, device=values.device, dtype=torch.float32) / (half - 1)
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(max(channels // 4, 1), 32), channels, eps=1e-6)


def _linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    _variance_scaling(layer.weight, scale, in_features, out_features)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(in_channels: int, out_channels: int, kernel: int = 3, scale: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    _variance_scaling(layer.weight, scale, in_channels * kernel**2, out_channels * kernel**2)
    nn.init.zeros_(layer.bias)
    return layer


def _variance_scaling(weight: torch.Tensor, scale: float, fan_in: int, fan_out: int) -> None:
    """Uniform with variance scale / fan-average."""
    limit = math.sqrt(3.0 * scale / ((fan_in + fan_out) / 2))
    nn.init.uniform_(weight, -limit, limit)
