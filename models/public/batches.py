"""Batches of images that need no accounting: public ones, or the result of a private query."""

from collections.abc import Iterator

import numpy as np
import torch

from utils.draws import Draws
from utils.progress import progress
from utils.runtime import log
from utils.seeding import numpy_rng

FEW_STEPS = 100  # below which a network has hardly begun to learn


def steps_of(num_images: int, batch_size: int, num_epochs: int) -> tuple[int, int]:
    """(steps, images per step) of `public_batches`."""
    size = min(batch_size, num_images)
    return num_epochs * (num_images // size), size


def public_batches(
    stage: str,
    num_images: int,
    batch_size: int,
    num_epochs: int,
    seed: int,
    *,
    start: int = 0,
    before: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, increasing positions of its batch) from step `start` on, of num_epochs passes that follow `before` steps.

    Each pass has an order of its own, which the seed repeats; its remainder is left out. A set smaller
    than batch_size is one batch.
    """
    num_steps, size = steps_of(num_images, batch_size, num_epochs)
    if size < batch_size:
        log.info(f"{stage}: there are {size} images, fewer than batch_size={batch_size}")
    if 0 < num_steps < FEW_STEPS:
        log.info(
            f"{stage}: only {num_steps} training steps, too few for most networks; more epochs cost no privacy"
        )
    steps_per_epoch = num_images // size
    total = before + num_steps
    order, shown = None, None
    for step in progress(range(start, total), stage, total=total, initial=start):
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != shown:
            order, shown = numpy_rng(seed, f"{stage} order {epoch}").permutation(num_images), epoch
        yield step, np.sort(order[position * size : (position + 1) * size])


def randomly_flipped(images: torch.Tensor, rng: Draws) -> torch.Tensor:
    """(B, C, H, W), each image mirrored from left to right or not, with equal chance."""
    flipped = rng.uniform() < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)
