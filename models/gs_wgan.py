"""GS-WGAN: a generator trained by the sanitised gradients of many critics (Chen, Orekondy and Fritz, NeurIPS 2020,
arXiv:2006.08265). The critics see private records without noise; opacus_ext/sanitize.py adds noise to
their gradients. It states the mechanism, why it is private, and its differences from the published code."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.spec import DataSpec, PublicData
from models.fitting.gan import GAN
from models.fitting.stages import restore_moments
from models.nn.layers import num_parameters
from models.nn.shard_critics import BETAS, CriticLoss, CriticSchedule, ShardCritics, WarmUpConfig
from models.nn.sn_gan import ConvCritic, ResNetGenerator
from models.nn.stack import Stack
from models.public.batches import randomly_flipped
from models.public.pretraining import PublicLabels
from models.synthesizer import Sections, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from opacus_ext.sanitize import SanitisedGradients, sanitised_release
from utils.draws import Draws
from utils.images import to_float
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field, check_least, check_positive
from utils.seeding import numpy_rng
from utils.timing import Cost, sampling_cost, seconds_of

SANITISED = "sanitised gradients"


@dataclass(frozen=True)
class GeneratorConfig:
    z_dim: int
    g_conv_dim: int  # every block is 4 times as wide

    def __post_init__(self) -> None:
        check_least(self, 1, "z_dim", "g_conv_dim")


@dataclass(frozen=True)
class DiscriminatorConfig:
    d_conv_dim: int  # the convolutions are 1, 2 and 4 times as wide

    def __post_init__(self) -> None:
        check_least(self, 1, "d_conv_dim")


@dataclass(frozen=True)
class ModelConfig:
    Generator: GeneratorConfig
    Discriminator: DiscriminatorConfig
    num_discriminators: int  # shards of the private records, with a critic each
    latent_type: str  # bernoulli or normal
    ema_rate: float

    def __post_init__(self) -> None:
        known = self.latent_type in ("bernoulli", "normal")
        check_field(known, "latent_type", self.latent_type, "bernoulli or normal")
        check_field(0 <= self.ema_rate < 1, "ema_rate", self.ema_rate, "in [0, 1)")
        count = self.num_discriminators
        check_field(count > 0, "num_discriminators", count, "at least 1")


@dataclass(frozen=True)
class Stage(CriticLoss):
    """What public pretraining and private training have in common."""

    iterations: int  # generator steps
    critic_iters: int  # critic steps for each; in private training the chosen critic's, which it forgets
    batch_size: int  # of critics and of the generator
    snapshot_freq: int
    g_lr: float  # of the generator; lr is that of the critics

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "g_lr")
        check_least(self, 1, "critic_iters", "batch_size", "snapshot_freq")
        check_least(self, 0, "iterations")


@dataclass(frozen=True)
class PretrainConfig(Stage, PublicLabels):
    """Public training, and the use of public labels."""


@dataclass(frozen=True)
class TrainConfig(Stage):
    max_grad_norm: float  # of the gradient for one generated image
    refresh_iters: int  # steps that all critics take, and keep, ..
    refresh_every: int  # .. once in so many generator steps
    pretrain: WarmUpConfig  # of the critics, on the private records

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "max_grad_norm")
        check_least(self, 0, "refresh_iters")
        check_least(self, 1, "refresh_every")


class GSWGAN(GAN):
    @dataclass(frozen=True)
    class Config(Sections):
        model: ModelConfig
        pretrain: PretrainConfig
        train: TrainConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime, pretrains=config.pretrain.iterations > 0)
        self.num_labels = self.pretraining.num_labels
        self.generator = self._new_generator("generator")
        with runtime.seeded("critic"):
            width = config.model.Discriminator.d_conv_dim
            critic = ConvCritic(spec.resolution, spec.channels, self.num_labels, width)
        # What all critics start as. It has seen public images only.
        self.first_critic = critic.to(runtime.device)
        self._critic_moments: dict = {}  # of its optimiser in public pretraining
        self._start_stage("start")

    def _new_generator(self, stream: str) -> ResNetGenerator:
        model = self.config.model.Generator
        with self.runtime.seeded(stream):
            network = ResNetGenerator(
                self.spec.resolution, self.spec.channels, self.num_labels, model.z_dim, model.g_conv_dim
            )
        return network.to(self.runtime.device)

    def privacy_plan(self) -> list[Release]:
        shards, steps = self.config.model.num_discriminators, self.config.train.iterations
        return [*self.pretraining_plan(), sanitised_release(SANITISED, shards, steps)]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        """Generator and critic on public images, without noise: an ordinary Wasserstein GAN."""
        if self.stage == "train":
            return
        public = self.pretraining.obtain(public, private)
        config = self.config.pretrain
        if public is None or not config.iterations:
            return
        self._enter_stage("pretrain")
        critic = Stack.copies(self.first_critic.train(), 1)
        optimizer = config.optimizer(critic.parameters())
        restore_moments(optimizer, self._critic_moments)
        steps = progress(range(self.step, config.iterations), "pretrain", config.iterations, self.step)
        for step in steps:
            for turn in range(config.critic_iters):
                batch = self._public_batch(public, f"pretrain {step} {turn}")
                optimizer.zero_grad(set_to_none=True)
                self._public_loss(critic, *batch, self.runtime.draws(f"pretrain {step} {turn}", 1)).backward()
                optimizer.step()
            images, labels = self._fakes(config.batch_size, public.num_classes if config.cond else 1)
            loss = -critic(images[None], labels[None]).mean()
            gradient = torch.autograd.grad(loss, images)[0]
            self._generator_step(images, gradient)
            self.first_critic.load_state_dict(next(iter(critic)))
            self._critic_moments = optimizer.state_dict()["state"]
            self._finish_step(config.snapshot_freq)
        self._critic_moments = {}

    def _public_batch(self, public: PublicData, stream: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (1, B, C, H, W) in [0, 1] and labels (1, B)."""
        config = self.config.pretrain
        chosen = numpy_rng(self.runtime.seed, stream).integers(len(public), size=config.batch_size)
        batch = public.samples.take(np.sort(chosen))
        rng = self.runtime.draws(f"{stream} changes", len(batch))
        images = (to_float(self.pretraining.augmented(batch.images, rng), self.runtime.device) + 1) / 2
        if self.pretraining.flip:
            images = randomly_flipped(images, rng)
        labels = torch.from_numpy(batch.labels * config.cond).to(self.runtime.device)
        return images[None], labels[None]

    def _public_loss(
        self, critic: Stack, images: torch.Tensor, labels: torch.Tensor, rng: Draws
    ) -> torch.Tensor:
        with torch.no_grad():
            noise = self._latent(rng, images.shape[1])[0]
            fakes = self.generator.eval()(noise, labels[0])[None]
        return self.config.pretrain(critic, images, fakes, labels, torch.ones(1, device=images.device), rng)

    def train(self, private: PrivateData) -> None:
        config, count = self.config.train, self.config.model.num_discriminators
        self._enter_stage("train")
        schedule = CriticSchedule(
            config.batch_size, config.critic_iters, config.refresh_iters, config.refresh_every
        )
        # Held here and nowhere else: the critics are private, and end with this call.
        critics = ShardCritics(
            self.first_critic, self.generator, lambda: self._new_generator("warm-up generator"), self._latent, count,
            config, config.pretrain, schedule,
        )  # fmt: skip
        sanitised = SanitisedGradients(SANITISED, private, critics, count, config.max_grad_norm)
        planned = private.ledger.planned(SANITISED).num_steps
        done = private.ledger.executed(SANITISED)
        for _ in progress(range(done, planned), "train", total=planned, initial=done):
            images, labels = self._fakes(config.batch_size, self.spec.num_classes)
            self._generator_step(images, sanitised.answer(images.detach(), labels) / config.batch_size)
            self._finish_step(config.snapshot_freq)

    def _fakes(self, count: int, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) in [0, 1], with their graph, of uniform labels (B,). Public randomness."""
        rng = self.runtime.draws(f"{self.stage} fakes {self.step}", 1)
        labels = (rng.uniform(count)[0] * num_labels).long().clamp(max=num_labels - 1)
        return self.generator.train()(self._latent(rng, count)[0], labels), labels

    def _latent(self, rng: Draws, count: int) -> torch.Tensor:
        """(len(rng), count, z_dim)."""
        z_dim = self.config.model.Generator.z_dim
        if self.config.model.latent_type == "normal":
            return rng.normal(count, z_dim)
        return (rng.uniform(count, z_dim) < 0.5).float()

    def _generator_step(self, images: torch.Tensor, gradient: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        images.backward(gradient)
        self.optimizer.step()
        self.ema.update(self.generator)

    def _draw(self, generator: nn.Module, labels: torch.Tensor, stream: str) -> torch.Tensor:
        noise = self._latent(self.runtime.draws(stream, 1), len(labels))[0]
        return generator(noise, labels) * 2 - 1

    # Stages

    def _networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "first_critic": self.first_critic}

    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        section = self.config.pretrain if stage == "pretrain" else self.config.train
        return {"optimizer": torch.optim.Adam(self.generator.parameters(), lr=section.g_lr, betas=BETAS)}

    def state_dict(self) -> dict:
        """Everything except the critics, which are private: a resumed run trains new ones."""
        return {**super().state_dict(), "critic_moments": self._critic_moments}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._critic_moments = state["critic_moments"]

    # --dry_run

    def parameter_counts(self) -> dict[str, int]:
        return {
            "generator": num_parameters(self.generator),
            "each critic": num_parameters(self.first_critic),
        }

    def settings_without_effect(self) -> dict[str, str]:
        # Critics are warmed up on shards of the private images, without a public set too.
        return {key: why for key, why in super().settings_without_effect().items() if key != "pretrain"}

    def public_costs(self, num_images: int) -> list[Cost]:
        query, _ = self.pretraining.costs(num_images)
        return [*query, *self._pretraining_cost()]

    def _pretraining_cost(self) -> list[Cost]:
        config = self.config.pretrain
        if not config.iterations:
            return []
        critic, generator = self._seconds_per_step(config)
        text = f"{config.iterations} x {config.critic_iters} critic steps x {config.batch_size} images"
        return [
            Cost(
                "pretrain",
                text,
                config.iterations * (config.critic_iters * critic + generator),
                config.iterations,
            )
        ]

    def costs(self) -> list[Cost]:
        config, count = self.config.train, self.config.model.num_discriminators
        warm_up = config.pretrain
        steps = count * warm_up.iterations * warm_up.critic_iters
        refreshes = -(-config.iterations // config.refresh_every) * count * config.refresh_iters
        critic, generator = self._seconds_per_step(config)
        alone = critic * warm_up.batch_size / config.batch_size
        learnt = config.iterations * config.critic_iters + refreshes
        labels = balanced_labels(16, self.spec.num_classes)
        return [
            *(self._pretraining_cost() if self.pretraining.central is not None else []),
            Cost(
                "critics' warm-up",
                f"{count} critics x {steps // count} steps x {warm_up.batch_size} images",
                steps * alone,
                part="train",  # also of a resumed run, which trains new critics
            ),
            Cost(
                "train",
                f"{config.iterations} answers, {learnt} critic steps x {config.batch_size} images",
                learnt * critic + config.iterations * generator,
                config.iterations,
            ),
            sampling_cost(self.config.gen.data_num, 16, lambda: self._sample(labels, "cost")),
        ]

    def _seconds_per_step(self, config: Stage) -> tuple[float, float]:
        """Of one critic's step, fakes included, and of one generator step; one after the other."""
        critic, device = Stack.copies(copy.deepcopy(self.first_critic), 1), self.runtime.device
        generator, size = copy.deepcopy(self.generator), config.batch_size
        labels = torch.zeros(1, size, dtype=torch.int64, device=device)
        rng = self.runtime.draws("cost", 1)

        def fakes() -> torch.Tensor:
            return generator(self._latent(rng, size)[0], labels[0])

        def learn() -> None:
            with torch.no_grad():
                images = fakes()[None]
            config(critic, images, images, labels, torch.ones(1, device=device), rng).backward()

        return seconds_of(learn), seconds_of(lambda: fakes().sum().backward())
