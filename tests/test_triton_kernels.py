"""The kernels for a GPU, run by Triton's interpreter, and what takes the place of stock operations there."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import ROOT

from opacus_ext.gradients.group_norm import Stock

CHECKS = """
import torch
import torch.nn.functional as F
from opacus_ext.gradients import convolutions, triton_kernels
from opacus_ext.gradients.group_norm import ChannelsLast

triton_kernels.try_out(torch.device("cpu"), (torch.float32,))  # the interpreter's products of bfloat16 are wrong
torch.manual_seed(0)
SHAPES = [  # R, B, C, H, W, D, kernel, stride, padding, dilation
    (4, 2, 5, 7, 6, 9, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 3, 20, 8, 8, 17, (3, 2), (2, 1), (0, 1), (1, 2)),
    (2, 1, 70, 5, 5, 65, (1, 1), (1, 1), (0, 0), (1, 1)),
    (4, 4, 3, 9, 9, 8, (5, 5), (2, 2), (2, 2), (1, 1)),
]
for rows, batch, c, h, w, d, kernel, stride, padding, dilation in SHAPES:
    convolution = torch.nn.Conv2d(c, d, kernel, stride, padding, dilation)
    x = torch.randn(rows, c, h, w)
    g = torch.randn_like(convolution(x))
    geometry, _ = convolutions.geometry_of(convolution, x)
    expected = convolutions._one_by_one(x, g, geometry, batch)
    found = triton_kernels.conv_gradient(x, g, *geometry[:4], batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

for batch, size in [(5, 100), (33, 1000), (2, 513)]:
    rows, coefficients = torch.randn(batch, size), torch.rand(batch)
    coefficients[0], rows[0] = 0, torch.nan
    for kind, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        given = rows.to(kind)
        expected = coefficients[1:].double() @ given[1:].double()
        found = triton_kernels.weighted_sum(given, coefficients)
        assert found.dtype == torch.float32
        assert (found - expected).norm() < tolerance * expected.norm()

def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)

for rows, channels, groups, height, width in [(3, 8, 2, 5, 4), (2, 24, 6, 3, 3), (2, 96, 24, 9, 8), (4, 6, 6, 4, 3)]:
    x = last(3 + torch.randn(rows, channels, height, width)).requires_grad_()
    weight, bias = (torch.randn(channels).repeat(rows, 1).requires_grad_() for _ in range(2))
    expected = F.group_norm(x, groups, eps=1e-5) * weight[..., None, None] + bias[..., None, None]
    found = ChannelsLast.apply(x, weight, bias, groups, 1e-5, torch.float32, triton_kernels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    g = last(torch.randn_like(found))
    pairs = zip(*(torch.autograd.grad(y, (x, weight, bias), g) for y in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    short = ChannelsLast.apply(x.bfloat16(), weight, bias, groups, 1e-5, torch.bfloat16, triton_kernels)
    assert short.dtype == torch.bfloat16 and (short - expected).norm() < 0.01 * expected.norm()
print("all are right")
"""


def test_kernels_give_what_stock_operations_do():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "all are right", done.stderr


@pytest.mark.parametrize("at_once", [2**16 - 1, 9, 3])
@pytest.mark.parametrize("size", [(5, 4), ()])
def test_the_affine_gradients_of_group_norm_come_out_per_row(at_once, size, monkeypatch):
    """In one launch and in several, a row each at the least."""
    monkeypatch.setattr(Stock, "AT_ONCE", at_once)
    torch.manual_seed(0)
    rows, groups = 7, 4
    x = torch.randn(rows, 8, *size, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(8).double().repeat(rows, 1).requires_grad_() for _ in range(2))
    shape = (rows, 8, *[1] * len(size))
    expected = F.group_norm(x, groups, eps=1e-5) * weight.view(shape) + bias.view(shape)
    found = Stock.apply(x, weight, bias, groups, 1e-5)
    g = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    inputs = (x, weight, bias)
    for one, other in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(one, other)
