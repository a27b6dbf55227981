"""Expected calibration error of the classifiers on real test images (Guo et al. 2017, arXiv:1706.04599)."""

import numpy as np

from evaluation.metrics.accuracy import facts
from evaluation.registry import Value, metric
from utils.errors import Unavailable

NUM_BINS = 15


@metric("calibration_error", better="lower", needs=("classifiers", "test"))
def calibration_error(classifiers: list, test) -> dict[str, Value | Unavailable]:
    """How far confidence is from accuracy on `test`, in [0, 1], per classifier and selection."""
    values: dict[str, Value | Unavailable] = {}
    for judged in classifiers:
        for selection, choice in judged.choices.items():
            name = f"calibration_error/{judged.name}/{selection}"
            missing = isinstance(choice, Unavailable)
            values[name] = (
                choice if missing else Value(ece(choice.logits, test.labels), facts(judged, selection))
            )
    return values


def ece(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images of |accuracy - mean confidence| in the image's bin of confidence; NUM_BINS equal bins.

    logits (N, K), labels (N,).
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(axis=1)
    right = logits.argmax(axis=1) == labels
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(bins, right.astype(np.float64) - confidence, NUM_BINS)
    return float(np.abs(gaps).sum() / len(labels))
