"""Drawing many images in batches, shared by the processes of a run."""

from collections.abc import Callable

import numpy as np
import torch

from utils import distributed
from utils.progress import progress


def in_batches(
    count: int,
    batch_size: int,
    draw: Callable[[slice], np.ndarray],
    image_shape: tuple[int, int, int],
    description: str | None,
) -> np.ndarray:
    """(count, *image_shape) uint8 from draw(rows) for slices of at most `batch_size` rows. The slices, and so the
    streams of randomness that they name, do not depend on the number of processes. No description: no progress bar."""
    starts = range(0, count, batch_size)
    starts = starts[distributed.share(len(starts))]
    if description is not None:
        starts = progress(starts, description, unit="batch")
    parts = [np.empty((0, *image_shape), np.uint8)]
    parts += [draw(slice(start, min(start + batch_size, count))) for start in starts]
    return distributed.concatenate(torch.from_numpy(np.concatenate(parts))).numpy()
