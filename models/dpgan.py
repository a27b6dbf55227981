"""DPGAN: a GAN whose discriminator is trained with DP-SGD (Xie et al. 2018, arXiv:1802.06739; networks and schedule of
the published benchmark, with several discriminator steps per generator step as in Bie et al. 2023, arXiv:2302.02936).

A record's loss is that of its own image and of one fake of its own, so real and fake gradient are clipped as one. The
generator learns from the discriminator alone: post-processing.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data.spec import DataSpec, PublicData, Samples
from models.fitting.gan import GAN
from models.nn.discriminator import Discriminator
from models.nn.generator import Generator, GeneratorConfig
from models.nn.layers import num_parameters
from models.public.batches import public_batches, randomly_flipped, steps_of
from models.public.pretraining import PublicLabels
from models.synthesizer import Sections, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import DPSGDConfig, dpsgd_release, dpsgd_steps
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.draws import Draws
from utils.images import to_float
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field, check_least, check_positive
from utils.timing import Cost, sampling_cost, seconds_of
from utils.typed import Number

DP_SGD = "dp-sgd"


@dataclass(frozen=True)
class DiscriminatorConfig:
    d_conv_dim: int  # every block is twice as wide

    def __post_init__(self) -> None:
        width = 2 * self.d_conv_dim
        fits = width > 0 and width % min(32, width) == 0
        check_field(fits, "d_conv_dim", self.d_conv_dim, "a positive number of which 2x fits into 32 groups")


@dataclass(frozen=True)
class ModelConfig:
    Generator: GeneratorConfig
    Discriminator: DiscriminatorConfig
    ema_rate: float

    def __post_init__(self) -> None:
        check_field(0 <= self.ema_rate < 1, "ema_rate", self.ema_rate, "in [0, 1)")


@dataclass(frozen=True)
class OptimParams:
    d_lr: float
    g_lr: float
    beta1: float

    def __post_init__(self) -> None:
        check_positive(self, "d_lr", "g_lr")
        check_field(0 <= self.beta1 < 1, "beta1", self.beta1, "in [0, 1)")


@dataclass(frozen=True)
class OptimConfig:
    optimizer: str  # Adam
    params: OptimParams

    def __post_init__(self) -> None:
        check_field(self.optimizer == "Adam", "optimizer", self.optimizer, "Adam")


@dataclass(frozen=True)
class GANStage:
    """What public pretraining and private training have in common."""

    n_epochs: int
    d_updates: int  # discriminator steps per generator step
    g_batch_size: int  # images per generator step
    g_part_size: int  # of them at a time, for memory; BatchNorm sees those together
    snapshot_freq: int  # discriminator steps
    optim: OptimConfig

    def __post_init__(self) -> None:
        check_least(self, 1, "d_updates", "g_batch_size", "g_part_size", "snapshot_freq")
        check_least(self, 0, "n_epochs")


@dataclass(frozen=True)
class PretrainConfig(GANStage, PublicLabels):
    batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "batch_size")


@dataclass(frozen=True)
class TrainConfig(GANStage):
    n_epochs: Number  # passes over the private images; a fraction ends within a pass
    batch_size: int | None  # nominal: q = 1 / ceil(N / batch_size); None: all N in every step
    dp: DPSGDConfig


class DPGAN(GAN):
    @dataclass(frozen=True)
    class Config(Sections):
        model: ModelConfig
        pretrain: PretrainConfig
        train: TrainConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime, pretrains=config.pretrain.n_epochs > 0)
        num_labels = self.pretraining.num_labels
        with runtime.seeded("generator"):
            generator = Generator(config.model.Generator, spec.resolution, spec.channels, num_labels)
        with runtime.seeded("discriminator"):
            width = config.model.Discriminator.d_conv_dim
            discriminator = Discriminator(spec.resolution, spec.channels, num_labels, width)
        self.generator, self.discriminator = runtime.place(generator), runtime.place(discriminator)
        self._start_stage("start")

    def privacy_plan(self) -> list[Release]:
        train = self.config.train
        sizes = (self.spec.num_train, train.batch_size, train.n_epochs, train.dp.max_batch_size)
        return [*self.pretraining_plan(), dpsgd_release(DP_SGD, *sizes)]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        """The same GAN on public images, without noise."""
        if self.stage == "train":
            return
        public = self.pretraining.obtain(public, private)
        if public is None or not self.config.pretrain.n_epochs:
            return
        config = self.config.pretrain
        self._enter_stage("pretrain")
        num_labels = public.num_classes if config.cond else 1
        batches = public_batches(
            "pretrain", len(public), config.batch_size, config.n_epochs, self.runtime.seed, start=self.step
        )
        for _, positions in batches:
            batch = public.samples.take(positions)
            self._discriminate_publicly(batch, PairedLoss(self.generator, num_labels, self.runtime.autocast))
            self._end_discriminator_step(config, num_labels)

    def _discriminate_publicly(self, batch: Samples, loss: "PairedLoss") -> None:
        own = distributed.share(len(batch))
        draws = self.runtime.draws(f"pretrain fakes {self.step}", len(batch))
        self.optimizers["d_optimizer"].zero_grad(set_to_none=True)
        if own.start < own.stop:
            rng = draws[own]
            images = to_float(self.pretraining.augmented(batch.images[own], rng), self.runtime.device)
            if self.pretraining.flip:
                images = randomly_flipped(images, rng)
            labels = torch.from_numpy(batch.labels[own]).to(self.runtime.device) % loss.num_labels
            loss(self.discriminator, images, labels, rng).sum().div(len(batch)).backward()
        distributed.sum_gradients(self.discriminator.parameters())
        self.optimizers["d_optimizer"].step()

    def train(self, private: PrivateData) -> None:
        config = self.config.train
        self._enter_stage("train")
        loss = PairedLoss(self.generator, self.spec.num_classes, self.runtime.autocast)
        steps = dpsgd_steps(
            DP_SGD, private, self.discriminator, self.optimizers["d_optimizer"], loss, config.dp
        )
        planned = private.ledger.planned(DP_SGD).num_steps
        for _ in progress(steps, "train (DP-SGD)", total=planned, initial=private.ledger.executed(DP_SGD)):
            self._end_discriminator_step(config, self.spec.num_classes)

    def _end_discriminator_step(self, config: GANStage, num_labels: int) -> None:
        if (self.step + 1) % config.d_updates == 0:
            self._generator_step(config, num_labels)
        self._finish_step(config.snapshot_freq)

    def _generator_step(self, config: GANStage, num_labels: int) -> None:
        """Hinge loss on fakes with uniform labels, in parts that the processes share."""
        stream = f"{self.stage} generator {self.step + 1}"
        draws = self.runtime.draws(stream, config.g_batch_size)
        parts = [
            draws[start : start + config.g_part_size]
            for start in range(0, config.g_batch_size, config.g_part_size)
        ]
        self.generator.train()
        self.optimizers["g_optimizer"].zero_grad(set_to_none=True)
        for part in parts[distributed.share(len(parts))]:
            with self.runtime.autocast():
                noise, labels = _inputs(self.generator, num_labels, part)
                scores = self.discriminator(self.generator(noise, labels), labels)
            (-scores.float().sum() / config.g_batch_size).backward(inputs=list(self.generator.parameters()))
        distributed.sum_gradients(self.generator.parameters())
        self.optimizers["g_optimizer"].step()
        distributed.copy_from_main(self.generator.buffers())
        self.ema.update(self.generator)

    def _draw(self, generator: nn.Module, labels: torch.Tensor, stream: str) -> torch.Tensor:
        rng = self.runtime.rng(stream)
        noise = torch.randn(len(labels), generator.z_dim, generator=rng, device=labels.device)
        with self.runtime.autocast():
            return generator(noise, labels)

    # Stages

    def _networks(self) -> dict[str, nn.Module]:
        """The discriminator is private through DP-SGD, the generator by post-processing."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        section = self.config.pretrain if stage == "pretrain" else self.config.train
        params = section.optim.params
        betas = (params.beta1, 0.999)
        return {
            "d_optimizer": torch.optim.Adam(self.discriminator.parameters(), lr=params.d_lr, betas=betas),
            "g_optimizer": torch.optim.Adam(self.generator.parameters(), lr=params.g_lr, betas=betas),
        }

    # --dry_run

    def parameter_counts(self) -> dict[str, int]:
        return {name: num_parameters(network) for name, network in self._networks().items()}

    def public_costs(self, num_images: int) -> list[Cost]:
        if not self.config.pretrain.n_epochs:
            return []
        query, left = self.pretraining.costs(num_images)
        return [*query, self._pretraining_cost(left)]

    def _pretraining_cost(self, num_images: int) -> Cost:
        config = self.config.pretrain
        return self._cost("pretrain", config, *steps_of(num_images, config.batch_size, config.n_epochs))

    def costs(self) -> list[Cost]:
        release, central = self.privacy_plan()[-1], self.pretraining.central
        images = round(self.spec.num_train * release.sample_rate)
        num_central = self.config.public_data.central.sample_num * self.spec.num_classes
        labels = balanced_labels(16, self.spec.num_classes)
        return [
            *([] if central is None else [self._pretraining_cost(num_central)]),
            self._cost("train", self.config.train, release.num_steps, images),
            sampling_cost(self.config.gen.data_num, 16, lambda: self._sample(labels, "cost")),
        ]

    def _cost(self, stage: str, config: GANStage, steps: int, images: int) -> Cost:
        fakes = steps // config.d_updates * config.g_batch_size
        text = f"{steps} steps x {images} images, {steps // config.d_updates} x {config.g_batch_size} fakes"
        return Cost(stage, text, (steps * images + fakes) * self._seconds_per_image(), steps)

    def _seconds_per_image(self) -> float:
        """Of one image and its fake in one step."""
        rows, device = 8, self.runtime.device
        loss = PairedLoss(copy.deepcopy(self.generator), self.spec.num_classes, self.runtime.autocast)
        inputs = (
            torch.zeros(rows, *self.spec.image_shape, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )
        discriminator = copy.deepcopy(self.discriminator)
        draws = self.runtime.draws("cost", rows)
        return seconds_of(lambda: loss(discriminator, *inputs, draws).sum().backward()) / rows


class PairedLoss:
    """(discriminator, images (B, C, H, W), labels (B,), rng) -> (B,): the hinge loss of each image and of one fake.

    Both pass through the discriminator as the two rows of one example, so that their gradients are one contribution.
    Labels of fakes are uniform; all that a fake is made of comes from `rng`, by position in the batch.
    """

    def __init__(
        self, generator: Generator, num_labels: int, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        self.generator = generator
        self.num_labels = num_labels
        self._autocast = autocast

    def __call__(
        self, discriminator: nn.Module, images: torch.Tensor, labels: torch.Tensor, rng: Draws
    ) -> torch.Tensor:
        self.generator.eval()  # no statistics across the fakes of a private batch
        with self._autocast():
            with torch.no_grad():
                noise, fake_labels = _inputs(self.generator, self.num_labels, rng)
                fakes = self.generator(noise, fake_labels).to(images.dtype)
            pairs = torch.stack([images, fakes], dim=1).flatten(0, 1)
            scores = discriminator(pairs, torch.stack([labels, fake_labels], dim=1).flatten())
        real, fake = scores.float().view(-1, 2).unbind(1)
        return F.relu(1 - real) + F.relu(1 + fake)


def _inputs(generator: Generator, num_labels: int, rng: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, z_dim) and uniform labels (B,) for the positions of `rng`."""
    noise = rng.normal(generator.z_dim)
    return noise, (rng.uniform() * num_labels).long().clamp(max=num_labels - 1)
