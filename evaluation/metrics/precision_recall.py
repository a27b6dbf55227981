"""Precision and recall by k-nearest-neighbour balls (Kynkaanniemi et al. 2019, arXiv:1904.06991)."""

import numpy as np

from evaluation.registry import metric
from utils.progress import progress

MAX_DISTANCES = 2**24  # distances held at a time: 64 MiB each copy
# Squared float32 distances below this share of the squared norms are rounding: the two points count as equal.
ROUNDING = 1e-6


@metric(
    "precision_recall",
    better={"precision": "higher", "recall": "higher"},
    needs=("train_features", "sample_features", "device"),
    min_images=5,
)
def precision_recall(
    real: np.ndarray, fake: np.ndarray, device: str = "cpu", *, k: int = 3
) -> dict[str, float]:
    """Shares in [0, 1] of features real (N, D) and fake (M, D); N, M > k.

    Precision: fake points inside the ball of some real point; recall: real points inside the ball of some fake one.
    The radius of a ball is the distance to the k-th nearest other point of the same set; the border belongs to it.
    """
    import torch

    centre = real.mean(axis=0, dtype=np.float64)  # distances do not change, cancellation shrinks
    real, fake = (torch.as_tensor((x - centre).astype(np.float32), device=device) for x in (real, fake))
    real_radii, fake_radii = _radii(real, k, "real radii"), _radii(fake, k, "fake radii")
    inside_real, inside_fake = [], torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows in _chunks(len(fake), len(real), "precision, recall"):
        squared = _squared_distances(fake[rows], real)
        inside_real.append((squared <= real_radii).any(dim=1))
        inside_fake |= (squared <= fake_radii[rows, None]).any(dim=0)
    return {"precision": _share(torch.cat(inside_real)), "recall": _share(inside_fake)}


def _radii(points, k: int, description: str):
    """Squared distance of every point (N, D) to its k-th nearest other point: (N,)."""
    import torch

    radii = []
    for rows in _chunks(len(points), len(points), description):
        squared = _squared_distances(points[rows], points)
        own = torch.arange(rows.start, rows.stop, device=points.device)
        squared[own - rows.start, own] = torch.inf
        radii.append(squared.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _squared_distances(first, second):
    """(N, D), (M, D) -> (N, M)."""
    norms = first.square().sum(dim=1, keepdim=True) + second.square().sum(dim=1)
    squared = norms.addmm(first, second.T, alpha=-2)
    return squared.masked_fill_(squared < ROUNDING * norms, 0.0)


def _chunks(num_rows: int, num_columns: int, description: str):
    """Slices of rows so that one block of distances fits into MAX_DISTANCES."""
    step = max(1, MAX_DISTANCES // num_columns)
    starts = progress(range(0, num_rows, step), description, unit="block")
    return (slice(start, min(start + step, num_rows)) for start in starts)


def _share(inside) -> float:
    return inside.double().mean().item()
