"""Samples whose labels a released classifier confirms. Post-processing: it costs no privacy."""

from collections.abc import Callable

import numpy as np
from torch import nn

from models.released.classifier import logits_of
from utils import distributed
from utils.runtime import log

ROUNDS = 5  # of drawing again what the classifier does not confirm


def draw_agreeing(
    draw: Callable[[np.ndarray, str], np.ndarray], labels: np.ndarray, classifier: nn.Module, device: str
) -> np.ndarray:
    """One image per label (N,): (N, C, H, W) uint8. draw(labels, stream) draws images; those that `classifier` labels
    otherwise are drawn again, ROUNDS times at most."""
    images = draw(labels, "generate")

    def is_wrong(rows: np.ndarray) -> np.ndarray:
        """By one process for all, because rounding may decide a label."""
        return distributed.from_main(
            lambda: logits_of(classifier, images[rows], device).argmax(1) != labels[rows]
        )

    wrong = np.flatnonzero(is_wrong(np.arange(len(labels))))
    for number in range(1, ROUNDS + 1):
        if len(wrong) == 0:
            break
        images[wrong] = draw(labels[wrong], f"generate again {number}")
        wrong = wrong[is_wrong(wrong)]
    if len(wrong):
        log.info(
            f"gen.agree: the classifier labels {len(wrong):,} of {len(labels):,} samples otherwise after {ROUNDS} more "
            f"draws; they are kept"
        )
    return images
