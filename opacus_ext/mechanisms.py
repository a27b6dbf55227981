"""Clipping of per-example values: what makes a sum's sensitivity a fact instead of a promise."""

import torch


def clip_rows(values: torch.Tensor, l2_bound: float) -> torch.Tensor:
    """(B, ...) -> (B, D): each row scaled to an L2 norm of at most `l2_bound`.

    A row with a non-finite entry becomes zero: it must not poison the sum, and dropping it is a decision about that
    record alone. Zero rows stay zero. Norms are taken in float64, so that huge finite entries do not overflow.
    """
    rows = (values.flatten(1) if values.dim() > 1 else values[:, None]).float()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    scale = (l2_bound / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    # In two steps, for the scale of a huge row is too small for float32.
    root = scale.sqrt().float()[:, None]
    return torch.where(torch.isfinite(norms)[:, None], rows * root * root, 0.0)


def clipped_sum(values: torch.Tensor, l2_bound: float, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sum of clipped rows by group: (num_groups, D) float64. Each row falls into one group, so the L2 sensitivity of
    the whole matrix to one record is `l2_bound`. An empty batch is a zero sum."""
    rows = clip_rows(values, l2_bound)
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} values for {len(groups)} records")
    return torch.stack([rows[groups == group].sum(0, dtype=torch.float64) for group in range(num_groups)])


def vote_rows(votes: torch.Tensor, num_bins: int) -> torch.Tensor:
    """(B, k) bin indices -> (B, num_bins) counts. Indices outside the bins raise, whoever cast them."""
    if votes.numel() and (int(votes.min()) < 0 or int(votes.max()) >= num_bins):
        raise IndexError(f"a vote names a bin outside 0..{num_bins - 1}")
    rows = torch.zeros(len(votes), num_bins, device=votes.device)
    return rows.scatter_add_(1, votes, torch.ones_like(votes, dtype=rows.dtype))
