"""An order of points that does not depend on the order in which they came: metrics that draw subsets use it."""

import numpy as np

from utils.seeding import numpy_rng


def in_own_order(points: np.ndarray) -> np.ndarray:
    """The rows (N, D) in a fixed pseudo-random order that depends on their values alone.

    Rows are sorted, then shuffled by a fixed permutation, so that consecutive ones are not alike.
    """
    ordered = np.lexsort(points.T[::-1][-16:])  # ties in 16 features are copies, or as good as that
    return points[ordered[numpy_rng(0, "order of points").permutation(len(points))]]
