"""The critics of GS-WGAN: one for each shard of the private records, trained as one program (opacus_ext/sanitize.py).

Legend: S critics, B images each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.nn.sn_gan import ResNetGenerator
from models.nn.stack import Stack
from opacus_ext.sanitize import Shards
from utils.draws import Draws
from utils.progress import progress
from utils.sections import check_least, check_positive

BETAS = (0.5, 0.9)  # of Adam, for generators and critics


@dataclass(frozen=True)
class CriticLoss:
    L_gp: float  # weight of the gradient penalty (Gulrajani et al. 2017)
    L_epsilon: float  # weight of the squared score of real images
    lr: float

    def __post_init__(self) -> None:
        check_least(self, 0, "L_gp", "L_epsilon")
        check_positive(self, "lr")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=BETAS)

    def __call__(
        self,
        critics: Stack,
        real: torch.Tensor,
        fake: torch.Tensor,
        labels: torch.Tensor,
        filled: torch.Tensor,
        rng: Draws,
    ) -> torch.Tensor:
        """Sum over the critics of the Wasserstein loss with gradient penalty. real, fake (S, B, C, H, W) in [0, 1],
        labels (S, B) of both; critics that are not `filled` (S,) have no real image and learn nothing."""
        scores, fake_scores = critics(real, labels), critics(fake, labels)
        mix = rng.uniform(real.shape[1], 1, 1, 1)
        between = (real + mix * (fake - real)).requires_grad_()
        slope = torch.autograd.grad(critics(between, labels).sum(), between, create_graph=True)[0]
        penalty = (slope.flatten(2).norm(dim=2) - 1).square()
        losses = fake_scores - scores + self.L_gp * penalty + self.L_epsilon * scores.square()
        return (losses.mean(1) * filled).sum()


@dataclass(frozen=True)
class WarmUpConfig:
    """Of each critic, against a generator of its own that is thrown away."""

    iterations: int  # of critic_iters critic steps and one generator step
    critic_iters: int
    batch_size: int
    at_once: int  # critics trained together: bounds the memory

    def __post_init__(self) -> None:
        check_least(self, 0, "iterations")
        check_least(self, 1, "critic_iters", "batch_size", "at_once")


@dataclass(frozen=True)
class CriticSchedule:
    """What the critics learn once they are warm."""

    batch_size: int
    critic_iters: int  # steps that the chosen critic takes for its result, and forgets
    refresh_iters: int  # steps that all critics take, and keep, ..
    refresh_every: int  # .. before every result whose number this divides


class ShardCritics:
    """`count` critics, all starting as `critic`. The generator is the one that is trained on their results; it is only
    read. `latent(Draws, B)` gives noise (S, B, Z)."""

    def __init__(
        self,
        critic: nn.Module,
        generator: ResNetGenerator,
        new_generator: Callable[[], ResNetGenerator],
        latent: Callable[[Draws, int], torch.Tensor],
        count: int,
        loss: CriticLoss,
        warm_up: WarmUpConfig,
        schedule: CriticSchedule,
    ) -> None:
        self._generator, self._new_generator, self._latent = generator, new_generator, latent
        self._loss, self._warm_up, self._schedule = loss, warm_up, schedule
        self._critics = Stack.copies(critic.train(), count)

    def warm_up(self, shards: Shards, part: range) -> None:
        config = self._warm_up
        groups = [part[start : start + config.at_once] for start in range(0, len(part), config.at_once)]
        turns = [(group, turn) for group in groups for turn in range(config.iterations)]
        for group, turn in progress(turns, "critics' warm-up"):
            if turn == 0:
                critics = self._critics.part(group.start, group.stop)
                generators = Stack.copies(self._new_generator().train(), len(group))
                optimizers = [self._loss.optimizer(stack.parameters()) for stack in (critics, generators)]
            self._warm_up_turn(shards, group, critics, generators, optimizers, turn)
            if turn == config.iterations - 1:
                self._critics.put(group.start, critics)

    def _warm_up_turn(
        self,
        shards: Shards,
        group: range,
        critics: Stack,
        generators: Stack,
        optimizers: list[torch.optim.Optimizer],
        turn: int,
    ) -> None:
        config = self._warm_up

        def fakes(labels: torch.Tensor, rng: Draws) -> torch.Tensor:
            return generators(self._latent(rng, labels.shape[1]), labels)

        stream = f"warm-up {turn}"
        labels = self._train(
            critics, optimizers[0], shards, group, fakes, config.batch_size, config.critic_iters, stream
        )
        loss = -critics(fakes(labels, shards.draws(group, f"{stream} generator")), labels).mean(1).sum()
        optimizers[1].zero_grad(set_to_none=True)
        loss.backward(inputs=generators.parameters())
        optimizers[1].step()

    def keep_up(self, shards: Shards, part: range, step: int) -> None:
        """All critics alike, on a schedule that looks at nothing: see opacus_ext/shard_accounting.py."""
        config, size = self._schedule, self._warm_up.at_once
        if step % config.refresh_every or not config.refresh_iters:
            return
        for start in range(part.start, part.stop, size):
            group = range(start, min(start + size, part.stop))
            critics = self._critics.part(group.start, group.stop)
            self._catch_up(critics, shards, group, config.refresh_iters, f"refresh {step}")
            self._critics.put(group.start, critics)

    def image_gradient(
        self, shards: Shards, shard: int, step: int, images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        group = range(shard, shard + 1)
        critic = self._critics.part(shard, shard + 1)
        self._catch_up(critic, shards, group, self._schedule.critic_iters, f"answer {step}")
        images = images.detach().requires_grad_()
        loss = -critic(images[None], labels[None]).sum()
        return torch.autograd.grad(loss, images)[0]

    def _catch_up(self, critics: Stack, shards: Shards, group: range, iterations: int, stream: str) -> None:
        """Train critics against the generator as it is now."""

        def fakes(labels: torch.Tensor, rng: Draws) -> torch.Tensor:
            noise = self._latent(rng, labels.shape[1])
            with torch.no_grad():
                images = self._generator.eval()(noise.flatten(0, 1), labels.flatten())
            return images.unflatten(0, labels.shape)

        optimizer = self._loss.optimizer(critics.parameters())
        self._train(critics, optimizer, shards, group, fakes, self._schedule.batch_size, iterations, stream)

    def _train(
        self,
        critics: Stack,
        optimizer: torch.optim.Optimizer,
        shards: Shards,
        group: range,
        fakes: Callable[[torch.Tensor, Draws], torch.Tensor],
        batch_size: int,
        iterations: int,
        stream: str,
    ) -> torch.Tensor:
        """Critic steps on the shards' own records, whose labels the fakes have too; returns the last labels."""
        labels = None
        for turn in range(iterations):
            rng = shards.draws(group, f"{stream} {turn}")
            images, labels, filled = shards.batch(group, batch_size, rng)
            with torch.no_grad():
                fake = fakes(labels, rng)
            optimizer.zero_grad(set_to_none=True)
            self._loss(critics, (images + 1) / 2, fake, labels, filled, rng).backward()
            optimizer.step()
        return labels
