"""Per-example vectors as outer products. They are so long that only sums over examples are ever formed."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OuterProducts:
    """(B, D) values. The vector of example n joins left[n] right[n]^T, flattened, of all blocks in order.

    blocks: pairs of left (B, a) and right (B, b) rows; D is the sum of all a * b.
    """

    blocks: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_features(self) -> int:
        """D."""
        return sum(left.shape[1] * right.shape[1] for left, right in self.blocks)

    def norms(self) -> torch.Tensor:
        """(B,): the L2 norm of every example's vector."""
        squares = [left.square().sum(1) * right.square().sum(1) for left, right in self.blocks]
        return torch.stack(squares).sum(0).sqrt()

    def scaled(self, scale: torch.Tensor) -> "OuterProducts":
        """Every example's vector times its own scale (B,)."""
        return OuterProducts([(left * scale[:, None], right) for left, right in self.blocks])

    def sums(self, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
        """(num_groups, D): the sum of the vectors of each group. `groups`: (B,) int64, the group of each example."""
        order, counts = groups.argsort(), groups.bincount(minlength=num_groups).tolist()

        def by_group(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return rows[order].split(counts)

        sums = [
            torch.stack([a.T @ b for a, b in zip(by_group(left), by_group(right), strict=True)])
            for left, right in self.blocks
        ]
        return torch.cat([block.flatten(1) for block in sums], dim=1)
