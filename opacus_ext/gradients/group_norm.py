"""Group normalisation on a GPU whose affine gradients come out per row, at the cost of the ordinary one or less.

Legend: R rows, C channels, G groups.
"""

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from opacus_ext.gradients.planner import LARGEST, kernels_for


def group_norm_on_gpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float
) -> torch.Tensor:
    """x (R, C, ...), weight and bias (R, C), all of whose rows are alike. Under autocast the kernel of our own computes
    in float32 and returns the short type, to which the next layer would round it. Which kernel computes
    does not depend on R, which is secret."""
    kernels = kernels_for(x.device)
    autocast = torch.is_autocast_enabled("cuda")
    width, rest = divmod(x.shape[1], num_groups)
    fits = x.dim() == 4 and not rest and width & (width - 1) == 0 and x[0].numel() <= LARGEST
    if kernels is not None and fits and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
        return ChannelsLast.apply(x, weight, bias, num_groups, eps, dtype, kernels)
    return Stock.apply(
        x.float() if autocast and x.dtype != torch.float64 else x, weight, bias, num_groups, eps
    )


class ChannelsLast(torch.autograd.Function):
    """By kernels of our own, in the layout of the convolutions around it; the stock one rearranges memory twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
        dtype: torch.dtype,
        kernels: ModuleType,
    ) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y, mean, rstd = kernels.group_norm(x, weight[0], bias[0], groups, eps, dtype)
        ctx.save_for_backward(x, weight[0], mean, rstd)
        ctx.groups, ctx.kernels = groups, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple:
        x, weight, mean, rstd = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        to_x, to_weight, to_bias = ctx.kernels.group_norm_backward(g, x, weight, mean, rstd, ctx.groups)
        return to_x, to_weight, to_bias, None, None, None, None


class Stock(torch.autograd.Function):
    """By the stock kernels. In the backward pass all rows are one, and each channel of each row is a channel."""

    AT_ONCE = 2**16 - 1  # groups in a launch

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        x = x.contiguous()  # as the stock operation does
        size = (len(x), x.shape[1], x[0, 0].numel())
        y, mean, rstd = torch.native_group_norm(x, weight[0], bias[0], *size, groups, eps)
        ctx.save_for_backward(x, weight[0], mean, rstd)
        ctx.size, ctx.groups = size, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple:
        x, weight, mean, rstd = ctx.saved_tensors
        rows, channels, pixels = ctx.size
        parts = []
        at_once = max(1, Stock.AT_ONCE // ctx.groups)
        for start in range(0, rows, at_once):
            part = slice(start, min(start + at_once, rows))
            count = part.stop - start
            found = torch.ops.aten.native_group_norm_backward(
                g[part].contiguous().view(1, count * channels, pixels),
                x[part].view(1, count * channels, pixels),
                mean[part].view(1, -1),
                rstd[part].view(1, -1),
                weight.repeat(count),
                1,
                count * channels,
                pixels,
                count * ctx.groups,
                [True, True, True],
            )
            parts.append(found)
        to_x, to_weight, to_bias = (
            found[0] if len(parts) == 1 else torch.cat([part.flatten() for part in found])
            for found in zip(*parts, strict=True)
        )
        return to_x.view_as(x), to_weight.view(rows, channels), to_bias.view(rows, channels), None, None
