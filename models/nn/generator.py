"""The conditional BigGAN-style generator of the published benchmark. It never sees a private image, so BatchNorm and
spectral norm are welcome. Legend: B batch, C channels of every block (4 * g_conv_dim), Z one chunk of the noise."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils.parametrizations import spectral_norm

from utils.sections import check, check_least


@dataclass(frozen=True)
class GeneratorConfig:
    z_dim: int  # noise input, split evenly over the first layer and the blocks
    g_shared_dim: int  # label embedding
    g_conv_dim: int  # every block is 4 times as wide
    apply_attn: bool
    attn_g_loc: list[int]  # blocks (from 1) that are followed by self-attention

    def __post_init__(self) -> None:
        check_least(self, 1, "z_dim", "g_shared_dim", "g_conv_dim")


class Generator(nn.Module):
    """(noise (B, z_dim), labels (B,)) -> images (B, C, H, W) in [-1, 1]. 28 px and below: 2 blocks; above: 3."""

    def __init__(self, config: GeneratorConfig, image_size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        num_blocks = 2 if image_size < 32 else 3
        fits = image_size % 2**num_blocks == 0
        check(
            fits, "sensitive_data.resolution", image_size, f"a multiple of {2**num_blocks} for this generator"
        )
        check(
            config.z_dim % (num_blocks + 1) == 0,
            "model.Generator.z_dim",
            config.z_dim,
            f"a multiple of {num_blocks + 1}: one chunk for the first layer and one per block",
        )
        self.base = image_size // 2**num_blocks
        self.num_chunks = num_blocks + 1
        self.z_dim = config.z_dim
        width, chunk = 4 * config.g_conv_dim, config.z_dim // self.num_chunks
        self.first = _linear(chunk, width * self.base**2)
        self.embedding = nn.Embedding(num_classes, config.g_shared_dim)
        condition = config.g_shared_dim + chunk
        self.blocks = nn.ModuleList(_Block(width, condition) for _ in range(num_blocks))
        attends = [config.apply_attn and i + 1 in config.attn_g_loc for i in range(num_blocks)]
        self.attention = nn.ModuleList(_Attention(width) if here else nn.Identity() for here in attends)
        self.norm = nn.BatchNorm2d(width, eps=1e-4)
        self.output = _conv(width, channels, 3)
        nn.init.orthogonal_(self.embedding.weight)

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chunks = noise.chunk(self.num_chunks, dim=1)
        h = self.first(chunks[0]).reshape(len(noise), -1, self.base, self.base)
        h = h.contiguous(memory_format=torch.channels_last)  # convolutions are faster, and keep it
        embedded = self.embedding(labels)
        for block, attention, chunk in zip(self.blocks, self.attention, chunks[1:], strict=True):
            h = attention(block(h, torch.cat([embedded, chunk], dim=1)))
        return torch.tanh(self.output(self._last_norm(h)))

    def _last_norm(self, h: torch.Tensor) -> torch.Tensor:
        if not _in_one_pass(self.norm, h):
            return F.relu(self.norm(h))
        gain, bias = (rows.expand(len(h), -1) for rows in (self.norm.weight, self.norm.bias))
        return _NormalisedReLU.apply(h, gain, bias, self.norm)


class _Block(nn.Module):
    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = _ConditionalNorm(width, condition), _ConditionalNorm(width, condition)
        self.conv_in, self.conv_out = _conv(width, width, 3), _conv(width, width, 3)
        self.shortcut = _conv(width, width, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        h = _conv_of_upsampled(self.norm_in(x, condition), self.conv_in)
        h = self.conv_out(self.norm_out(h, condition))
        # A 1x1 convolution and nearest upsampling commute; convolving first is four times cheaper.
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class _ConditionalNorm(nn.Module):
    """BatchNorm whose gain and bias are linear in the condition, and ReLU."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, eps=1e-4, affine=False)
        self.gain, self.bias = _linear(condition, width, bias=False), _linear(condition, width, bias=False)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        if _in_one_pass(self.norm, x):
            return _NormalisedReLU.apply(x, gain, bias, self.norm)
        return F.relu(self.norm(x) * gain[:, :, None, None] + bias[:, :, None, None])


class _NormalisedReLU(torch.autograd.Function):
    """relu(gain * norm(x) + bias) of a training step: (B, C, H, W), (B, C), (B, C) -> (B, C, H, W).

    On a CPU these layers cost what it takes to go through memory. A normalised value is linear in x, so that one pass
    replaces three, and two of the backward pass five; in between are sums over pixels, of shape (B, C).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, norm: nn.BatchNorm2d
    ) -> torch.Tensor:
        momentum = norm.momentum
        mean, variance = torch.batch_norm_update_stats(x, norm.running_mean, norm.running_var, momentum)
        norm.num_batches_tracked += 1
        rate = (variance + norm.eps).rsqrt()
        scale = gain * rate
        y = torch.addcmul(_over_pixels(bias - scale * mean), x, _over_pixels(scale)).relu_()
        ctx.save_for_backward(x, y, mean, rate, gain)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, mean, rate, gain = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        of_bias = gradient.sum((2, 3))
        of_gain = rate * ((gradient * x).sum((2, 3)) - mean * of_bias)
        count = x.numel() // x.shape[1]
        along_one, along_normed = (gain * of_bias).sum(0) / count, (gain * of_gain).sum(0) / count
        slope = -along_normed * rate.square()
        of_x = torch.addcmul(
            _over_pixels((-slope * mean - along_one * rate)[None]), x, _over_pixels(slope[None])
        )
        return of_x.addcmul_(gradient, _over_pixels(gain * rate)), of_gain, of_bias, None


def _in_one_pass(norm: nn.BatchNorm2d, x: torch.Tensor) -> bool:
    return norm.training and x.device.type == "cpu" and x.dtype != torch.bfloat16


def _over_pixels(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, :, None, None]


class _Attention(nn.Module):
    """Self-attention with keys and values pooled 2x2; enters through a learned scalar that starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = (
            _conv(width, width // 8, 1, bias=False),
            _conv(width, width // 8, 1, bias=False),
        )
        self.value, self.output = (
            _conv(width, width // 2, 1, bias=False),
            _conv(width // 2, width, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).flatten(2).transpose(1, 2)
        key, value = F.max_pool2d(self.key(x), 2).flatten(2), F.max_pool2d(self.value(x), 2).flatten(2)
        weights = torch.softmax(query @ key, dim=-1)  # (B, HW, HW / 4)
        h = (weights @ value.transpose(1, 2)).transpose(1, 2)
        h = h.reshape(len(x), -1, *x.shape[2:])
        return x + F.conv2d(
            h, self.scale * self.output.weight
        )  # a scaled weight costs less than a scaled image


def _conv_of_upsampled(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """3x3 convolution of x after nearest upsampling by 2: (B, I, H, W) -> (B, O, 2H, 2W).

    It reads four equal pixels with up to four weights; adding these weights first makes it a transposed convolution
    of the small image, with 2.25 times fewer multiplications.
    """
    kernel = 4 * F.avg_pool2d(
        conv.weight.flip(2, 3), 2, stride=1, padding=1
    )  # (O, I, 4, 4) sums over 2x2 windows
    return F.conv_transpose2d(x, kernel.transpose(0, 1), conv.bias, stride=2, padding=1)


def _linear(in_features: int, out_features: int, bias: bool = True) -> nn.Module:
    return _prepared(nn.Linear(in_features, out_features, bias=bias))


def _conv(in_channels: int, out_channels: int, kernel: int, bias: bool = True) -> nn.Module:
    return _prepared(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias))


def _prepared(layer: nn.Module) -> nn.Module:
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer, eps=1e-6)
