"""Sanitised gradients of GS-WGAN (Chen, Orekondy and Fritz, NeurIPS 2020, arXiv:2006.08265).

There are many critics; each is trained on its own shard of the private records. In each step one critic, chosen at
random, states how a batch of generated images should change. Only this gradient leaves, with noise.

Sensitivity. A result holds the gradients of B images, each clipped to an L2 norm of C. All of them come from one
critic, and one record may change that critic arbitrarily, so two results differ by at most 2 C sqrt(B) in L2. The
noise standard deviation on every coordinate is noise_multiplier times that. (The published code scales it for one
image, too little by a factor of sqrt(B).) The amplification by choosing one of N shards is bounded in
shard_accounting.py. It requires that the critics do not depend on earlier choices. The published code trains a critic
when it is chosen, so the critic remembers. Here all critics are trained on a fixed schedule, and what a chosen critic
learns while it computes a result is discarded afterwards.

The critics see private records without noise. They exist in memory only: no checkpoint holds them, and a resumed run
assigns the records to shards again and trains new critics. This costs no privacy: given the earlier results, a step
requires only a secret choice and an assignment that does not depend on the records.
"""

from typing import Protocol

import torch

from opacus_ext.accounting import CHOSEN_SHARD, Release
from opacus_ext.errors import UnplannedRelease
from opacus_ext.mechanisms import clip_rows
from opacus_ext.private_data import PrivateData, records_of
from utils import distributed
from utils.draws import Draws
from utils.sections import check


def sanitised_release(name: str, num_shards: int, num_steps: int) -> Release:
    """The plan of `num_steps` results, each from one of `num_shards` critics."""
    check(num_shards > 0, "model.num_discriminators", num_shards, "at least 1")
    return Release(name, None, 1.0 / num_shards, num_steps, mechanism=CHOSEN_SHARD)


class Shards:
    """The private records in disjoint, secret, random shards. A record is only in the batches of its own shard."""

    def __init__(self, private: PrivateData, name: str, count: int) -> None:
        self.count = count
        self._records, self._name = records_of(private), name
        shard = torch.from_numpy(self._records.noise.shards(self._records.num_records, count, name))
        self._order = torch.argsort(shard, stable=True)  # the records of shard 0, of shard 1, ..
        self._sizes = torch.bincount(shard, minlength=count)
        self._starts = self._sizes.cumsum(0) - self._sizes

    def draws(self, part: range, stream: str) -> Draws:
        """Secret randomness for the shards of `part`, addressed by shard."""
        draws = self._records.loss_draws(f"{self._name}/{stream}", 0, self.count)
        return draws[part.start : part.stop]

    def batch(
        self, part: range, batch_size: int, rng: Draws
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Records of each of the S shards of `part`, drawn with replacement.

        Returns images (S, B, C, H, W) in [-1, 1], labels (S, B), and (S,) whether the shard has records. The batch of
        an empty shard is arbitrary.
        """
        sizes, starts = (values[part.start : part.stop, None] for values in (self._sizes, self._starts))
        places = (rng.uniform(batch_size).cpu() * sizes).long().minimum(sizes - 1).clamp_min(0)
        rows = self._order[(starts + places).clamp(max=max(0, len(self._order) - 1))]
        images, labels = self._records.take(rows.flatten())
        filled = (sizes[:, 0] > 0).to(labels.device)
        return images.unflatten(0, rows.shape), labels.view(rows.shape), filled


class Critics(Protocol):
    """One critic per shard.

    A critic may depend on its own shard, on the `images` of earlier steps and on `Shards.draws`; never on another
    shard, and never on which shards were chosen.
    """

    def warm_up(self, shards: Shards, part: range) -> None:
        """Train the critics of `part`, which this process holds, before the first step."""

    def keep_up(self, shards: Shards, part: range, step: int) -> None:
        """Train all critics of `part` before step `step`."""

    def image_gradient(
        self, shards: Shards, shard: int, step: int, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, H, W): the gradient of the generator's loss by its images, from one critic, which must not change."""


class SanitisedGradients:
    """The only way in which results of critics leave.

    Guarantees:
    - A step is booked before a critic is trained or queried for it.
    - Two results of any critics differ by at most 2 * max_grad_norm * sqrt(B) in L2, whatever the critics return.
    - The noise standard deviation is noise_multiplier times that, on every coordinate.
    - The choice of the shard is secret, uniform and independent of all other steps.

    Assumes: the critics keep the promise of `Critics`.

    | case | result |
    |---|---|
    | gradient of an image is not finite | counts as zero |
    | the release is planned for another number of shards or another mechanism | UnplannedRelease |
    """

    def __init__(
        self, name: str, private: PrivateData, critics: Critics, num_shards: int, max_grad_norm: float
    ) -> None:
        planned = private.ledger.planned(name)
        if (planned.mechanism, planned.sample_rate) != (CHOSEN_SHARD, 1.0 / num_shards):
            raise UnplannedRelease(
                f"'{name}' is planned as {planned.mechanism} at rate {planned.sample_rate}, not as one of {num_shards} "
                f"shards"
            )
        self._name, self._private, self._critics = name, private, critics
        self._records = records_of(private)
        self._num_shards, self._max_grad_norm = num_shards, max_grad_norm
        self._own = range(num_shards)[distributed.share(num_shards)]
        self._shards: Shards | None = None

    def answer(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Noisy gradients (B, C, H, W) of generated, public `images` (B, C, H, W); takes one planned step."""
        release = self._private.ledger.book(self._name)
        step = self._private.ledger.executed(self._name) - 1
        if self._shards is None:
            self._shards = Shards(self._private, self._name, self._num_shards)
            self._critics.warm_up(self._shards, self._own)
        self._critics.keep_up(self._shards, self._own, step)
        shard = self._records.noise.choice(self._num_shards, self._name, step)
        part = torch.zeros(images.numel(), dtype=torch.float64, device=images.device)
        if shard in self._own:
            gradient = self._critics.image_gradient(self._shards, shard, step, images, labels)
            part = (
                clip_rows(gradient.detach().reshape(len(images), -1), self._max_grad_norm).double().flatten()
            )
        std = release.noise_multiplier * 2 * self._max_grad_norm * len(images) ** 0.5

        def add_noise(total: torch.Tensor) -> torch.Tensor:
            return self._records.gradient_noise(self._name, total.numel(), std, step).add_to(total)

        return distributed.sum_on_main(part, add_noise).view_as(images)
