"""Which candidates lie nearest to a private record: its votes. Legend: B records, n candidates, D features, k votes."""

import importlib.util

import numpy as np
import torch
import torch.nn.functional as F

from opacus_ext.private_data import PerExample
from utils.errors import UserError, unknown

MODES = ("L2", "IP", "cosine")  # Euclidean distance, inner product, angle
BACKENDS = ("auto", "faiss", "torch")
LARGEST_FEATURE = 1e6  # beyond it squares could overflow, and a record would find nobody
CANDIDATES_AT_ONCE = 8192  # whose scores for a batch of records are in memory together


def choose_backend(name: str, device: str) -> str:
    """faiss or torch; "auto" takes faiss where it is installed, unless the features lie on a GPU."""
    installed = importlib.util.find_spec("faiss") is not None
    if name == "auto":
        return "faiss" if installed and torch.device(device).type == "cpu" else "torch"
    if name == "faiss" and not installed:
        raise UserError("train.nn_backend: faiss is not installed; pip install faiss-cpu, or set it to torch")
    return name


class NearestCandidates:
    """The k nearest of n candidates, nearest first, for any number of records; of equally near ones the first.

    The candidates are synthetic; what a record's features make of them is for a mechanism alone to see.
    """

    def __init__(self, features: torch.Tensor, mode: str, num_neighbors: int, backend: str) -> None:
        """features (n, D) float32 of the candidates, n >= k; what is not finite in them is replaced in place."""
        if mode not in MODES:
            raise unknown("train.nn_mode", mode, MODES)
        self._mode, self._num_neighbors = mode, num_neighbors
        features = self._prepared(features, in_place=True)
        search = _FaissSearch if backend == "faiss" else _TorchSearch
        self._search = search(features, by_distance=mode == "L2")

    def __call__(self, records: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, k) int64 indices of candidates; every record votes, whatever its features are."""
        return self._search(self._prepared(records), self._num_neighbors)

    def _prepared(self, features: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """Finite, of moderate size, and of norm 1 where angles are compared."""
        features = torch.nan_to_num(features, out=features if in_place else None)
        features = features.clamp_(-LARGEST_FEATURE, LARGEST_FEATURE)
        return F.normalize(features) if self._mode == "cosine" else features


def ballots(nearest: list[NearestCandidates], num_neighbors: int) -> PerExample:
    """(features (B, D), labels (B,)) -> (B, k) votes of every record among the candidates of its class; with one
    search, of all candidates."""

    def cast(records: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(nearest) == 1:
            return nearest[0](records)
        votes = labels.new_empty(len(labels), num_neighbors)
        for label, search in enumerate(nearest):
            own = labels == label
            votes[own] = search(records[own])
        return votes

    return cast


class _TorchSearch:
    """Matrix products over blocks of candidates; on the CPU or a GPU."""

    def __init__(self, features: torch.Tensor, by_distance: bool) -> None:
        self._features = features
        # |x - y|^2 orders the candidates y like |y|^2 / 2 - x.y.
        self._offsets = features.square().sum(1) / 2 if by_distance else features.new_zeros(len(features))

    def __call__(self, records: torch.Tensor, num_neighbors: int) -> torch.Tensor:
        scores = records.new_empty(len(records), 0)
        indices = torch.empty(len(records), 0, dtype=torch.int64, device=records.device)
        for start in range(0, len(self._features), CANDIDATES_AT_ONCE):
            block = slice(start, start + CANDIDATES_AT_ONCE)
            found = torch.addmm(self._offsets[block], records, self._features[block].T, alpha=-1)
            best, where = _smallest(found, num_neighbors)
            scores, order = torch.cat([scores, best], 1).sort(
                dim=1, stable=True
            )  # earlier blocks stay before
            indices = torch.cat([indices, where + start], 1).gather(1, order)
            scores, indices = scores[:, :num_neighbors], indices[:, :num_neighbors]
        return indices


def _smallest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` smallest entries of each row (overwritten) and their columns, of equal ones the first."""
    rounds = []
    for _ in range(min(count, scores.shape[1])):
        column = scores.argmin(1, keepdim=True)
        rounds.append((scores.gather(1, column), column))
        scores.scatter_(1, column, torch.inf)
    values, columns = zip(*rounds, strict=True)
    return torch.cat(values, 1), torch.cat(columns, 1)


class _FaissSearch:
    """Exact search by the faiss library (Douze et al. 2024), on the CPU."""

    def __init__(self, features: torch.Tensor, by_distance: bool) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self._index = (faiss.IndexFlatL2 if by_distance else faiss.IndexFlatIP)(features.shape[1])
        self._index.add(np.ascontiguousarray(features.cpu().numpy(), dtype=np.float32))

    def __call__(self, records: torch.Tensor, num_neighbors: int) -> torch.Tensor:
        _, indices = self._index.search(np.ascontiguousarray(records.cpu().numpy()), num_neighbors)
        return torch.from_numpy(indices).to(records.device)
