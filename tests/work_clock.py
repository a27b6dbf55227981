"""A clock that counts instead of measuring: what --dry_run estimates, the same on every machine, however busy it is."""

import sys
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import utils.timing

# One core of a two-core machine, fitted to the steps of all methods at 28 and 64 px (within a factor of 1.6).
FLOPS_PER_SECOND, BYTES_PER_SECOND, STEP = 45e9, 10e9, 5e-4


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {t.data_ptr(): t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        in_place = function.__name__.partition(".")[0].endswith("_")
        if in_place or any(t.data_ptr() not in inputs for t in outputs):
            self.total += sum(inputs.values()) + sum(t.nbytes for t in outputs)
        return result


def counted_seconds(step: Callable[[], object]) -> float:
    """In the place of utils.timing.seconds_of."""
    with FlopCounterMode(display=False) as products, Traffic() as traffic:
        step()
    return products.get_total_flops() / FLOPS_PER_SECOND + traffic.total / BYTES_PER_SECOND + STEP


def use(monkeypatch) -> None:
    """Let every module of the toolkit estimate with this clock."""
    original = utils.timing.seconds_of
    for module in list(sys.modules.values()):
        if getattr(module, "seconds_of", None) is original:
            monkeypatch.setattr(module, "seconds_of", counted_seconds)
