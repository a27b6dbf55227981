"""Precision and recall by k-nearest-neighbour balls (Kynkaanniemi et al. 2019, arXiv:1904.06991)."""

import numpy as np

from evaluation.neighbours import CentredPoints, centre_of, distance_blocks, nearest_others
from evaluation.registry import metric


@metric(
    "precision_recall",
    better={name: "higher" for name in ("precision", "recall", "precision_k4", "recall_k4")},
    needs=("train_features", "sample_features", "device", "train_neighbours"),
    min_images=5,
)
def precision_recall(
    real: np.ndarray, fake: np.ndarray, device: str = "cpu", real_neighbours=None, *, k: int = 3
) -> dict[str, float]:
    """Shares in [0, 1] of features real (N, D) and fake (M, D); N, M > k.

    Precision: fake points inside the ball of some real point; recall: real points inside the ball of some fake one.
    The radius of a ball is the distance to the k-th nearest other point of the same set; the border belongs to it.
    The variants "_k4" are those of the published benchmark, whose 4 neighbours count the point itself: the same
    radius, without the border. `real_neighbours` (N, >= k) holds `nearest_others` of the real points, if known.
    """
    import torch

    centre = centre_of(real)
    fake_radii = nearest_others(CentredPoints(fake, centre, device), k, "fake radii")[:, k - 1]
    real = CentredPoints(real, centre, device)
    if real_neighbours is None:
        real_neighbours = nearest_others(real, k, "real radii")
    real_radii = real_neighbours[:, k - 1]
    names = ("precision", "recall", "precision_k4", "recall_k4")
    hit = {
        name: torch.zeros(len(fake if "precision" in name else real), dtype=torch.bool, device=device)
        for name in names
    }
    for rows, columns, squared in distance_blocks(fake, real, centre, "precision, recall"):
        of_real, of_fake = real_radii[columns], fake_radii[rows, None]
        hit["precision"][rows] |= (squared <= of_real).any(dim=1)
        hit["precision_k4"][rows] |= (squared < of_real).any(dim=1)
        hit["recall"][columns] |= (squared <= of_fake).any(dim=0)
        hit["recall_k4"][columns] |= (squared < of_fake).any(dim=0)
    return {name: _share(points) for name, points in hit.items()}


def _share(inside) -> float:
    return inside.double().mean().item()
