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
RECORDS_AT_ONCE = 32  # always so many, with blank ones in the places that are left


def choose_backend(name: str) -> str:
    """faiss or torch; "auto" is torch, whose votes rounding does not move."""
    if name == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UserError("train.nn_backend: faiss is not installed; pip install faiss-cpu, or set it to torch")
    return "torch" if name == "auto" else name


class NearestCandidates:
    """The k nearest of n candidates, nearest first, for any number of records; of equally near ones the first.

    The candidates are synthetic, but the result depends on private records: only a mechanism may see it.

    A record's votes must not depend on other records. Libraries choose the order of summation by the batch size, and a
    population holds some candidates twice: if rounding separates the copies, one additional record of a class could
    move the votes of all others. So distances are always computed for RECORDS_AT_ONCE records, in float64, and compared
    in float32.
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
        missing = -len(records) % RECORDS_AT_ONCE
        whole = self._prepared(F.pad(records, (0, 0, 0, missing)))
        return self._search(whole, self._num_neighbors)[: len(records)]

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
        self._features, self._by_distance = features, by_distance
        # Added to all scores: near 0 float32 would tell apart what float64 cannot.
        self._typical = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64).square().mean()

    def __call__(self, records: torch.Tensor, num_neighbors: int) -> torch.Tensor:
        scores = records.new_empty(len(records), 0)
        indices = torch.empty(len(records), 0, dtype=torch.int64, device=records.device)
        for start in range(0, len(self._features), CANDIDATES_AT_ONCE):
            found = self._scores(records, self._features[start : start + CANDIDATES_AT_ONCE])
            best, where = _smallest(found, num_neighbors)
            scores, order = torch.cat([scores, best], 1).sort(
                dim=1, stable=True
            )  # earlier blocks stay before
            indices = torch.cat([indices, where + start], 1).gather(1, order)
            scores, indices = scores[:, :num_neighbors], indices[:, :num_neighbors]
        return indices

    def _scores(self, records: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(B, n) float32, smaller for nearer ones: -x.y, or |y|^2 / 2 - x.y, which orders candidates y as |x - y|^2."""
        features = features.double()
        squares = features.square().sum(1) if self._by_distance else features.new_zeros(len(features))
        offsets = squares / 2 + self._typical
        found = records.new_empty(len(records), len(features))
        for start in range(0, len(records), RECORDS_AT_ONCE):
            part = records[start : start + RECORDS_AT_ONCE].double()
            found[start : start + RECORDS_AT_ONCE] = torch.addmm(offsets, part, features.T, alpha=-1)
        return found


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
    """Search by the faiss library (Douze et al. 2024), on the CPU, in float32: of copies of a candidate rounding may
    choose another one for every record, though the same one in every batch."""

    def __init__(self, features: torch.Tensor, by_distance: bool) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self._index = (faiss.IndexFlatL2 if by_distance else faiss.IndexFlatIP)(features.shape[1])
        self._index.add(np.ascontiguousarray(features.cpu().numpy(), dtype=np.float32))

    def __call__(self, records: torch.Tensor, num_neighbors: int) -> torch.Tensor:
        found = torch.empty(len(records), num_neighbors, dtype=torch.int64)
        for start in range(0, len(records), RECORDS_AT_ONCE):
            part = np.ascontiguousarray(records[start : start + RECORDS_AT_ONCE].cpu().numpy())
            found[start : start + RECORDS_AT_ONCE] = torch.from_numpy(
                self._index.search(part, num_neighbors)[1]
            )
        return found.to(records.device)
