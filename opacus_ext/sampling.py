"""How a logical batch is cut to what fits in memory."""

from collections.abc import Callable

import torch

from utils.errors import UserError

# Examples at a time to begin with, where the user leaves it open: a GPU says when its memory is full, a CPU does not.
AUTOMATIC = {"cuda": 2**16, "cpu": 8}


class PhysicalBatches:
    """Sums over a logical batch, as many examples at a time as memory takes.

    max_size: examples at most; None: chosen for the device. n_split: the number of parts, whatever their size. When a
    part does not fit, the size is halved, for good, and the part is taken again; what its examples contribute depends
    on their place in the logical batch alone, so the sum stays the same up to rounding.

    A Poisson sample has another size in every step. On a GPU a part is asked to be computed as one of a few larger
    sizes, for which kernels have been chosen before.
    """

    def __init__(self, max_size: int | None, n_split: int | None, device: torch.device) -> None:
        self._max_size = max_size or AUTOMATIC.get(device.type, AUTOMATIC["cpu"])
        self._n_split = n_split
        self._fits: int | None = None  # known once memory has run out
        self._pads = device.type == "cuda"

    def add_up(
        self, count: int, part: Callable[[slice, int], torch.Tensor], total: torch.Tensor
    ) -> torch.Tensor:
        """`total` plus part(slice of positions, size to compute it at) over all `count` positions, each of them once.
        UserError where not even one example fits."""
        wanted = -(-count // self._n_split) if self._n_split else self._max_size
        start = 0
        while start < count:
            size = min(wanted, self._fits or wanted, count - start)
            try:
                total += part(slice(start, start + size), self._size_of(size))
                start += size
                continue
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(f"out of memory for a single training image: {error}") from error
            # Outside of the handler, which keeps the failed part's tensors alive.
            self._fits = size // 2
            torch.cuda.empty_cache()
            # Without a word: that a sample was this large is private.
        return total

    def _size_of(self, count: int) -> int:
        """The next of the sizes that differ by a sixteenth or less, within what is allowed and fits."""
        if not self._pads:
            return count
        step = 2 ** max(0, count.bit_length() - 5)
        limits = [self._fits, None if self._n_split else self._max_size]
        return min([-(-count // step) * step, *(limit for limit in limits if limit)])
