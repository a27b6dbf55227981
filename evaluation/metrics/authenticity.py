"""AuthPct: the share of samples that are no copies (Alaa et al. 2022, arXiv:2102.08921)."""

import numpy as np

from evaluation.neighbours import CentredPoints, centre_of, nearest, nearest_others
from evaluation.registry import metric


@metric(
    "authpct",
    better="higher",
    needs=("train_features", "sample_features", "device", "train_neighbours"),
    min_images=2,
    memorisation={"authpct": "about 50 for fresh images, 0 for copies of training images"},
)
def authpct(real: np.ndarray, fake: np.ndarray, device: str = "cpu", real_neighbours=None) -> float:
    """Percent of fake points (M, D) that are farther from their nearest training point than that one is from its
    nearest other training point; real (N, D), N > 1. About 50 for fresh draws of the same distribution."""
    centre = centre_of(real)
    real = CentredPoints(real, centre, device)
    if real_neighbours is None:
        real_neighbours = nearest_others(real, 1, "real radii")
    squared, indices = nearest(fake, real, centre, "nearest training images")
    return 100.0 * (squared > real_neighbours[indices, 0]).double().mean().item()
