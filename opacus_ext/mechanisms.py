"""Clipping of per-example values: what makes a sum's sensitivity a fact instead of a promise."""

import torch

from opacus_ext.outer_products import OuterProducts


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


def clip_products(values: OuterProducts, l2_bound: float) -> OuterProducts:
    """`clip_rows` for values in factors, which stay in factors: of float64, where the squares and products of what was
    float32 neither overflow nor vanish."""
    exact = OuterProducts([(left.float().double(), right.float().double()) for left, right in values.blocks])
    norms = exact.norms()
    scale = (l2_bound / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    finite = torch.isfinite(norms)[:, None]
    blocks = exact.scaled(scale).blocks
    return OuterProducts(
        [(torch.where(finite, left, 0.0), torch.where(finite, right, 0.0)) for left, right in blocks]
    )


def clipped_sum(
    values: torch.Tensor | OuterProducts, l2_bound: float, groups: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Sum of clipped rows by group: (num_groups, D) float64. Each row falls into one group, so the L2 sensitivity of
    the whole matrix to one record is `l2_bound`. An empty batch is a zero sum."""
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
    """Votes (B, k) int64 for bins counted by group: (num_groups, num_bins) float64; no row of all bins is formed.

    A record whose counts have a larger L2 norm than `l2_bound`, as those of repeated votes have beyond sqrt(k), is
    scaled down to it. Indices outside the bins raise, whoever cast them.
    """
    if len(votes) != len(groups):
        raise ValueError(f"votes of {len(votes)} records for {len(groups)} records")
    if votes.numel() and (int(votes.min()) < 0 or int(votes.max()) >= num_bins):
        raise IndexError(f"a vote names a bin outside 0..{num_bins - 1}")
    records = torch.arange(len(votes), device=votes.device)[:, None]
    cells, counts = (records * num_bins + votes).unique(return_counts=True)
    owners, counts = cells // num_bins, counts.double()
    norms = counts.new_zeros(len(votes)).index_add_(0, owners, counts**2).sqrt()
    weights = counts * (l2_bound / norms[owners]).clamp(max=1.0)
    totals = counts.new_zeros(num_groups * num_bins)
    return totals.index_add_(0, groups[owners] * num_bins + cells % num_bins, weights).view(
        num_groups, num_bins
    )
