"""Distances between feature sets, in blocks of bounded memory, for the metrics that look at nearest neighbours.

Legend: N, M points, D features. Points are float32 tensors that `centred` has shifted.
"""

from collections.abc import Iterator

import numpy as np

from utils.progress import progress

NUM_NEIGHBOURS = 5  # the most that a metric asks for
MAX_DISTANCES = 2**21  # distances held at a time: 8 MiB each copy
# Squared float32 distances below this share of the squared norms are rounding: the two points count as equal.
ROUNDING = 1e-6


def centred(points: np.ndarray, centre: np.ndarray, device: str):
    """(N, D), (D,) -> float32 tensor (N, D). Distances do not change, and less of them is lost to cancellation."""
    import torch

    return torch.as_tensor(points.astype(np.float32, copy=False) - centre.astype(np.float32), device=device)


def centre_of(points: np.ndarray) -> np.ndarray:
    return points.mean(axis=0, dtype=np.float64)


def nearest_others(points, k: int, description: str):
    """Squared distances of every point to its k nearest other points of the set, the nearest first: (N, k)."""
    import torch

    found = torch.empty(
        len(points), k, device=points.device
    )  # parts in a list would keep their blocks in memory
    for rows in blocks(len(points), len(points), description):
        squared = squared_distances(points[rows], points)
        own = torch.arange(rows.start, rows.stop, device=points.device)
        squared[own - rows.start, own] = torch.inf
        found[rows] = squared.topk(k, dim=1, largest=False).values
    return found


def nearest(first: np.ndarray, second, centre: np.ndarray, description: str):
    """Of every point of `first` (N, D) the nearest of `second` (M, D), which `centre` has shifted: squared distances
    (N,) and indices (N,)."""
    import torch

    distances = torch.empty(len(first), device=second.device)
    indices = torch.empty(len(first), dtype=torch.long, device=second.device)
    for rows, squared in distance_blocks(first, second, centre, description):
        distances[rows], indices[rows] = squared.min(dim=1)
    return distances, indices


def distance_blocks(first: np.ndarray, second, centre: np.ndarray, description: str) -> Iterator[tuple]:
    """Slices of rows of `first` (N, D), and their squared distances (B, M) to `second` (M, D), which `centre` has
    shifted. The points of `first` are shifted block by block: a copy of all would be as large as they are."""
    for rows in blocks(len(first), len(second), description):
        yield rows, squared_distances(centred(first[rows], centre, second.device), second)


def squared_distances(first, second):
    """(N, D), (M, D) -> (N, M)."""
    import torch

    # Norms without a temporary array of squares, which would be as large as the points.
    lengths = [torch.linalg.vector_norm(points, dim=1) for points in (first, second)]
    norms = lengths[0][:, None] ** 2 + lengths[1] ** 2
    squared = norms.addmm(first, second.T, alpha=-2)
    return squared.masked_fill_(squared < ROUNDING * norms, 0.0)


def blocks(num_rows: int, num_columns: int, description: str) -> Iterator[slice]:
    """Slices of rows so that one block of distances fits into MAX_DISTANCES."""
    step = max(1, MAX_DISTANCES // num_columns)
    starts = range(0, num_rows, step)
    if len(starts) > 1:
        starts = progress(starts, description, unit="block")
    return (slice(start, min(start + step, num_rows)) for start in starts)
