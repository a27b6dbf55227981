"""The weight gradient of a convolution, example by example: exact ways, of which the planner takes the cheapest.

A 1-d convolution is a 2-d one over images of one row; the weight gradient of a transposed convolution is that of the
convolution that it transposes, whose input is the output gradient. 3-d ones take the ways that fit any dimension.
Legend: B examples, K rows each, R = B * K; T = K * H' * W' positions of an example's output."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from opacus_ext.gradients.planner import LARGEST, cheapest, is_small, kernels_for

# Of one im2col buffer: what stays in a core's cache, what a GPU has to spare.
COLUMN_BYTES = {"cpu": 2**21, "cuda": 2**29}

Kernel = Callable[[torch.Tensor, torch.Tensor, "Geometry", int], torch.Tensor]


class Geometry(NamedTuple):
    """What a convolution's gradient depends on besides its tensors."""

    weight_shape: torch.Size  # (D, C / groups, kh, kw), in 3-d with a depth before
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def with_one_row(self) -> "Geometry":
        """Of a 1-d convolution: the same in 2-d."""
        d, c, k = self.weight_shape
        one_row = self._replace(weight_shape=torch.Size((d, c, 1, k)), padding=(0, *self.padding))
        return one_row._replace(stride=(1, *self.stride), dilation=(1, *self.dilation))


def geometry_of(
    module: "nn.Conv1d | nn.Conv2d | nn.Conv3d", x: torch.Tensor
) -> tuple[Geometry, torch.Tensor]:
    """The module's geometry, and its input; padding that is not plain zeros, equal on both sides, is applied to it."""
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    return Geometry(module.weight.shape, module.stride, padding, module.dilation, module.groups), x


def transposed_geometry(
    module: "nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d", x: torch.Tensor, g: torch.Tensor
) -> tuple[Geometry, torch.Tensor]:
    """Of the convolution that takes g, the output gradient (R, D, H', W'), to the size of x, the input (R, C, H, W):
    its geometry, and g."""
    geometry = Geometry(module.weight.shape, module.stride, module.padding, module.dilation, module.groups)
    sides = []
    for i, (kernel, stride, padding, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    ):
        plain = (x.shape[2 + i] - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
        output_padding = g.shape[2 + i] - plain  # a call may ask for an output size
        sides = [padding, padding - output_padding, *sides]
    # Output padding of a stride or more would give the convolution another position.
    return geometry._replace(padding=(0,) * len(module.padding)), F.pad(g, sides)


def summed(x: torch.Tensor, g: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The ordinary weight gradient, summed over all rows: `weight_shape`."""
    # Only the shape of the weight is read.
    weight = x.new_empty(1).expand(geometry.weight_shape)
    return torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0,) * len(geometry.stride),
        geometry.groups,
        (False, True, False),
    )[1]


def per_example(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """(R, C, H, W), (R, D, H', W') -> (B, *weight_shape); K rows are summed inside, so memory is B x P."""
    choices = {
        name: lambda rehearse=False, kernel=kernel: kernel(x, g, geometry, batch)
        for name, kernel in _kernels(x, g, geometry, batch).items()
    }
    key = (
        "conv gradient",
        is_small(batch),
        len(x) // batch,
        tuple(x.shape[1:]),
        geometry,
        g.dtype,
        x.is_contiguous(),
    )
    work = g.numel() // batch * geometry.weight_shape[1:].numel()
    return cheapest(key, work, choices, x.device)


def _kernels(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> dict[str, Kernel]:
    """The ways that can compute it, by name. Only those that can win: on a GPU a thousand products one by one, or
    as groups of one convolution, take so long that to time them would be most of a short run."""
    if geometry.groups > 1 or len(geometry.stride) > 2:
        return {"folded": _folded, "one_by_one": _one_by_one}
    fits = x.dtype != torch.float64 and max(x.numel(), g.numel()) // batch <= LARGEST
    if x.is_cuda and fits and kernels_for(x.device) is not None:
        return {"columns": _by_columns, "triton": _by_triton}
    simple = geometry.stride == (1, 1) and geometry.dilation == (1, 1)
    on_any = {"columns": _by_columns, "shifts": _by_shifts} if simple else {"columns": _by_columns}
    return on_any if x.is_cuda else {"folded": _folded, "one_by_one": _one_by_one, **on_any}


def _by_triton(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """The patches of im2col read where they lie, by a kernel of our own."""
    shape, stride, padding, dilation, _ = geometry
    return kernels_for(x.device).conv_gradient(x, g, shape, stride, padding, dilation, batch)


def by_example(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """(R, C, H, W) -> (B, C, T), each example's rows and positions side by side."""
    channels = rows.shape[1]
    return rows.reshape(batch, -1, channels, rows[0, 0].numel()).transpose(1, 2).flatten(2)


def columns(x: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """im2col: (R, C, H, W) -> (B, C * kh * kw, T), for groups = 1."""
    _, _, kh, kw = geometry.weight_shape
    if (kh, kw) == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0):
        return by_example(x, batch)
    (ph, pw), (sh, sw), (dh, dw) = geometry.padding, geometry.stride, geometry.dilation
    padded = F.pad(x, (pw, pw, ph, ph)).contiguous()
    rows, channels, height, width = padded.shape
    out_height, out_width = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    windows = padded.as_strided(
        (batch, channels, kh, kw, rows // batch, out_height, out_width),
        (
            rows // batch * channels * height * width,
            height * width,
            dh * width,
            dw,
            channels * height * width,
            sh * width,
            sw,
        ),
    )
    return windows.reshape(batch, channels * kh * kw, -1)


def _folded(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """One grouped convolution: examples folded into the groups, draws as its batch."""
    d, *rest = geometry.weight_shape
    wide = geometry._replace(weight_shape=torch.Size((batch * d, *rest)), groups=batch * geometry.groups)
    return summed(_fold(x, batch), _fold(g, batch), wide).view(batch, *geometry.weight_shape)


def _fold(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """(B * K, C, H, W) -> (K, B * C, H, W)"""
    draws = len(rows) // batch
    return rows.reshape(batch, draws, *rows.shape[1:]).transpose(0, 1).reshape(draws, -1, *rows.shape[2:])


def _one_by_one(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """The ordinary weight gradient of each example in turn."""
    out = x.new_empty(batch, *geometry.weight_shape)
    for i, (rows, gradients) in enumerate(zip(x.chunk(batch), g.chunk(batch), strict=True)):
        out[i] = summed(rows, gradients, geometry)
    return out


def _by_columns(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """im2col and a matrix product, as many examples at a time as the buffer takes."""
    d, *rest = geometry.weight_shape
    example_bytes = g.numel() // (batch * d) * geometry.weight_shape[1:].numel() * x.element_size()
    at_once = max(1, min(batch, COLUMN_BYTES.get(x.device.type, 2**21) // example_bytes))
    out = x.new_empty(batch, d, geometry.weight_shape[1:].numel())
    rows = at_once * (len(x) // batch)
    for start, part_x, part_g in zip(range(0, batch, at_once), x.split(rows), g.split(rows), strict=True):
        size = min(at_once, batch - start)
        part = out[start : start + size]
        torch.bmm(by_example(part_g, size), columns(part_x, geometry, size).transpose(1, 2), out=part)
    return out.view(batch, d, *rest)


def _by_shifts(x: torch.Tensor, g: torch.Tensor, geometry: Geometry, batch: int) -> torch.Tensor:
    """One batched product per kernel position, over shifted views of a padded copy; stride 1, groups 1.

    All K * H rows of pixels of an example are laid end to end, each followed by as many zeros as the kernel
    overlaps, so that moving the kernel by one pixel is moving the view by one element.
    """
    d, c, kh, kw = geometry.weight_shape
    (ph, pw), (height, width) = geometry.padding, x.shape[2:]
    full_height, full_width = height + 2 * ph, width + 2 * pw
    draws = len(x) // batch
    length = draws * full_height * full_width
    overlap = (kh - 1) * full_width + kw - 1
    padded = x.new_zeros(batch, c, length + overlap)
    inner = padded[..., :length].view(batch, c, draws, full_height, full_width)
    inner[..., ph : ph + height, pw : pw + width] = x.view(batch, draws, c, height, width).transpose(1, 2)
    spread = g.new_zeros(batch, d, draws, full_height, full_width)
    spread[..., : g.shape[2], : g.shape[3]] = g.reshape(batch, draws, d, *g.shape[2:]).transpose(1, 2)
    spread = spread.flatten(2)
    out = x.new_empty(batch, kh * kw, d, c)
    for position in range(kh * kw):
        shift = position // kw * full_width + position % kw
        torch.bmm(spread, padded[:, :, shift : shift + length].transpose(1, 2), out=out[:, position])
    return out.view(batch, kh, kw, d, c).permute(0, 3, 4, 1, 2)
