"""Distances between feature sets, in blocks of bounded memory, for nearest-neighbour metrics and the gallery.

Legend: N, M points, D features.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from utils.progress import progress

NUM_NEIGHBOURS = 5  # the most that a metric needs
PER_CLASS, GALLERY_NEIGHBOURS, GALLERY_ROWS = 2, 4, 40
MAX_DISTANCES = 2**21  # distances held at a time: 8 MiB each copy
# Squared float32 distances below this share of the squared norms are rounding error: the points count as equal.
ROUNDING = 1e-6


class CentredPoints:
    """Points (N, D), shifted by a centre when they are sliced into float32 tensors: a shifted copy of all would need as
    much memory as the points. The shift does not change distances and reduces cancellation."""

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
    """Squared distances of every point to its k nearest other points of the set, nearest first: (N, k)."""
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
    """The nearest point of `second` (M, D) for every point of `first` (N, D): squared distances (N,) and indices (N,).
    `second` is already shifted by `centre`."""
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
    """Slices of rows of `first` (N, D) and of `second` (M, D), and their squared distances. `second` is already shifted
    by `centre`; `first` is shifted block by block, to save memory."""
    for rows, columns in blocks(len(first), len(second), description):
        if columns.start == 0:
            points = CentredPoints(first[rows], centre, second.device)[:]
        yield rows, columns, squared_distances(points, second[columns])


def squared_distances(first, second):
    """(N, D), (M, D) -> (N, M)."""
    import torch

    # vector_norm needs no temporary array of squares.
    lengths = [torch.linalg.vector_norm(points, dim=1) for points in (first, second)]
    norms = lengths[0][:, None] ** 2 + lengths[1] ** 2
    squared = norms.addmm(first, second.T, alpha=-2)
    return squared.masked_fill_(squared < ROUNDING * norms, 0.0)


def blocks(
    num_rows: int, num_columns: int, description: str, *, mirrored: bool = False
) -> Iterable[tuple[slice, slice]]:
    """Slices of rows and columns of a distance matrix, so that one block holds at most MAX_DISTANCES.

    Blocks are square, since products of flat blocks are limited by memory bandwidth. `mirrored`: for a symmetric
    matrix, only the blocks on and above the diagonal.
    """
    side = math.isqrt(MAX_DISTANCES)
    found = [
        (slice(top, min(top + side, num_rows)), slice(left, min(left + side, num_columns)))
        for top in range(0, num_rows, side)
        for left in range(top if mirrored else 0, num_columns, side)
    ]
    return progress(found, description, unit="block") if len(found) > 1 else found


def nearest_training(
    train: np.ndarray, samples: np.ndarray, labels: np.ndarray, device: str
) -> dict[int, list[int]]:
    """Rows of the gallery, from features (N, D) and (M, D): sample -> its nearest training images, nearest first.

    For each class the PER_CLASS samples that are nearest to a training image, since copies are among them.
    """
    centre = centre_of(train)
    train = CentredPoints(train, centre, device)
    squared = nearest(samples, train, centre, "gallery")[0].cpu().numpy()
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rows = [of_class[np.argsort(squared[of_class], kind="stable")[:PER_CLASS]] for of_class in rows]
    chosen = np.concatenate(rows)[:GALLERY_ROWS]
    distances = squared_distances(CentredPoints(samples[chosen], centre, device)[:], train[:])
    found = distances.topk(min(GALLERY_NEIGHBOURS, len(train)), largest=False).indices
    return {int(row): neighbours for row, neighbours in zip(chosen, found.tolist(), strict=True)}


def _keep_nearest(found, squared) -> None:
    """Update `found` (B, k) with the smallest of its values and of new distances (B, M), smallest first."""
    import torch

    k = found.shape[1]
    least = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
    found.copy_(torch.cat([found, least], dim=1).topk(k, dim=1, largest=False).values)
