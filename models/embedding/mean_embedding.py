"""Generators fitted to a noisy mean embedding of labelled images (DP-MERF, Harder et al., AISTATS 2021).

The embedding of a set is the mean of phi(x) (x) onehot(y). The sum over all private records, each of bounded norm, is
one Gaussian release; dividing it by the public N and fitting a generator to it are post-processing. Its rows carry the
classes' shares of the records; a constant feature carries these shares, in the same release, and generated images are
weighted by them: classes of any size are fitted at their own scale.
Legend: B batch, C channels, H W pixels, D size of one phi(x), K labels.
"""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.spec import DataSpec, PublicData, Samples
from models.fitting.batches import in_batches
from models.fitting.stages import Staged
from models.nn.generator import Generator, GeneratorConfig
from models.nn.layers import num_parameters
from models.public.pretraining import Pretraining
from models.synthesizer import Sections, Synthesizer, balanced_labels, preview_labels
from opacus_ext.accounting import Release
from opacus_ext.outer_products import OuterProducts
from opacus_ext.private_data import PrivateData
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime, log
from utils.sections import check_least, check_positive
from utils.timing import Cost, batch_rows, sampling_cost, seconds_of
from utils.typed import Number

MEAN_EMBEDDING = "mean embedding"
FEW_STEPS = 200  # below which a generator has hardly begun to learn
MOST_SNAPSHOTS = 20  # of one stage
PER_CLASS = 4  # generated images of each class that a step compares, at least


class Embedding(abc.ABC):
    """A feature map phi of images, and how means of phi(x) (x) onehot(y) are taken with it: phi(x) may be too large to
    be written out for a batch. Every phi(x) is features of norm 1 and, last, a constant one of size `mass`, whose mean
    is the share of a class."""

    def __init__(self, mass: float) -> None:
        self.mass = mass

    @abc.abstractmethod
    def features(self, images: torch.Tensor) -> torch.Tensor | OuterProducts:
        """(B, C, H, W) in [-1, 1] -> B vectors of L2 norm sqrt(1 + mass^2), which the noise is scaled for."""

    def mean(self, images: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1], (B,) -> (num_labels, D): row k is the sum of phi(x) over label k, divided by B.
        Differentiable in the images. A phi(x) that is not written out needs another way."""
        features = self.features(images)
        total = torch.zeros(num_labels, features.shape[1], device=features.device)
        return total.index_add_(0, labels, features) / len(images)

    def noisy_mean(self, private: PrivateData) -> torch.Tensor:
        """(num_classes, D): the one planned release MEAN_EMBEDDING over all records, divided by the public N."""
        bound = math.hypot(1.0, self.mass)
        total = private.noisy_sum(MEAN_EMBEDDING, lambda x, _: self.features(x), bound, by_class=True)
        return total / private.spec.num_train

    def class_shares(self, mean: torch.Tensor) -> torch.Tensor:
        """(K, D) -> (K,): the shares of the classes in a mean, noisy or not; their sum is 1. A class counts at least a
        hundredth of an equal share: its noisy mass may be negative."""
        shares = (mean[:, -1] / self.mass).clamp(min=0.01 / len(mean))
        return shares / shares.sum()


@dataclass(frozen=True)
class Schedule:
    """Steps of Adam. After every `period` of them the learning rate is multiplied, and a snapshot is left unless these
    have a period of their own."""

    num_steps: int
    batch_size: int  # generated images per step
    lr: float
    lr_decay: float
    period: int
    num_parts: int = 1  # equal parts of a step, two in memory at a time; BatchNorm sees one at a time
    snapshot_period: int | None = None

    def learning_rate(self, step: int) -> float:
        return self.lr * self.lr_decay ** (step // self.period)


@dataclass(frozen=True)
class FitConfig:
    """Settings that every fit of a generator has. A method adds how it counts steps, in the keys of its publication."""

    batch_size: int  # generated images per step
    lr: float
    lr_decay: float  # factor per period of the schedule

    def __post_init__(self) -> None:
        check_least(self, 2, "batch_size")
        check_positive(self, "lr")


@dataclass(frozen=True)
class EpochFitConfig(FitConfig):
    epochs: Number  # of (number of images) // batch_size steps, with a decay after each; a fraction ends within one

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "epochs")

    def schedule(self, num_images: int) -> Schedule:
        period = max(1, num_images // self.batch_size)
        return Schedule(math.ceil(self.epochs * period), self.batch_size, self.lr, self.lr_decay, period)


class EmbeddingGenerator(Staged):
    """A generator of images (C, image_size, image_size) that is fitted to mean embeddings."""

    keeps_average = False

    def __init__(
        self,
        config: GeneratorConfig,
        embedding: Embedding,
        image_size: int,
        channels: int,
        num_labels: int,
        runtime: Runtime,
    ) -> None:
        self.runtime = runtime
        self.embedding = embedding
        self.image_shape = (channels, image_size, image_size)
        with runtime.seeded("generator"):
            self.generator = Generator(config, image_size, channels, num_labels)
        self.generator.to(runtime.device)
        self.num_shown = 1  # classes in a preview
        self._start_stage("start")

    def public_mean(self, public: PublicData, cond: bool, flip: bool) -> torch.Tensor:
        """(public classes, D), or with cond=False (1, D): labels of public images are ignored. `flip`: of all images
        and their mirror images."""
        num_labels = public.num_classes if cond else 1
        total = 0.0
        for start in progress(range(0, len(public), 1000), "public embedding", unit="batch"):
            part = public.samples.take(np.arange(start, min(start + 1000, len(public))))
            labels = torch.from_numpy(part.labels * cond).to(self.runtime.device)
            images = to_float(part.images, self.runtime.device)
            if flip:
                images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
            total = total + self.embedding.mean(images, labels, num_labels) * len(part)
        return total / len(public)

    def cost(self, stage: str, schedule: Schedule, num_images: int) -> Cost:
        """Of the mean embedding of `num_images` images, and of fitting the generator to it."""
        text = f"embedding of {num_images} images, {schedule.num_steps} steps x {schedule.batch_size} images"
        seconds = num_images * self.seconds_per_embedded_image()
        seconds += schedule.num_steps * schedule.batch_size * self.seconds_per_image()
        return Cost(stage, text, seconds, schedule.num_steps)

    def fit(
        self, stage: str, target: torch.Tensor, schedule: Schedule, snapshot_freq: int | None = None
    ) -> None:
        """Bring the mean embedding of generated images to `target` (K, D); continues from a restored state."""
        self.num_shown = min(len(target), 16)
        shares = self.embedding.class_shares(target)
        start = self._enter_stage(stage)
        for step in progress(range(start, schedule.num_steps), stage, schedule.num_steps, initial=start):
            self._take_step(target, shares, schedule)
            is_last = step + 1 == schedule.num_steps  # its checkpoint is written at the end of the stage
            self._finish_step(None if is_last else snapshot_freq)

    def _take_step(self, target: torch.Tensor, shares: torch.Tensor, schedule: Schedule) -> None:
        """One step down the sum of |target_k - share_k E phi(G(z, k))|^2 over labels k."""
        self.generator.train()
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        rng, device = self.runtime.rng(f"{self.stage} {self.step}"), self.runtime.device
        num_parts, size = schedule.num_parts, schedule.batch_size // schedule.num_parts
        # As many labels as there are PER_CLASS images for.
        chosen = torch.randperm(len(target), generator=rng, device=device)[: max(1, size // PER_CLASS)]
        rows = torch.arange(size, device=device) % len(chosen)
        counts = torch.bincount(rows)[:, None]

        def mean() -> torch.Tensor:
            labels = chosen[rows] if len(target) > 1 else self._random_labels(size, rng)
            images = self._images(
                torch.randn(size, self.generator.z_dim, generator=rng, device=device), labels
            )
            return self.embedding.mean(images, rows, len(chosen)) * (shares[chosen, None] * size / counts)

        if num_parts > 1:
            pairs = _with_the_next(mean() for _ in range(num_parts))
        else:
            # |mean of n vectors|^2 holds each vector's own norm, which is constant, with weight 1 / n, and so the
            # products of different ones, which are wanted, with weight (n - 1) / n.
            own = mean()
            pairs = [(own, own.detach() * (counts / (counts - 1)))]
        for own, other in pairs:
            own.backward(2 * (other - target[chosen]) / num_parts)
        self.optimizer.step()

    def _random_labels(self, size: int, rng: torch.Generator) -> torch.Tensor:
        """All labels alike: where a target has no labels, images of each are to resemble it."""
        table = self.generator.embedding.num_embeddings
        return torch.randint(table, (size,), generator=rng, device=rng.device)

    def _images(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.runtime.autocast():
            images = self.generator(noise, labels)
        return images.float()

    @torch.no_grad()
    def draw(self, labels: np.ndarray, batch_size: int, stream: str) -> np.ndarray:
        """One image per label: (N, C, image_size, image_size) uint8."""
        self.generator.eval()

        def draw(rows: slice) -> np.ndarray:
            batch = torch.from_numpy(labels[rows]).to(self.runtime.device)
            rng = self.runtime.rng(f"noise {stream} {rows.start}")
            noise = torch.randn(len(batch), self.generator.z_dim, generator=rng, device=batch.device)
            return to_uint8(self._images(noise, batch))

        description = stream if len(labels) > batch_size else None
        return in_batches(len(labels), batch_size, draw, self.image_shape, description)

    def num_parameters(self) -> int:
        return num_parameters(self.generator)

    def seconds_per_image(self) -> float:
        """Of a training step on this machine."""
        self.generator.train()
        rows, device = 16, self.runtime.device
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        noise = torch.zeros(rows, self.generator.z_dim, device=device)
        before = {name: value.clone() for name, value in self.generator.state_dict().items()}
        seconds = seconds_of(
            lambda: self.embedding.mean(self._images(noise, labels), labels, 1).sum().backward()
        )
        self.generator.load_state_dict(before)
        self.generator.zero_grad(set_to_none=True)
        return seconds / rows

    def seconds_per_embedded_image(self) -> float:
        """Of a mean embedding on this machine."""
        rows, device = batch_rows(self.image_shape[-1]), self.runtime.device
        images = torch.zeros(rows, *self.image_shape, device=device)
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        with torch.no_grad():
            return seconds_of(lambda: self.embedding.mean(images, labels, 1)) / rows

    # Stages

    def _networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        return {"optimizer": torch.optim.Adam(self.generator.parameters())}

    def _preview(self) -> Samples:
        labels = preview_labels(self.num_shown)
        return Samples(self.draw(labels, len(labels), "preview"), labels)


def _with_the_next(means: Iterator[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each mean and the values of the next one, of the last and the first; two of them are in memory at a time.

    Their product estimates |mean|^2 without bias. Within a part that is not so: BatchNorm makes its images depend on
    each other, and a generator learns to be right on average over a part instead of over all images.
    """
    own = next(means)
    first = own.detach()
    for mean in means:
        yield own, mean.detach()
        own = mean
    yield own, first


class EmbeddingSynthesizer(Synthesizer):
    """One release over all private images trains a generator; public or noisy central images may train it before.

    A method chooses the features and the number of steps. Sections of its Config: model (with a Generator),
    pretrain (with cond and query), train, gen, public_data.
    """

    selects_public_classes = True
    learns_class_shares = True  # the weights of generated images in `_take_step`

    def __init__(self, config: Sections, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        pretrains = self._pretraining(1).num_steps > 0
        self.pretraining = Pretraining(config.public_data, config.pretrain.query, pretrains, spec, runtime)
        self.embedding = self._embedding()
        self.fitted = EmbeddingGenerator(
            config.model.Generator,
            self.embedding,
            spec.resolution,
            spec.channels,
            self.pretraining.num_labels,
            runtime,
        )
        self.noisy_embedding: torch.Tensor | None = None  # (num_classes, D)

    @abc.abstractmethod
    def _embedding(self) -> Embedding:
        """The features, for the images of `self.spec`."""

    @abc.abstractmethod
    def _pretraining(self, num_images: int) -> Schedule:
        """The schedule on a public set of this size; no steps: no pretraining."""

    @abc.abstractmethod
    def _training(self) -> Schedule:
        """The schedule on the noisy embedding."""

    def privacy_plan(self) -> list[Release]:
        return [*self.pretraining_plan(), Release(MEAN_EMBEDDING, None)]

    def pretraining_plan(self) -> list[Release]:
        return self.pretraining.plan()

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        public = self.pretraining.obtain(public, private)
        if public is not None and self._pretraining(len(public)).num_steps:
            target = self.fitted.public_mean(public, self.config.pretrain.cond, self.pretraining.flip)
            self._fit("pretrain", target, self._pretraining(len(public)))

    def train(self, private: PrivateData) -> None:
        steps = self._training().num_steps
        if 0 < steps < FEW_STEPS:
            log.info(
                f"train: only {steps} training steps, too few for a generator; more steps cost no privacy"
            )
        if self.noisy_embedding is None:  # otherwise a resumed run has its only release from the checkpoint
            self.noisy_embedding = self.embedding.noisy_mean(private)
            self.runtime.snapshot("train")
        self._fit("train", self.noisy_embedding, self._training())

    def _fit(self, stage: str, target: torch.Tensor, schedule: Schedule) -> None:
        period = schedule.snapshot_period or schedule.period
        period *= -(-schedule.num_steps // (MOST_SNAPSHOTS * period))  # short epochs share one
        self.fitted.fit(stage, target, schedule, period)

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        return Samples(self.fitted.draw(labels, self.config.gen.batch_size, "generate"), labels)

    def state_dict(self) -> dict:
        return {
            "fit": self.fitted.state_dict(),
            "noisy_embedding": self.noisy_embedding,
            "central": self.pretraining.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.fitted.load_state_dict(state["fit"])
        embedding = state["noisy_embedding"]
        self.noisy_embedding = None if embedding is None else embedding.to(self.runtime.device)
        self.pretraining.load_state_dict(state["central"])

    @property
    def learns_from_public_images(self) -> bool:
        return self.pretraining.used

    def settings_without_effect(self) -> dict[str, str]:
        without_effect = self.pretraining.settings_without_effect()
        if self.pretraining.central is not None:
            why = "a mean embedding takes each central image once, as it is"
            without_effect |= {f"public_data.central.{key}": why for key in ("num_ops", "max_magnitude")}
        return without_effect

    def parameter_counts(self) -> dict[str, int]:
        return {"generator": self.fitted.num_parameters()}

    def public_costs(self, num_images: int) -> list[Cost]:
        query, left = self.pretraining.costs(num_images)
        schedule = self._pretraining(left)
        return [*query, self.fitted.cost("pretrain", schedule, left)] if schedule.num_steps else query

    def remaining_share(self, cost: Cost) -> float:
        return self.fitted.remaining_share(cost)

    def costs(self) -> list[Cost]:
        labels = balanced_labels(16, self.spec.num_classes)
        return [
            self.fitted.cost("train", self._training(), self.spec.num_train),
            sampling_cost(self.config.gen.data_num, 16, lambda: self.fitted.draw(labels, 16, "cost")),
        ]
