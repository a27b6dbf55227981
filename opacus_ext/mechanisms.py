"""Clipping of per-example values: what makes a sum's sensitivity a fact instead of a promise."""

import torch


def clip_rows(values: torch.Tensor, l2_bound: float) -> torch.Tensor:
    """(B, ...) -> (B, D): each row scaled to an L2 norm of at most `l2_bound`.

    A row with a non-finite entry becomes zero: it must not poison the sum, and dropping it is a decision about that
    record alone. Zero rows stay zero. Norms are taken in float64, so that huge finite entries do not overflow.
    """
    rows = values.flatten(1) if values.dim() > 1 else values[:, None]
    finite = torch.isfinite(rows).all(dim=1)
    rows = torch.where(finite[:, None], rows, torch.zeros_like(rows))
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    scale = torch.clamp(l2_bound / norms.clamp_min(torch.finfo(torch.float64).tiny), max=1.0)
    return (rows.double() * scale[:, None]).float()


def clipped_sum(values: torch.Tensor, l2_bound: float, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sum of clipped rows by group: (num_groups, D) float64. Each row falls into one group, so the L2 sensitivity of
    the whole matrix to one record is `l2_bound`. An empty batch is a zero sum."""
    rows = clip_rows(values, l2_bound)
    total = torch.zeros(num_groups, rows.shape[1], dtype=torch.float64, device=rows.device)
    return total.index_add_(0, groups, rows.double())


def vote_rows(votes: torch.Tensor, num_bins: int) -> torch.Tensor:
    """(B, k) bin indices -> (B, num_bins) counts. Indices outside the bins raise, whoever cast them."""
    if votes.numel() and (int(votes.min()) < 0 or int(votes.max()) >= num_bins):
        raise IndexError(f"a vote names a bin outside 0..{num_bins - 1}")
    rows = torch.zeros(len(votes), num_bins, device=votes.device)
    return rows.scatter_add_(1, votes, torch.ones_like(votes, dtype=rows.dtype))
