"""Chooses between exact ways of computing the same thing by their measured cost, once per shape."""

import math
import time
from collections.abc import Callable, Hashable

import torch

# Multiply-adds below which the first choice is taken unmeasured: nothing is to be gained.
WORTH_MEASURING = 2_000_000
REPETITIONS = 2

_chosen: dict[Hashable, str] = {}


def cheapest(key: Hashable, work: int, choices: dict[str, Callable], device: torch.device):
    """The result of the cheapest of `choices`, all of which must be exact.

    A choice takes one optional argument: while it is timed, it is called with True, and may then include what its
    result costs later. key: what the cost depends on (shapes, dtype); threads and device are added here. Which one
    wins may differ between runs, and with it the last bits of the result.
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


def is_small(batch: int) -> bool:
    """Two classes of batches have a choice each. Not more: how many examples a part of a Poisson sample holds is
    secret, and where two exact ways round differently, one example more should not change the way."""
    return batch <= 8
