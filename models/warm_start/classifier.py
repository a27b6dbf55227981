"""A classifier that is trained on public images first and then with DP-SGD on private ones (Park et al., CVPR 2024).

Legend: B batch, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.spec import DataSpec, Samples
from models.fitting.stages import Staged
from models.public.batches import public_batches, steps_of
from models.released.wide_resnet import WideResNetClassifier
from models.warm_start.augmentation import cut_out, mirrored, several_views, shifted
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import DPSGDConfig, dpsgd_release, dpsgd_steps
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.draws import Draws
from utils.errors import FieldError
from utils.images import to_float
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check, check_choice, check_field, check_least, check_positive
from utils.timing import Cost, batch_rows, seconds_of
from utils.typed import Number

DP_SGD = "dp-sgd"
EXTENDERS = ("none", "mirror")
DOPE = (
    "extender: dope is not available: it clips gradients about a public centre, which the mechanisms of this "
    "toolkit do not do; use none or mirror"
)


@dataclass(frozen=True)
class ClassifierConfig:
    depth: int  # of the wide residual network: 6 n + 4
    width: int  # times 16, 32 and 64 channels
    groups: int  # of GroupNorm, at most
    ema_rate: float

    def __post_init__(self) -> None:
        fits = self.depth >= 10 and (self.depth - 4) % 6 == 0
        check_field(fits, "depth", self.depth, "10, 16, 22 and so on (6 n + 4)")
        check_least(self, 1, "width", "groups")
        check_field(0 <= self.ema_rate < 1, "ema_rate", self.ema_rate, "in [0, 1)")


@dataclass(frozen=True)
class WarmUpConfig:
    batch_size: int
    n_epochs: int  # passes over the images; 0: no warm-up
    snapshot_freq: int  # steps between snapshots
    lr: float  # SGD; follows a cosine to 0
    momentum: float
    weight_decay: float
    sam_rho: float  # radius of sharpness-aware minimisation (Foret et al. 2021); 0: plain SGD
    pad: int  # pixels by which a crop may be shifted
    cutout: int  # pixels of the square that half of the images lose; 0: none

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size", "snapshot_freq")
        check_least(self, 0, "n_epochs", "momentum", "weight_decay", "sam_rho", "pad", "cutout")
        check_positive(self, "lr")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int | None  # nominal: q = 1 / ceil(N / batch_size); None: all N in every step
    n_epochs: Number  # passes over the private images; a fraction ends within a pass
    snapshot_freq: int
    lr: float  # SGD, constant
    momentum: float
    augmult: int  # augmented copies of a record, whose gradients are averaged before clipping
    pad: int  # pixels by which a copy may be shifted
    extender: str  # none, or mirror: mixes in the gradient of public images (after Amid et al. 2022)
    public_batch_size: int  # mirror: images per step
    dp: DPSGDConfig

    def __post_init__(self) -> None:
        if self.extender == "dope":
            raise FieldError(DOPE)
        check_choice("extender", self.extender, EXTENDERS)
        check_least(self, 1, "snapshot_freq", "augmult", "public_batch_size")
        check_least(self, 0, "momentum", "pad")
        check_positive(self, "lr")


class WarmStartedClassifier(Staged):
    """Stages "warm-up" and "train"; the average of the weights is the product."""

    def __init__(
        self, model: ClassifierConfig, warm_up: WarmUpConfig, train: TrainConfig, flip: bool, spec: DataSpec,
        runtime: Runtime,
    ) -> None:  # fmt: skip
        self.model, self.warm_up, self.config = model, warm_up, train
        for section, pad in (("warm_up", warm_up.pad), ("train", train.pad)):
            allowed = f"below {spec.resolution}, the pixels of an image's side"
            check(pad < spec.resolution, f"{section}.pad", pad, allowed)
        self.flip, self.spec, self.runtime = flip, spec, runtime
        with runtime.seeded("classifier"):
            network = self._new_network()
        self.network = runtime.place(network)
        self._start_stage("start")

    def _new_network(self) -> WideResNetClassifier:
        model, spec = self.model, self.spec
        return WideResNetClassifier(spec.channels, spec.num_classes, model.depth, model.width, model.groups)

    def release(self) -> Release:
        config = self.config
        return dpsgd_release(
            DP_SGD, self.spec.num_train, config.batch_size, config.n_epochs, config.dp.max_batch_size
        )

    def product(self) -> WideResNetClassifier:
        """The averaged weights as a classifier."""
        classifier = self._new_network().to(self.runtime.device)
        self.ema.copy_to(classifier)
        return classifier.eval()

    # Public images

    def fit_public(self, samples: Samples) -> None:
        """The warm-up on public images. A resumed run continues; after it, nothing is done."""
        if self.stage == "train":
            return
        config = self.warm_up
        batches = public_batches(
            "warm-up", len(samples), config.batch_size, config.n_epochs, self.runtime.seed,
            start=self._enter_stage("warm-up"),
        )  # fmt: skip
        total, _ = steps_of(len(samples), config.batch_size, config.n_epochs)
        for step, batch in batches:
            epoch = step * config.n_epochs // total
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * epoch / config.n_epochs)) / 2
            images, labels = self._warm_up_batch(
                samples, batch, self.runtime.draws(f"warm-up {step}", len(batch))
            )
            self._take_public_step(images, labels, len(batch))
            self._finish_step(config.snapshot_freq)

    def _warm_up_batch(
        self, samples: Samples, batch: np.ndarray, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's share of the batch, augmented."""
        config, own = self.warm_up, distributed.share(len(batch))
        part, rng = samples.take(batch[own]), draws[own]
        images = shifted(to_float(part.images, self.runtime.device), rng.uniform(2), config.pad, "constant")
        images = mirrored(images, rng.uniform()) if self.flip else images
        return cut_out(images, rng.uniform(3), config.cutout), torch.from_numpy(part.labels).to(images.device)

    def _take_public_step(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> None:
        """One step of SGD with the gradient at the worst of nearby weights (Foret et al. 2021, arXiv:2010.01412)."""
        self._public_gradient(images, labels, batch_size)
        moved = []
        if self.warm_up.sam_rho:
            parameters = list(self.network.parameters())
            norm = torch.stack([p.grad.norm() for p in parameters]).norm().clamp(min=1e-12)
            moved = [p.grad * (self.warm_up.sam_rho / norm) for p in parameters]
            self._move(moved, 1)
            self._public_gradient(images, labels, batch_size)
            self._move(moved, -1)
        self.optimizer.step()

    def _public_gradient(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if len(images):
            with self.runtime.autocast():
                logits = self.network(images)
            F.cross_entropy(logits.float(), labels, reduction="sum").div(batch_size).backward()
        distributed.sum_gradients(self.network.parameters())

    @torch.no_grad()
    def _move(self, steps: list[torch.Tensor], sign: int) -> None:
        torch._foreach_add_(list(self.network.parameters()), steps, alpha=sign)

    # Private images

    def fit_private(self, private: PrivateData, public: Samples | None) -> None:
        """DP-SGD on the private images. `public`: the images whose gradient the extender mixes in."""
        self._enter_stage("train")
        config, planned = self.config, private.ledger.planned(DP_SGD).num_steps
        if config.extender == "mirror":
            self.optimizer.mix = lambda: self._public_direction(
                public, private.ledger.executed(DP_SGD), planned
            )
        steps = dpsgd_steps(DP_SGD, private, self.network, self.optimizer, self._private_loss, config.dp)
        for _ in progress(steps, "train (DP-SGD)", total=planned, initial=private.ledger.executed(DP_SGD)):
            self._finish_step(config.snapshot_freq)

    def _private_loss(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, rng: Draws
    ) -> torch.Tensor:
        """(B,): the mean loss of the augmented copies of each record, so that they are clipped as one."""
        count = self.config.augmult
        views = several_views(images, rng, count, self.config.pad, self.flip)
        with self.runtime.autocast():
            logits = network(views)
        losses = F.cross_entropy(logits.float(), labels.repeat_interleave(count), reduction="none")
        return losses.view(-1, count).mean(1)

    def _public_direction(self, public: Samples, step: int, planned: int) -> tuple[float, list[torch.Tensor]]:
        """The weight of the private direction and the gradient of a public batch: cos(pi t / 20), t from 0 to 1."""
        draws = self.runtime.draws(f"extender {step}", min(self.config.public_batch_size, len(public)))
        rows = (draws.uniform() * len(public)).long().clamp(max=len(public) - 1).cpu().numpy()
        images, labels = self._warm_up_batch_of_all(public.take(rows), draws)
        loss = F.cross_entropy(self.network(images).float(), labels)
        gradients = torch.autograd.grad(loss, list(self.network.parameters()))
        return math.cos(math.pi * step / planned / 20), list(gradients)

    def _warm_up_batch_of_all(self, samples: Samples, rng: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        images = shifted(
            to_float(samples.images, self.runtime.device), rng.uniform(2), self.config.pad, "reflect"
        )
        images = mirrored(images, rng.uniform()) if self.flip else images
        return images, torch.from_numpy(samples.labels).to(images.device)

    # Stages

    def _networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def _ema_rate(self) -> float:
        return self.model.ema_rate

    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        parameters = self.network.parameters()
        if stage == "warm-up":
            config = self.warm_up
            optimizer = torch.optim.SGD(
                parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
            return {"optimizer": optimizer}
        if stage == "train":
            return {"optimizer": MixingSGD(parameters, self.config.lr, momentum=self.config.momentum)}
        return {}

    def _preview(self) -> None:
        return None

    def _finish_step(self, snapshot_freq: int | None) -> None:
        self.ema.update(self.network)
        super()._finish_step(snapshot_freq)

    # --dry_run

    def seconds_per_image(self) -> float:
        """Of one image in one ordinary step, measured."""
        rows = batch_rows(self.spec.resolution)
        blank = torch.zeros(rows, *self.spec.image_shape, device=self.runtime.device)

        def step() -> None:
            self.network(blank).sum().backward()
            self.network.zero_grad(set_to_none=True)

        return seconds_of(step) / rows

    def warm_up_cost(self, num_images: int) -> Cost:
        steps, batch_size = steps_of(num_images, self.warm_up.batch_size, self.warm_up.n_epochs)
        passes = 2 if self.warm_up.sam_rho else 1
        seconds = steps * batch_size * passes * self.seconds_per_image()
        return Cost("warm-up", f"{steps} steps x {batch_size} images x {passes} passes", seconds, steps)

    def train_cost(self) -> Cost:
        release = self.release()
        images = release.sample_rate * self.spec.num_train
        text = f"{release.num_steps} steps x {images:.0f} images x {self.config.augmult} copies"
        seconds = release.num_steps * images * self.config.augmult * self.seconds_per_image()
        return Cost("train", text, seconds, release.num_steps)


class MixingSGD(torch.optim.SGD):
    """SGD along b g + (1 - b) h, where g is the gradient that was set, and `mix()` gives b and h. DP-SGD sets a noisy
    g; h comes from public images, so mixing is post-processing."""

    mix: Callable[[], tuple[float, list[torch.Tensor]]] | None = None

    def step(self, closure: None = None) -> None:
        if self.mix is not None:
            share, others = self.mix()
            parameters = [p for group in self.param_groups for p in group["params"]]
            for parameter, other in zip(parameters, others, strict=True):
                parameter.grad.mul_(share).add_(other, alpha=1 - share)
        super().step()
