"""Distances between feature sets, in blocks of bounded memory, for the metrics that look at nearest neighbours.

Legend: N, M points, D features.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from utils.progress import progress

NUM_NEIGHBOURS = 5  # the most that a metric asks for
MAX_DISTANCES = 2**21  # distances held at a time: 8 MiB each copy
# Squared float32 distances below this share of the squared norms are rounding: the two points count as equal.
ROUNDING = 1e-6


class CentredPoints:
    """Points (N, D) that are shifted by a centre where they are sliced, into float32 tensors: a shifted copy of all
    would be as large as they are. Distances do not change, and less of them is lost to cancellation."""

    def __init__(self, points: np.ndarray, centre: np.ndarray, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self._points, self._centre = points.astype(np.float32, copy=False), centre.astype(np.float32)
        if self.device.type != "cpu":
            parts = (np.ascontiguousarray(self._points), self._centre)
            self._points, self._centre = (torch.as_tensor(part, device=self.device) for part in parts)

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, rows: slice):
        import torch

        return torch.as_tensor(self._points[rows] - self._centre)


def centre_of(points: np.ndarray) -> np.ndarray:
    return points.mean(axis=0, dtype=np.float64)


def nearest_others(points, k: int, description: str):
    """Squared distances of every point to its k nearest other points of the set, the nearest first: (N, k)."""
    import torch

    found = torch.full((len(points), k), torch.inf, device=points.device)
    for rows, columns in blocks(len(points), len(points), description, mirrored=True):
        squared = squared_distances(points[rows], points[columns])
        if rows == columns:
            squared.fill_diagonal_(torch.inf)
        else:
            _keep_nearest(found[columns], squared.T)
        _keep_nearest(found[rows], squared)
    return found


def nearest(first: np.ndarray, second, centre: np.ndarray, description: str):
    """Of every point of `first` (N, D) the nearest of `second` (M, D), which `centre` has shifted: squared distances
    (N,) and indices (N,)."""
    import torch

    distances = torch.full((len(first),), torch.inf, device=second.device)
    indices = torch.zeros(len(first), dtype=torch.long, device=second.device)
    for rows, columns, squared in distance_blocks(first, second, centre, description):
        least, places = squared.min(dim=1)
        closer = least < distances[rows]
        distances[rows][closer] = least[closer]
        indices[rows][closer] = places[closer] + columns.start
    return distances, indices


def distance_blocks(first: np.ndarray, second, centre: np.ndarray, description: str) -> Iterator[tuple]:
    """Slices of rows of `first` (N, D) and of `second` (M, D), which `centre` has shifted, and their squared distances.

    The points of `first` are shifted block by block: a copy of all would be as large as they are.
    """
    for rows, columns in blocks(len(first), len(second), description):
        if columns.start == 0:
            points = CentredPoints(first[rows], centre, second.device)[:]
        yield rows, columns, squared_distances(points, second[columns])


def squared_distances(first, second):
    """(N, D), (M, D) -> (N, M)."""
    import torch

    # Norms without a temporary array of squares, which would be as large as the points.
    lengths = [torch.linalg.vector_norm(points, dim=1) for points in (first, second)]
    norms = lengths[0][:, None] ** 2 + lengths[1] ** 2
    squared = norms.addmm(first, second.T, alpha=-2)
    return squared.masked_fill_(squared < ROUNDING * norms, 0.0)


def blocks(
    num_rows: int, num_columns: int, description: str, *, mirrored: bool = False
) -> Iterable[tuple[slice, slice]]:
    """Slices of rows and of columns of a matrix of distances, so that one block holds at most MAX_DISTANCES.

    Blocks are square, since a product of flat ones waits for memory. `mirrored`: of a symmetric matrix those on and
    above the diagonal; the others are their mirror images.
    """
    side = math.isqrt(MAX_DISTANCES)
    found = [
        (slice(top, min(top + side, num_rows)), slice(left, min(left + side, num_columns)))
        for top in range(0, num_rows, side)
        for left in range(top if mirrored else 0, num_columns, side)
    ]
    return progress(found, description, unit="block") if len(found) > 1 else found


def _keep_nearest(found, squared) -> None:
    """Put the smallest of `found` (B, k) and of new distances (B, M) into `found`, the smallest first."""
    import torch

    k = found.shape[1]
    least = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
    found.copy_(torch.cat([found, least], dim=1).topk(k, dim=1, largest=False).values)
