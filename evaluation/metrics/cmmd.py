"""CMMD: maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv:2401.09603)."""

import numpy as np

from evaluation.neighbours import blocks
from evaluation.registry import metric

BANDWIDTH, SCALE = 10.0, 1000.0  # of the Gaussian kernel, and what the paper multiplies the distance with


@metric(
    "cmmd",
    better="lower",
    needs=("train_features", "sample_features", "device"),
    extractor="clip",
    min_images=2,
)
def cmmd(real: np.ndarray, fake: np.ndarray, device: str = "cpu") -> float:
    """1000 times the unbiased squared MMD of embeddings (N, D), (M, D), which are scaled to length 1; about 0 for equal
    distributions."""
    import torch

    real, fake = (torch.as_tensor(points, device=device).double() for points in (real, fake))
    real, fake = (points / points.norm(dim=1, keepdim=True) for points in (real, fake))
    within = sum(_kernel_sum(points, points) / (len(points) * (len(points) - 1)) for points in (real, fake))
    return SCALE * (within - 2 * _kernel_sum(real, fake) / (len(real) * len(fake)))


def _kernel_sum(first, second) -> float:
    """Sum of k(x, y) - 1 over all pairs: k is close to 1, and the ones cancel in the estimate; k(x, x) adds nothing."""
    total = 0.0
    for rows, columns in blocks(len(first), len(second), "CMMD"):
        squared = (2 - 2 * first[rows] @ second[columns].T).clamp_(min=0)
        total += (squared / (-2 * BANDWIDTH**2)).expm1_().sum().item()
    return total
