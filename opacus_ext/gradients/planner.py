"""Choose between exact ways to compute the same result by their measured cost, once per shape."""

import functools
import importlib.util
import math
import subprocess
import time
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import TypeVar

import torch

from utils.runtime import log

# Multiply-adds of one example below which the first choice is taken without measuring, because the gain is small.
WORTH_MEASURING = 50_000
REPETITIONS = 2
LARGEST = 2**31 - 1  # numbers of one example that our own kernels can address

_chosen: dict[Hashable, str] = {}

Result = TypeVar("Result")


def cheapest(
    key: Hashable, work: float, choices: dict[str, Callable[..., Result]], device: torch.device
) -> Result:
    """The result of the cheapest of `choices`, all of which must be exact.

    A choice takes one optional argument: while it is timed, it is called with True, and may then include what its
    result costs later. key: what the cost depends on (shapes, dtype); threads and device are added here. work: of one
    example, as the number of examples is secret. Which one wins may differ between runs, and with it the last bits of
    the result.
    """
    if len(choices) == 1 or work < WORTH_MEASURING:
        return next(iter(choices.values()))()
    key = (key, tuple(choices), str(device), torch.get_num_threads())
    if key not in _chosen:
        _chosen[key] = min(choices, key=lambda name: _seconds(choices[name], device))
    return choices[_chosen[key]]()


def _seconds(choice: Callable, device: torch.device) -> float:
    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        choice(True)
        _wait(device)
        return time.perf_counter() - start

    try:
        return min(once() for _ in range(1 + REPETITIONS))  # the first call also sets up
    except torch.OutOfMemoryError:  # another choice may do with less
        return math.inf


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels_for(device: torch.device) -> ModuleType | None:
    """opacus_ext.gradients.triton_kernels if they run on the device, else None."""
    return _triton_kernels(device) if device.type == "cuda" else None


@functools.cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from triton import TritonError

    try:
        from opacus_ext.gradients import triton_kernels

        triton_kernels.try_out(device)
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError, TritonError) as error:
        # An old GPU, no C compiler, no room for what is compiled.
        log.warning("Triton is unavailable (%s); falling back to PyTorch operations", type(error).__name__)
        return None
    return triton_kernels


def is_small(batch: int) -> bool:
    """Whether a batch is small. Each of the two classes of batches has its own choice. There are no more classes,
    because the number of examples is secret: two exact ways may round differently, and one example more should not
    change the way."""
    return batch <= 8
