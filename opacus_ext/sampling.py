"""Poisson batches and the chunks they are processed in."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chunk:
    """Part of one logical batch, from position `start` on. `is_last` travels with the chunk, so that no queue can get
    out of step."""

    indices: torch.Tensor
    start: int
    is_last: bool

    @property
    def positions(self) -> slice:
        """Where in the logical batch the indices stand."""
        return slice(self.start, self.start + len(self.indices))


def chunks(indices: torch.Tensor, max_size: int, n_split: int | None = None) -> Iterator[Chunk]:
    """Cut one logical batch into physical chunks of at most `max_size`, or into exactly `n_split` of nearly equal size.

    An empty batch still yields a chunk: its zero sum gets noise like any other. Order is kept, every index occurs
    exactly once.
    """
    count = n_split or max(1, -(-len(indices) // max_size))
    start = 0
    for position, part in enumerate(torch.tensor_split(indices, count)):
        yield Chunk(part, start, position == count - 1)
        start += len(part)
