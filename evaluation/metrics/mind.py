"""Monge Inception distance (Berthet et al. 2026, arXiv:2605.06797)."""

import numpy as np

from evaluation.ordering import in_own_order
from evaluation.registry import Value, metric
from utils.seeding import numpy_rng

NUM_PROJECTIONS = 1000
AT_A_TIME = 50  # projections in memory: (50, N) float32


@metric("mind", better="lower", needs=("train_features", "sample_features"), min_images=10)
def mind(real: np.ndarray, fake: np.ndarray, *, num_projections: int = NUM_PROJECTIONS) -> Value:
    """3 D times the squared 2-Wasserstein distance along random directions, on average; features (N, D), (M, D).

    At least 0, and about |shift|^2 * 3 for sets that differ by a shift. Sorted projections pair the points, so the
    larger set is cut to as many as the smaller one has, `num_used`; `std_error` is that of the mean over directions.
    """
    count, dim = min(len(real), len(fake)), real.shape[1]
    real, fake = in_own_order(real)[:count], in_own_order(fake)[:count]
    directions = numpy_rng(0, "MIND directions").standard_normal((num_projections, dim), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    distances = np.concatenate(
        [
            _squared_distances(part @ real.T, part @ fake.T)
            for part in np.array_split(directions, -(-num_projections // AT_A_TIME))
        ]
    )
    std_error = 3 * dim * distances.std() / num_projections**0.5
    return Value(float(3 * dim * distances.mean()), {"num_used": count, "std_error": float(std_error)})


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P, n), (P, n) -> (P,): squared 2-Wasserstein distance of each pair of rows, a row being n points of a line."""
    gaps = np.sort(first, axis=1).astype(np.float64) - np.sort(second, axis=1)
    return np.square(gaps).mean(axis=1)
