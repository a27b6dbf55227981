"""Kernels for NVIDIA GPUs, in Triton, which comes with PyTorch there: what stock operations do in several passes over
memory, done in one. Where they run, planner.kernels_for hands them out. Legend: B examples, K rows each, R = B * K;
T = K * H' * W' positions of an example's output.
"""

import torch
import triton
import triton.language as tl

ROWS_AT_ONCE, COLUMNS_AT_ONCE = 8, 512  # of the weighted sum
PROGRAMS = 2048  # enough to keep any GPU busy
POSITIONS_AT_ONCE = 32
MOST_AT_ONCE = 64  # filters, or channels, of a tile
LAUNCH = {"num_warps": 4, "num_stages": 3}
NUMBERS_AT_ONCE = 4096  # of a row, in group normalisation
GEOMETRY = (  # one compiled kernel for all values of these
    "rows_each", "height", "width", "out_height", "out_width", "stride_h", "stride_w", "pad_h", "pad_w",
    "dilation_h", "dilation_w", "kernel_h", "kernel_w",
)  # fmt: skip


@triton.jit(do_not_specialize=GEOMETRY)
def _conv_gradient(
    x, g, out, rows_each, height, width, out_height, out_width, channels, filters,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_h, kernel_w,
    FILTERS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one example's gradient: some filters by some channels at one place of the kernel."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    places = kernel_h * kernel_w
    tiles = tl.cdiv(filters, FILTERS) * places * channel_tiles
    example = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    channel = tile % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    place = tile // channel_tiles % places
    filter = tile // (channel_tiles * places) * FILTERS + tl.arange(0, FILTERS)
    shift_h = place // kernel_w * dilation_h - pad_h
    shift_w = place % kernel_w * dilation_w - pad_w

    area = out_height * out_width
    positions = rows_each * area
    x += example * rows_each * height * width * channels
    g += example * positions * filters
    total = tl.zeros((FILTERS, CHANNELS), dtype=tl.float32)
    for start in range(0, positions, POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        there = position < positions
        row, pixel = position // area, position % area
        h = pixel // out_width * stride_h + shift_h
        w = pixel % out_width * stride_w + shift_w
        inside = there & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixels = (row * height + h) * width + w
        values = tl.load(
            x + pixels[:, None] * channels + channel[None, :],
            mask=inside[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        gradients = tl.load(
            g + position[None, :] * filters + filter[:, None],
            mask=there[None, :] & (filter < filters)[:, None],
            other=0.0,
        )
        total = tl.dot(gradients, values, total, input_precision=PRECISION)
    out += (example * filters + filter[:, None]) * (places * channels) + place * channels + channel[None, :]
    tl.store(
        out, total.to(out.dtype.element_ty), mask=(filter < filters)[:, None] & (channel < channels)[None, :]
    )


def conv_gradient(
    x: torch.Tensor,
    g: torch.Tensor,
    weight_shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    batch: int,
) -> torch.Tensor:
    """(R, C, H, W), (R, D, H', W') of one dtype, channels last -> (B, D, C, kh, kw): a convolution's weight gradient of
    each example, for groups = 1. Products of float32 are rounded to TF32 where the convolutions of PyTorch are."""
    filters, channels, kernel_h, kernel_w = weight_shape
    x, g = (part.contiguous(memory_format=torch.channels_last) for part in (x, g))
    out = x.new_empty(batch, filters, kernel_h, kernel_w, channels)
    tile_filters, tile_channels = _tile(filters), _tile(channels)
    tiles = triton.cdiv(filters, tile_filters) * triton.cdiv(channels, tile_channels) * kernel_h * kernel_w
    _conv_gradient[(batch * tiles,)](
        x, g, out, len(x) // batch, *x.shape[2:], *g.shape[2:], channels, filters,
        *stride, *padding, *dilation, kernel_h, kernel_w,
        FILTERS=tile_filters, CHANNELS=tile_channels, POSITIONS=POSITIONS_AT_ONCE,
        PRECISION="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        **LAUNCH,
    )  # fmt: skip
    return out.permute(0, 1, 4, 2, 3)


def _tile(size: int) -> int:
    """A power of two, not below the 16 that a product of tiles needs."""
    return max(16, min(MOST_AT_ONCE, triton.next_power_of_2(size)))


@triton.jit
def _weighted_sum(rows, coefficients, out, num_rows, num_columns, share,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Some columns of the sum over one share of the rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_rows)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        factor = tl.load(coefficients + row, mask=row < last, other=0.0)
        taken = (factor > 0)[:, None] & (column < num_columns)[None, :]
        values = tl.load(
            rows + row.to(tl.int64)[:, None] * num_columns + column[None, :], mask=taken, other=0.0
        )
        total += factor[:, None] * values.to(tl.float32)
    position = tl.program_id(1).to(tl.int64) * num_columns + column
    tl.store(out + position, tl.sum(total, axis=0), mask=column < num_columns)


def weighted_sum(rows: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """(B, P) contiguous, of at most float32, and (B,) coefficients -> (P,) float32; rows whose coefficient is 0 are not
    looked at, so they may be nan. One pass over memory, in float32."""
    num_rows, num_columns = rows.shape
    blocks = triton.cdiv(num_columns, COLUMNS_AT_ONCE)
    shares = max(1, min(triton.cdiv(num_rows, ROWS_AT_ONCE), PROGRAMS // blocks))
    share = triton.cdiv(num_rows, shares)
    out = torch.empty(shares, num_columns, device=rows.device)
    _weighted_sum[(blocks, shares)](
        rows, coefficients.float().contiguous(), out, num_rows, num_columns, share,
        ROWS=ROWS_AT_ONCE, COLUMNS=COLUMNS_AT_ONCE,
    )  # fmt: skip
    return out.sum(0)


@triton.jit
def _of_groups(values, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """(CHANNELS,) sums of channels -> at each channel the sum of its group."""
    by_group = tl.reshape(values, (CHANNELS // WIDTH, WIDTH))
    sums = tl.broadcast_to(tl.sum(by_group, axis=1)[:, None], (CHANNELS // WIDTH, WIDTH))
    return tl.reshape(sums, (CHANNELS,))


@triton.jit
def _group_norm(
    x, weight, bias, y, mean, rstd, pixels, channels, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One row. Mean first, then variance: the row stays in the cache."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    known = channel < channels
    x += row * pixels * channels
    y += row * pixels * channels
    size = pixels * WIDTH
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        there = (pixel < pixels)[:, None] & known[None, :]
        values = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=there, other=0.0)
        total += tl.sum(values.to(tl.float32), axis=0)
    centre = _of_groups(total, CHANNELS, WIDTH) / size
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        there = (pixel < pixels)[:, None] & known[None, :]
        values = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=there, other=0.0)
        off = tl.where(there, values.to(tl.float32) - centre[None, :], 0.0)
        total += tl.sum(off * off, axis=0)
    scale = 1.0 / tl.sqrt(_of_groups(total, CHANNELS, WIDTH) / size + eps)
    tl.store(mean + row * channels + channel, centre, mask=known)
    tl.store(rstd + row * channels + channel, scale, mask=known)
    slope = scale * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        there = (pixel < pixels)[:, None] & known[None, :]
        place = pixel[:, None] * channels + channel[None, :]
        values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        normal = (values - centre[None, :]) * slope[None, :] + shift[None, :]
        tl.store(y + place, normal.to(y.dtype.element_ty), mask=there)


@triton.jit
def _group_norm_backward(
    g, x, weight, mean, rstd, to_x, to_weight, to_bias, pixels, channels,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One row: gradients of its own copy of weight and bias, then of its pixels."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    known = channel < channels
    g += row * pixels * channels
    x += row * pixels * channels
    to_x += row * pixels * channels
    centre = tl.load(mean + row * channels + channel, mask=known, other=0.0)
    scale = tl.load(rstd + row * channels + channel, mask=known, other=0.0)
    of_bias = tl.zeros((CHANNELS,), dtype=tl.float32)
    of_weight = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        there = (pixel < pixels)[:, None] & known[None, :]
        place = pixel[:, None] * channels + channel[None, :]
        gradients = tl.load(g + place, mask=there, other=0.0).to(tl.float32)
        values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        of_bias += tl.sum(gradients, axis=0)
        of_weight += tl.sum(gradients * (values - centre[None, :]) * scale[None, :], axis=0)
    tl.store(to_bias + row * channels + channel, of_bias, mask=known)
    tl.store(to_weight + row * channels + channel, of_weight, mask=known)
    factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    size = pixels * WIDTH
    along_one = _of_groups(factor * of_bias, CHANNELS, WIDTH) / size
    along_x = _of_groups(factor * of_weight, CHANNELS, WIDTH) / size
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        there = (pixel < pixels)[:, None] & known[None, :]
        place = pixel[:, None] * channels + channel[None, :]
        gradients = tl.load(g + place, mask=there, other=0.0).to(tl.float32)
        values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        normal = (values - centre[None, :]) * scale[None, :]
        moved = (gradients * factor[None, :] - along_one[None, :] - normal * along_x[None, :]) * scale[
            None, :
        ]
        tl.store(to_x + place, moved.to(to_x.dtype.element_ty), mask=there)


def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (R, C, H, W) channels last, weight and bias (C,), a power of two channels in each group -> (y of `dtype`, mean,
    rstd), the last two (R, C) float32: of each channel's group."""
    rows, channels, height, width = x.shape
    y = torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty(rows, channels, device=x.device) for _ in range(2))
    _group_norm[(rows,)](
        x, weight, bias, y, mean, rstd, height * width, channels, eps, **_row_tile(channels, num_groups)
    )
    return y, mean, rstd


def group_norm_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """g, x (R, C, H, W) channels last -> gradients of x, and (R, C) float32 of each row's copy of weight and bias."""
    rows, channels, height, width = x.shape
    to_x = torch.empty_like(x)
    to_weight, to_bias = (torch.empty(rows, channels, device=x.device) for _ in range(2))
    _group_norm_backward[(rows,)](
        g, x, weight, mean, rstd, to_x, to_weight, to_bias, height * width, channels,
        **_row_tile(channels, num_groups),
    )  # fmt: skip
    return to_x, to_weight, to_bias


def _row_tile(channels: int, num_groups: int) -> dict[str, int]:
    wide = triton.next_power_of_2(channels)
    return {"CHANNELS": wide, "WIDTH": channels // num_groups, "PIXELS": max(1, NUMBERS_AT_ONCE // wide)}


TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 3e-2}


def try_out(device: torch.device, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)) -> None:
    """Run all kernels on little; RuntimeError if their results differ from those of stock operations."""
    for dtype in dtypes:
        tolerance = TOLERANCES[dtype]
        x, g = (torch.linspace(-1, 1, 128, device=device).view(2, 4, 4, 4).to(dtype) for _ in range(2))
        weight = torch.zeros(4, 4, 1, 1, device=device, dtype=dtype)
        found = conv_gradient(x, g, weight.shape, (1, 1), (0, 0), (1, 1), 2)
        expected = g.float().flatten(2) @ x.float().flatten(2).transpose(1, 2)
        one = torch.ones(4, device=device)
        last = x.contiguous(memory_format=torch.channels_last)
        y, mean, rstd = group_norm(last, one, one, 2, 1e-5, dtype)
        bent = last.square()
        to_x, to_weight, to_bias = group_norm_backward(bent, last, one, mean, rstd, 2)
        exact, slope = x.float().requires_grad_(), bent.float()
        norm = torch.nn.functional.group_norm(exact, 2, eps=1e-5)
        pairs = (
            (found.flatten(2), expected),
            (weighted_sum(found.reshape(2, 16), one[:2]), expected.sum(0).flatten()),
            (y, norm + 1),
            (to_x, torch.autograd.grad(norm, exact, slope)[0]),
            (to_weight, (slope * norm).sum((2, 3))),
            (to_bias, slope.sum((2, 3))),
        )
        if not all(
            torch.allclose(one.float(), other, rtol=tolerance, atol=tolerance) for one, other in pairs
        ):
            raise RuntimeError("wrong numbers")
