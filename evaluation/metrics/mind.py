"""Monge Inception distance (Berthet et al. 2026, arXiv:2605.06797)."""

import numpy as np

from evaluation.features import in_fixed_order
from evaluation.registry import Value, metric
from utils.seeding import numpy_rng

NUM_PROJECTIONS = 1000
AT_A_TIME = 50  # projections in memory: (50, N) float32
NUM_SUBSETS = 20  # drawn to measure how much the choice of a subset changes the value


@metric("mind", better="lower", needs=("train_features", "sample_features"), min_images=10)
def mind(real: np.ndarray, fake: np.ndarray, *, num_projections: int = NUM_PROJECTIONS) -> Value:
    """3 D times the squared 2-Wasserstein distance along random directions, on average; features (N, D), (M, D).

    At least 0, and about |shift|^2 * 3 for sets that differ by a shift. Sorted projections pair the points, so the
    larger set is cut to as many as the smaller one has, `num_used`. `std_error` is the standard deviation of the value
    over other random directions and other subsets of the larger set; both image sets are taken as given.
    """
    count, dim = min(len(real), len(fake)), real.shape[1]
    real, fake = in_fixed_order(real), in_fixed_order(fake)
    directions = numpy_rng(0, "MIND directions").standard_normal((num_projections, dim), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    distances = np.concatenate(
        [
            _squared_distances(part @ real[:count].T, part @ fake[:count].T)
            for part in np.array_split(directions, -(-num_projections // AT_A_TIME))
        ]
    )
    variance = distances.var() / num_projections + _subset_variance(real, fake, directions[:AT_A_TIME])
    std_error = 3 * dim * float(variance) ** 0.5
    return Value(float(3 * dim * distances.mean()), {"num_used": count, "std_error": std_error})


def _subset_variance(real: np.ndarray, fake: np.ndarray, directions: np.ndarray) -> float:
    """The variance that the choice of the larger set's subset gives to the mean distance over all directions.

    Every subset is projected on the same `directions` (P, D). What a subset and a direction do together averages out
    over many directions, so its share is subtracted: a two-way analysis of variance.
    """
    smaller, larger = sorted((real, fake), key=len)
    if len(smaller) == len(larger):
        return 0.0
    rng = numpy_rng(0, "MIND subsets")
    along, fixed = directions @ larger.T, np.sort(directions @ smaller.T, axis=1)
    subsets = (rng.choice(len(larger), len(smaller), replace=False) for _ in range(NUM_SUBSETS))
    table = np.stack([_squared_distances(along[:, rows], fixed) for rows in subsets])  # (subsets, P)
    means = table.mean(axis=1)
    joint = table - means[:, None] - table.mean(axis=0) + table.mean()
    degrees_of_freedom = (table.shape[0] - 1) * max(1, table.shape[1] - 1)
    return max(0.0, means.var(ddof=1) - np.square(joint).sum() / degrees_of_freedom / table.shape[1])


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P, n), (P, n) -> (P,): squared 2-Wasserstein distance of each pair of rows, a row being n points of a line."""
    gaps = np.sort(first, axis=1).astype(np.float64) - np.sort(second, axis=1)
    return np.square(gaps).mean(axis=1)
