"""Clipping of per-example values. It bounds the sensitivity of every sum, whatever the values are."""

import torch

from opacus_ext.outer_products import OuterProducts


def clip_rows(values: torch.Tensor, l2_bound: float) -> torch.Tensor:
    """(B, ...) -> (B, D) float32: each row scaled to an L2 norm of at most `l2_bound`.

    Guarantees:
    - Every returned row is finite and has an L2 norm of at most `l2_bound`, up to the rounding of float32.
    - A row depends on its own values only, so dropping or scaling it reveals nothing about other records.

    | row | result |
    |---|---|
    | norm at most `l2_bound`, the zero row included | unchanged |
    | norm above `l2_bound` | scaled to the bound |
    | huge finite entries | scaled to the bound: norms are float64 and do not overflow |
    | an entry that is nan or inf | zero |
    | no rows | (0, D) |
    """
    rows = (values.flatten(1) if values.dim() > 1 else values[:, None]).float()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    scale = (l2_bound / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    # In two steps, because the scale of a huge row is too small for float32.
    root = scale.sqrt().float()[:, None]
    return torch.where(torch.isfinite(norms)[:, None], rows * root * root, 0.0)


def clip_products(values: OuterProducts, l2_bound: float) -> OuterProducts:
    """`clip_rows` for values in factors, which stay in factors.

    The factors become float64, so that squares and products of float32 values neither overflow nor underflow.
    """
    exact = OuterProducts([(left.float().double(), right.float().double()) for left, right in values.blocks])
    norms = exact.norms()
    scale = (l2_bound / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    finite = torch.isfinite(norms)[:, None]
    blocks = exact.scaled(scale).blocks
    return OuterProducts(
        [(torch.where(finite, left, 0.0), torch.where(finite, right, 0.0)) for left, right in blocks]
    )


def sum_clipped_rows(
    values: torch.Tensor | OuterProducts, l2_bound: float, groups: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Sum of clipped rows by group: (num_groups, D) float64. `groups`: (B,) int64, the group of each row.

    Guarantees:
    - Each row contributes to one group, so one record changes the whole matrix by at most `l2_bound` in L2.

    | case | result |
    |---|---|
    | no rows | zeros |
    | number of rows differs from the number of groups entries | ValueError |
    """
    if isinstance(values, OuterProducts):
        for side in (side for block in values.blocks for side in block):
            if side.dim() != 2 or len(side) != len(groups):
                raise ValueError(f"a factor of shape {tuple(side.shape)} for {len(groups)} records")
        return clip_products(values, l2_bound).sums(groups, num_groups)
    rows = clip_rows(values, l2_bound)
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} values for {len(groups)} records")
    return torch.stack([rows[groups == group].sum(0, dtype=torch.float64) for group in range(num_groups)])


def vote_sum(
    votes: torch.Tensor, l2_bound: float, groups: torch.Tensor, num_groups: int, num_bins: int
) -> torch.Tensor:
    """Votes (B, k) int64 for bins, counted by group: (num_groups, num_bins) float64. No (B, num_bins) matrix is formed.

    Guarantees:
    - One record changes the counts by at most `l2_bound` in L2. Its counts are scaled down if their norm is larger,
      as it is for repeated votes (k distinct votes have the norm sqrt(k)).

    | case | result |
    |---|---|
    | number of rows differs from the number of groups entries | ValueError |
    | a vote outside 0..num_bins - 1 | IndexError, for every record alike |
    """
    if len(votes) != len(groups):
        raise ValueError(f"votes of {len(votes)} records for {len(groups)} records")
    if votes.numel() and (int(votes.min()) < 0 or int(votes.max()) >= num_bins):
        raise IndexError(f"a vote is outside of the bins 0..{num_bins - 1}")
    records = torch.arange(len(votes), device=votes.device)[:, None]
    cells, counts = (records * num_bins + votes).unique(return_counts=True)
    owners, counts = cells // num_bins, counts.double()
    norms = counts.new_zeros(len(votes)).index_add_(0, owners, counts**2).sqrt()
    weights = counts * (l2_bound / norms[owners]).clamp(max=1.0)
    totals = counts.new_zeros(num_groups * num_bins)
    return totals.index_add_(0, groups[owners] * num_bins + cells % num_bins, weights).view(
        num_groups, num_bins
    )
