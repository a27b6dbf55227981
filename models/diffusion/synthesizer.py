"""The family of diffusion methods: a shared network and loops; a method is a choice of stages.

Stages: public pretraining (on all public classes, or on those that a noisy semantic query selects), a warm-up on
noisy central images of the private set, DP-SGD on the private images, sampling. Starts and checkpoints are in
staged.py. A method may override the functions below "Seams".
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from data.locations import has_public_images
from data.spec import DataSpec, PublicData, Samples
from models.diffusion.config import ModelConfig, PretrainConfig, TrainConfig
from models.diffusion.cost import generation_cost, seconds_per_image, training_cost, warm_up_cost
from models.diffusion.denoiser import guided
from models.diffusion.loss import EDMLoss, LossConfig
from models.diffusion.samplers import SamplerConfig, sample
from models.diffusion.staged import StagedNetwork
from models.fitting.batches import in_batches
from models.public.batches import public_batches, randomly_flipped
from models.public.pretraining import NO_FLIP, NO_IMAGES, NO_SELECTION, SELECTIVE, Pretraining
from models.synthesizer import Sections, balanced_labels, preview_labels
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import dpsgd_release, dpsgd_steps
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.draws import Draws
from utils.errors import UserError
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime
from utils.timing import Cost, batch_rows, seconds_of

DP_SGD = "dp-sgd"
WARM_UP = "warm-up"

Augmentation = Callable[[np.ndarray, Draws], np.ndarray]  # (B, C, H, W) uint8 -> the same


class DiffusionSynthesizer(StagedNetwork):
    """Base of the diffusion methods."""

    selects_public_classes = True
    # Kind of the central images for the warm-up unless public_data.name states one; None: no warm-up in that case.
    central_kind: ClassVar[str | None] = None

    @dataclass(frozen=True)
    class Config(Sections):
        model: ModelConfig
        pretrain: PretrainConfig
        train: TrainConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self.pretraining = self._make_pretraining()
        self._make_network()

    def _make_pretraining(self) -> Pretraining:
        pretrain = self.config.pretrain
        return Pretraining(
            self.config.public_data,
            pretrain.query,
            pretrain.n_epochs > 0,
            self.spec,
            self.runtime,
            central_kind=self.central_kind,
            warms_up=pretrain.warm_up.n_epochs > 0,
        )

    @property
    def learns_from_public_images(self) -> bool:
        return self.config.pretrain.n_epochs > 0 or self.config.model.ckpt is not None

    def _flips(self) -> bool:
        """Public images may be mirrored."""
        return self.config.public_data.flip

    def _require_labels(self, checkpoint: dict, source: str) -> None:
        public, pretrain = self.config.public_data, self.config.pretrain
        by_label = self.pretraining.query is None and pretrain.n_epochs and pretrain.cond
        if by_label and (public.n_classes or 0) > checkpoint["label_dim"]:
            raise UserError(
                f"{source} knows {checkpoint['label_dim']} labels; {public.name} has {public.n_classes} classes; use "
                f"pretrain.cond=false"
            )

    def settings_without_effect(self) -> dict[str, str]:
        without = {SELECTIVE: NO_SELECTION, "public_data.flip": NO_FLIP}
        without_effect = {} if has_public_images(self.config.public_data) else without
        if self.config.pretrain.n_epochs == 0:
            return without_effect
        if self.pretraining.central is None:
            without_effect["pretrain.warm_up"] = "this run has no warm-up on central images"
        if has_public_images(self.config.public_data):
            return without_effect
        why = NO_IMAGES
        if self.pretraining.central is not None:
            why = "pretrain.warm_up has those of the warm-up on central images"
        return without_effect | {"pretrain.n_epochs": why, "pretrain.batch_size": why}

    def _continues(self, checkpoint: dict) -> bool:
        """Pretraining again from a checkpoint of pretraining is one long pretraining: with the raw weights, their
        average and the optimiser as they were left, for n_epochs more."""
        again = has_public_images(self.config.public_data) and self.config.pretrain.n_epochs
        return checkpoint["stage"] == "pretrain" and bool(again)

    def _label_dim(self) -> int:
        """Rows of the label table without the null row: private classes, or public ones where those are trained."""
        return self.pretraining.num_labels

    def privacy_plan(self) -> list[Release]:
        return [*self.pretraining_plan(), self._training_release()]

    def pretraining_plan(self) -> list[Release]:
        return [*self.inherited, *self.pretraining.plan()]

    def _training_release(self) -> Release:
        train = self.config.train
        return dpsgd_release(
            DP_SGD, self.spec.num_train, train.batch_size, train.n_epochs, train.dp.max_batch_size
        )

    # Seams: what a method may change

    @property
    def network_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees: the images, or their latents."""
        return self.spec.image_shape

    def _build_network(self, label_dim: int) -> nn.Module:
        """network(noisy (B, *network_shape), noise condition (B,), labels (B,)) -> (B, *network_shape), with
        `null_label` (= label_dim) as the label of no class. Called once, with seeded global generators."""
        return self.config.model.network.make(label_dim)

    def _stages(self) -> dict[str, object]:
        """Stage -> its section (with `optim`), in order: "pretrain" first and "train" last. All but "train" are part
        of `pretrain`, and each has batch_size, n_epochs, snapshot_freq and optim for `_fit_public`."""
        pretrain, train = self.config.pretrain, self.config.train
        return {"pretrain": pretrain, **self._warm_up_stage(), "train": train}

    def _make_loss(self, config: LossConfig, unconditional: bool = False) -> EDMLoss:
        """(network, (B, *network_shape), labels (B,), rng) -> (B,) losses, each averaged over its noise draws."""
        return EDMLoss(config, unconditional, self.runtime.autocast)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, *network_shape), for public images."""
        return images

    def _encode_private(self, private: PrivateData) -> PrivateData:
        """The private records as the network sees them."""
        return private

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, *network_shape) -> (B, C, H, W) float32, nominally in [-1, 1]."""
        return latents

    def _draw(
        self, network: nn.Module, config: SamplerConfig, labels: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Sample (B, *network_shape), one per label (B,)."""
        return sample(guided(network, config.guid_scale), config, self.network_shape, labels, rng)

    # Stages

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        self._book_inherited(private)
        if public is not None and self.config.pretrain.n_epochs and not self._is_completed("pretrain"):
            self._pretrain_publicly(public, private)
        if self.pretraining.central is not None and not self._is_completed(WARM_UP):
            self._warm_up(private)

    def _pretrain_publicly(self, public: PublicData, private: PrivateData | None) -> None:
        samples = self.pretraining.select(public, private).samples
        self._fit_public("pretrain", samples, self._pretraining_loss(), flip=self._flips())

    def _pretraining_loss(self) -> EDMLoss:
        return self._make_loss(self.config.pretrain.loss, not self.config.pretrain.cond)

    def _warm_up(self, private: PrivateData | None) -> None:
        central = self.pretraining.central
        if central.result is None:
            images = central.query(private)
            self.runtime.snapshot("pretrain")  # before the preview: images must not outlive their booking
            self.runtime.preview(WARM_UP, 0, images.images, images.labels)
        self._fit_public(WARM_UP, central.result, self._pretraining_loss(), central.augment)

    def _warm_up_stage(self) -> dict[str, PretrainConfig]:
        pretrain = self.config.pretrain
        section = replace(
            pretrain, batch_size=pretrain.warm_up.batch_size, n_epochs=pretrain.warm_up.n_epochs
        )
        return {} if self.pretraining.central is None else {WARM_UP: section}

    def _fit_public(
        self,
        stage: str,
        samples: Samples,
        loss: EDMLoss,
        augment: Augmentation | None = None,
        flip: bool = False,
    ) -> None:
        """Train all weights without noise on public images, or on images that a private query has released. A resumed
        run continues. `flip`: mirror every other image; set it for public images only."""
        config = self._stages()[stage]
        batches = public_batches(
            stage,
            len(samples),
            config.batch_size,
            config.n_epochs,
            self.runtime.seed,
            start=self._enter_stage(stage),
            before=self._steps_before if stage == "pretrain" else 0,
        )
        for step, batch in batches:
            rng = self.runtime.draws(f"{stage} {step}", len(batch))
            own = distributed.share(len(batch))
            self.optimizer.zero_grad(set_to_none=True)
            if own.start < own.stop:
                part, draws = samples.take(batch[own]), rng[own]
                if augment is not None:
                    part = replace(part, images=augment(part.images, draws))
                self._public_loss(loss, part, draws, flip).div(len(batch)).backward()
            distributed.sum_gradients(self.network.parameters())
            self.optimizer.step()
            self._finish_step(config.snapshot_freq)

    def _public_loss(self, loss: EDMLoss, batch: Samples, rng: Draws, flip: bool = False) -> torch.Tensor:
        """Sum of the losses of `batch`."""
        images = to_float(batch.images, self.runtime.device)
        images = self._encode(randomly_flipped(images, rng) if flip else images)
        labels = torch.from_numpy(batch.labels).to(self.runtime.device)
        return loss(self.network, images, labels, rng).sum()

    def train(self, private: PrivateData) -> None:
        config = self.config.train
        self._book_inherited(private)
        self._enter_stage("train")
        loss = self._make_loss(config.loss)
        steps = dpsgd_steps(
            DP_SGD, self._encode_private(private), self.network, self.optimizer, loss, config.dp
        )
        planned = private.ledger.planned(DP_SGD).num_steps
        for _ in progress(steps, "train (DP-SGD)", total=planned, initial=private.ledger.executed(DP_SGD)):
            self._finish_step(config.snapshot_freq)

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        return Samples(self._sample(self.config.model.sampler_acc, labels, "generate", show=True), labels)

    def _sample(
        self, config: SamplerConfig, labels: np.ndarray, stream: str, show: bool = False
    ) -> np.ndarray:
        """One image per label, from the EMA weights: (N, C, H, W) uint8."""
        network = copy.deepcopy(self.network).requires_grad_(False)
        self.ema.copy_to(network)

        def draw(rows: slice) -> np.ndarray:
            batch = torch.from_numpy(labels[rows]).to(self.runtime.device)
            with self.runtime.autocast():
                drawn = self._draw(network, config, batch, self.runtime.rng(f"{stream} {rows.start}"))
                return to_uint8(self._decode(drawn))

        size, description = self.config.gen.batch_size, "generate" if show else None
        return in_batches(len(labels), size, draw, self.spec.image_shape, description)

    def _finish_step(self, snapshot_freq: int | None) -> None:
        self.ema.update(self.network)
        super()._finish_step(snapshot_freq)

    def _preview(self) -> Samples:
        labels = preview_labels(self.spec.num_classes)
        stream = f"preview {self.stage} {self.step}"
        return Samples(self._sample(self.config.model.sampler, labels, stream), labels)

    def _has_private_labels(self) -> bool:
        selected = self.pretraining.query is not None and self.config.pretrain.cond
        return super()._has_private_labels() or selected

    def state_dict(self) -> dict:
        return {**super().state_dict(), "central": self.pretraining.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.pretraining.load_state_dict(state["central"])

    # --dry_run

    def parameter_counts(self) -> dict[str, int]:
        sizes = {name: parameter.numel() for name, parameter in self.network.named_parameters()}
        trained = sum(sizes[name] for name in self._trained_parameters())
        counts = {"UNet": sum(sizes.values())}
        return counts if trained == counts["UNet"] else {**counts, "UNet, trained with DP-SGD": trained}

    def _warm_ups(self) -> list[tuple[str, int]]:
        """The stages on images that noise has made public, and the number of these images."""
        images = self.config.public_data.central.sample_num * self.spec.num_classes
        return [] if self.pretraining.central is None else [(WARM_UP, images)]

    def public_costs(self, num_images: int) -> list[Cost]:
        if not self.config.pretrain.n_epochs:
            return []
        query, left = self.pretraining.costs(num_images)
        section = self._stages()["pretrain"]
        return [*query, warm_up_cost("pretrain", section, left, self._seconds_of_pretraining())]

    def _seconds_of_pretraining(self) -> float:
        """Of one public image in one step."""
        rows = batch_rows(self.spec.resolution)
        blank = Samples(np.zeros((rows, *self.spec.image_shape), np.uint8), np.zeros(rows, np.int64))
        loss = self._pretraining_loss()

        def step() -> None:
            self._public_loss(loss, blank, self.runtime.draws("cost", rows)).backward()
            self.network.zero_grad(set_to_none=True)

        return seconds_of(step) / rows

    def _seconds_of_augmenting(self, stage: str) -> float:
        """Of one central image, which is changed a little whenever it is shown."""
        if stage != WARM_UP:
            return 0.0
        blank, draws = np.zeros((4, *self.spec.image_shape), np.uint8), self.runtime.draws("cost", 4)
        return seconds_of(lambda: self.pretraining.augmented(blank, draws)) / len(blank)

    def costs(self) -> list[Cost]:
        config = self.config
        forward, backward = seconds_per_image(self.network, self.network_shape, self.runtime.device)
        stages = self._stages()
        return [
            *(
                warm_up_cost(stage, stages[stage], count, backward + self._seconds_of_augmenting(stage))
                for stage, count in self._warm_ups()
            ),
            training_cost(self._training_release(), self.spec.num_train, config.train, backward),
            generation_cost(config.gen, config.model.sampler_acc, forward),
        ]
