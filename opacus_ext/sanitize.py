"""Sanitised gradients of GS-WGAN (Chen, Orekondy and Fritz, NeurIPS 2020, arXiv:2006.08265).

Many critics, each trained on a shard of the private records of its own. In each step a critic chosen at random says how
a batch of generated images should change; that answer alone leaves, with noise.

Sensitivity. An answer holds the gradients of B images, each clipped to an L2 norm of C. All of them come from one
critic, and a record may change that critic at will, so two answers lie up to 2 C sqrt(B) apart: that times the noise
multiplier is the noise's standard deviation on every coordinate. (The published code scales it for one image, and is
off by sqrt(B).) What the choice among N shards saves is in shard_accounting.py, and what it asks of the critics: what
they are must not depend on who was chosen. The published code trains a critic whenever it is chosen, and so remembers;
here all critics are trained on a fixed schedule, and what a chosen one learns for its answer is forgotten after it.

The critics themselves are private without limit. They live in memory only: no checkpoint holds them, and a resumed run
deals the records anew and trains new ones. That costs no privacy: given the earlier answers, a step needs no more than
a secret choice and a dealing that looks at nothing.
"""

from typing import Protocol

import torch

from opacus_ext.accounting import CHOSEN_SHARD, Release
from opacus_ext.errors import UnplannedRelease
from opacus_ext.mechanisms import clip_rows
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.draws import Draws
from utils.sections import check


def sanitised_release(name: str, num_shards: int, num_steps: int) -> Release:
    """The plan of `num_steps` answers, each by one of `num_shards` critics."""
    check(num_shards > 0, "model.num_discriminators", num_shards, "at least 1")
    return Release(name, None, 1.0 / num_shards, num_steps, mechanism=CHOSEN_SHARD)


class Shards:
    """The private records, dealt to disjoint shards by secret coins. A record is in the batches of its shard alone."""

    def __init__(self, private: PrivateData, name: str, count: int) -> None:
        self.count = count
        self._private, self._name = private, name
        dealt = torch.from_numpy(private._noise.shards(len(private._labels), count, name))
        self._order = torch.argsort(dealt, stable=True)  # the records of shard 0, of shard 1, ..
        self._sizes = torch.bincount(dealt, minlength=count)
        self._starts = self._sizes.cumsum(0) - self._sizes

    def draws(self, part: range, stream: str) -> Draws:
        """Secret randomness for the shards of `part`, addressed by shard."""
        return self._private._noise.loss_draws(f"{self._name}/{stream}", 0, self.count, self._private.device)[
            part.start : part.stop
        ]

    def batch(
        self, part: range, batch_size: int, rng: Draws
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Records of each shard of `part` (S of them), drawn with replacement: images (S, B, C, H, W) in [-1, 1],
        labels (S, B), and whether the shard has records (S,); the batch of an empty shard means nothing."""
        sizes, starts = (values[part.start : part.stop, None] for values in (self._sizes, self._starts))
        places = (rng.uniform(batch_size).cpu() * sizes).long().minimum(sizes - 1).clamp_min(0)
        rows = self._order[(starts + places).clamp(max=max(0, len(self._order) - 1))]
        images, labels = self._private._take(rows.flatten())
        filled = (sizes[:, 0] > 0).to(labels.device)
        return images.unflatten(0, rows.shape), labels.view(rows.shape), filled


class Critics(Protocol):
    """One critic per shard. What a critic is may depend on its own shard, on `images` that were answered before and on
    `Shards.draws`; never on another shard, and never on which shards were chosen."""

    def warm_up(self, shards: Shards, part: range) -> None:
        """Train the critics of `part`, which this process holds, before the first answer."""

    def keep_up(self, shards: Shards, part: range, step: int) -> None:
        """What all of them learn before answer `step`."""

    def image_gradient(
        self, shards: Shards, shard: int, step: int, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, H, W): how the loss of the generator changes with its images, by one critic, which stays as it is."""


class SanitisedGradients:
    """The one door through which critics answer."""

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
        self._num_shards, self._max_grad_norm = num_shards, max_grad_norm
        self._own = range(num_shards)[distributed.share(num_shards)]
        self._shards: Shards | None = None

    def answer(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Gradients of generated, public `images` (B, C, H, W), each clipped to `max_grad_norm`, plus noise; one step.

        Noise std is noise_multiplier * 2 * max_grad_norm * sqrt(B) on every coordinate. An image whose gradient is not
        finite counts as zero.
        """
        release = self._private.ledger.book(self._name)
        step = self._private.ledger.executed(self._name) - 1
        if self._shards is None:
            self._shards = Shards(self._private, self._name, self._num_shards)
            self._critics.warm_up(self._shards, self._own)
        self._critics.keep_up(self._shards, self._own, step)
        shard = self._private._noise.choice(self._num_shards, self._name, step)
        part = torch.zeros(images.numel(), dtype=torch.float64, device=images.device)
        if shard in self._own:
            gradient = self._critics.image_gradient(self._shards, shard, step, images, labels)
            part = (
                clip_rows(gradient.detach().reshape(len(images), -1), self._max_grad_norm).double().flatten()
            )
        std = release.noise_multiplier * 2 * self._max_grad_norm * len(images) ** 0.5

        def add_noise(total: torch.Tensor) -> torch.Tensor:
            return self._private._gradient_noise(self._name, total.numel(), std, step).add_to(total)

        return distributed.sum_on_main(part, add_noise).view_as(images)
