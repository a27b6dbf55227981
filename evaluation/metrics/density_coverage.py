"""Density and coverage (Naeem et al. 2020, arXiv:2002.09797): precision and recall that one outlier cannot move."""

import numpy as np

from evaluation.neighbours import CentredPoints, centre_of, distance_blocks, nearest_others
from evaluation.registry import metric


@metric(
    "density_coverage",
    better={"density": "higher", "coverage": "higher"},
    needs=("train_features", "sample_features", "device", "train_neighbours"),
    min_images=6,
)
def density_coverage(
    real: np.ndarray, fake: np.ndarray, device: str = "cpu", real_neighbours=None, *, k: int = 5
) -> dict[str, float]:
    """Features real (N, D) and fake (M, D); N > k.

    A ball around each real point reaches to its k-th nearest other real point; the border belongs to it. Density:
    the mean number of balls that a fake point lies in, divided by k; 1 in expectation for equal distributions, and may
    exceed it. Coverage: the share of balls that hold a fake point, in [0, 1]. The package prdc leaves the border out,
    so it counts less if distances are equal, as those of copies are.
    """
    import torch

    centre = centre_of(real)
    real = CentredPoints(real, centre, device)
    if real_neighbours is None:
        real_neighbours = nearest_others(real, k, "real radii")
    radii = real_neighbours[:, k - 1]
    memberships, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=device)
    for _, columns, squared in distance_blocks(fake, real, centre, "density, coverage"):
        inside = squared <= radii[columns]
        memberships += inside.sum().item()
        covered[columns] |= inside.any(dim=0)
    return {"density": memberships / (k * len(fake)), "coverage": covered.double().mean().item()}
