"""Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401)."""

import numpy as np

from evaluation.features import in_fixed_order
from evaluation.registry import Value, metric
from utils.progress import progress
from utils.seeding import numpy_rng

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


@metric("kid", better="lower", needs=("train_features", "sample_features"), min_images=10)
def kid(
    real: np.ndarray, fake: np.ndarray, *, num_subsets: int = NUM_SUBSETS, subset_size: int = SUBSET_SIZE
) -> Value:
    """Mean over random subsets of the unbiased squared MMD with the kernel (x.y / D + 1)^3; features (N, D), (M, D).

    About 0 for equal distributions, and may be negative. `std` in its info is the deviation over the subsets, which
    are no larger than the smaller set. If both sets are one subset, there is only one, and no `std`.
    """
    subset_size = min(subset_size, len(real), len(fake))
    is_whole = subset_size == max(len(real), len(fake))
    num_subsets = 1 if is_whole else num_subsets
    real, fake = in_fixed_order(real), in_fixed_order(fake)
    rng = numpy_rng(0, "KID subsets")
    values = []
    for _ in progress(range(num_subsets), "KID", unit="subset"):
        chosen = (points[rng.choice(len(points), subset_size, replace=False)] for points in (real, fake))
        values.append(squared_mmd(*chosen))
    spread = {} if is_whole else {"std": float(np.std(values))}
    return Value(float(np.mean(values)), spread | {"subset_size": subset_size})


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate (Gretton et al. 2012, lemma 6) for two sets of equal size (n, D)."""
    count = len(first)
    within = sum(
        kernel.sum() - np.trace(kernel) for kernel in (_kernel(first, first), _kernel(second, second))
    )
    return within / (count * (count - 1)) - 2 * _kernel(first, second).mean()


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return ((first @ second.T).astype(np.float64) / first.shape[1] + 1) ** 3
