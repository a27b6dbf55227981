"""How a logical batch is split into physical batches that fit in memory. Nothing here affects privacy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils.errors import UserError
from utils.sections import check
from utils.typed import changeable

# Examples per physical batch at the start, if the user sets none. A GPU reports that its memory is full; a CPU does
# not.
AUTOMATIC = {"cuda": 2**16, "cpu": 8}


@dataclass(frozen=True)
class PhysicalBatchConfig:
    """Speed and memory of a step. These settings change no result beyond rounding, and no privacy guarantee."""

    n_split: int | None = changeable()  # parts per logical batch; None: what max_physical_batch_size demands
    max_physical_batch_size: int | None = changeable()  # records at a time; None: chosen for the device

    def __post_init__(self) -> None:
        for field in ("n_split", "max_physical_batch_size"):
            value = getattr(self, field)
            check(value is None or value > 0, f"train.dp.{field}", value, "null or at least 1")


class PhysicalBatches:
    """Sums over a logical batch, with as many examples at a time as fit in memory.

    max_size: most examples per part; None: chosen for the device. n_split: number of parts, whatever their size. If a
    part does not fit, the size is halved for the rest of the run and the part is computed again. What an example
    contributes depends on its position in the logical batch only, so the sum stays the same up to rounding.

    The size of a Poisson sample varies from step to step. On a GPU, parts are padded to one of a few sizes, so that
    kernels that were chosen for a size are used again.
    """

    def __init__(self, max_size: int | None, n_split: int | None, device: torch.device) -> None:
        self._max_size = max_size or AUTOMATIC.get(device.type, AUTOMATIC["cpu"])
        self._n_split = n_split
        self._fits: int | None = None  # the size that fits, known after memory has run out
        self._pads = device.type == "cuda"

    def add_up(
        self, count: int, part: Callable[[slice, int], torch.Tensor], total: torch.Tensor
    ) -> torch.Tensor:
        """`total` plus part(positions, padded size) over all `count` positions, each exactly once.

        Raises UserError if a single example does not fit in memory.
        """
        wanted = -(-count // self._n_split) if self._n_split else self._max_size
        start = 0
        while start < count:
            size = min(wanted, self._fits or wanted, count - start)
            try:
                total += part(slice(start, start + size), self._padded_size(size))
                start += size
                continue
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(f"out of memory for a single training image: {error}") from error
            # Outside of the handler, which keeps the tensors of the failed part alive.
            self._fits = size // 2
            torch.cuda.empty_cache()
            # Nothing is logged: that a sample was this large is private.
        return total

    def _padded_size(self, count: int) -> int:
        """The next larger of a few sizes, which differ by a sixteenth or less, within the limits."""
        if not self._pads:
            return count
        step = 2 ** max(0, count.bit_length() - 5)
        limits = [self._fits, None if self._n_split else self._max_size]
        return min([-(-count // step) * step, *(limit for limit in limits if limit)])
