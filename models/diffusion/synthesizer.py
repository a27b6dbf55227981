"""The family of pixel-space diffusion methods: a shared network and loops; a method is a choice of stages.

Stages: public pretraining (on all public classes, or on those that a noisy semantic query selects), DP-SGD on the
private images, sampling. Every stage starts from the EMA weights of the one before, with a fresh EMA and optimiser.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.spec import DataSpec, PublicData, Samples
from models.diffusion.denoiser import guided
from models.diffusion.loss import EDMLoss, LossConfig
from models.diffusion.samplers import SamplerConfig, sample
from models.nn.ema import EMA
from models.nn.unet import UNet
from models.semantic_query import QueryConfig, SemanticQuery, words_per_class
from models.synthesizer import Cost, Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import DPSGDConfig, dpsgd_release, dpsgd_steps
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.draws import Draws
from utils.errors import UserError
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import GenConfig, PublicDataConfig, check
from utils.seeding import numpy_rng

DP_SGD = "dp-sgd"


@dataclass(frozen=True)
class NetworkConfig:
    image_size: int
    num_in_channels: int
    nf: int  # base width
    ch_mult: list[int]  # width factor per level, each level at half the resolution
    attn_resolutions: list[int]  # pixels of the levels that attend
    num_res_blocks: int

    def __post_init__(self) -> None:
        levels = len(self.ch_mult) - 1
        check(
            levels >= 0 and 2**levels <= self.image_size,
            "model.network.ch_mult",
            self.ch_mult,
            f"one factor per level, and {self.image_size} px cannot be halved {levels} times",
        )
        check(self.nf > 2 and self.nf % 4 == 0, "model.network.nf", self.nf, "a positive multiple of 4")


@dataclass(frozen=True)
class ModelConfig:
    network: NetworkConfig
    ema_rate: float
    sampler: SamplerConfig  # previews
    sampler_acc: SamplerConfig  # the images that are delivered
    ckpt: str | None  # checkpoint to start from
    ckpt_weights: str  # which of its weights: ema or raw

    def __post_init__(self) -> None:
        check(0 <= self.ema_rate < 1, "model.ema_rate", self.ema_rate, "in [0, 1)")
        check(self.ckpt_weights in ("ema", "raw"), "model.ckpt_weights", self.ckpt_weights, "ema or raw")


@dataclass(frozen=True)
class OptimParams:
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class OptimConfig:
    optimizer: str
    params: OptimParams

    def __post_init__(self) -> None:
        check(
            self.optimizer in OPTIMIZERS, "optim.optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}"
        )

    def make(self, parameters) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](
            parameters, lr=self.params.lr, weight_decay=self.params.weight_decay
        )


OPTIMIZERS: dict[str, type] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


@dataclass(frozen=True)
class PretrainConfig:
    cond: bool  # False: every label is replaced by the null label
    batch_size: int
    n_epochs: int  # passes over the (selected) public images
    snapshot_freq: int  # steps between snapshots
    optim: OptimConfig
    loss: LossConfig
    query: QueryConfig  # classifier behind the semantic query; used when public_data.selective.ratio < 1

    def __post_init__(self) -> None:
        check(self.batch_size > 0, "pretrain.batch_size", self.batch_size, "a positive number of images")
        check(self.n_epochs >= 0, "pretrain.n_epochs", self.n_epochs, "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int  # nominal: the sampling rate is 1 / ceil(N / batch_size)
    n_epochs: int
    snapshot_freq: int
    optim: OptimConfig
    loss: LossConfig
    dp: DPSGDConfig


class DiffusionSynthesizer(Synthesizer):
    """Base of DPDM, PDP-Diffusion and PrivImage."""

    @dataclass(frozen=True)
    class Config:
        model: ModelConfig
        pretrain: PretrainConfig
        train: TrainConfig
        gen: GenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        checkpoint, self.inherited = None, []
        if config.model.ckpt is not None:
            checkpoint, self.inherited = _read_checkpoint(config.model.ckpt)
        self.query = self._semantic_query()
        shape = config.model.network
        with runtime.seeded("network"):
            network = UNet(
                image_size=shape.image_size,
                channels=shape.num_in_channels,
                label_dim=self._label_dim() if checkpoint is None else checkpoint["label_dim"],
                nf=shape.nf,
                ch_mult=shape.ch_mult,
                attn_resolutions=shape.attn_resolutions,
                num_res_blocks=shape.num_res_blocks,
            )
        self.network = runtime.place(network)
        if checkpoint is not None:
            _load_weights(self.network, checkpoint, config.model)
        self._begin("start", None)

    def _semantic_query(self) -> SemanticQuery | None:
        public = self.config.public_data
        if public.name is None or public.selective.ratio == 1.0 or not self.config.pretrain.n_epochs:
            return None
        words = words_per_class(public, self.spec.num_classes)
        return SemanticQuery(self.config.pretrain.query, public.selective, words, self.spec, self.runtime)

    def _label_dim(self) -> int:
        """Rows of the label table without the null row: private classes, or public ones where those are trained."""
        public = self.config.public_data
        if public.name is None or self.query is not None:
            return self.spec.num_classes
        return max(self.spec.num_classes, public.n_classes or 0)

    def privacy_plan(self) -> list[Release]:
        train = self.config.train
        queries = [] if self.query is None else [self.query.release()]
        return [
            *self.inherited,
            *queries,
            dpsgd_release(
                DP_SGD, self.spec.num_train, train.batch_size, train.n_epochs, train.dp.max_batch_size
            ),
        ]

    # Stages

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        config = self.config.pretrain
        self._book_inherited(private)
        if public is None or not config.n_epochs:
            return
        if self.query is not None:
            public = self.query.select(public, private)
        elif config.cond and public.num_classes > self.network.null_label:
            raise UserError(
                f"public_data: {public.num_classes} classes do not fit the checkpoint's table of "
                f"{self.network.null_label} labels; use pretrain.cond=false"
            )
        self._fit_public(public.samples, EDMLoss(config.loss, not config.cond, self.runtime.autocast))

    def _book_inherited(self, private: PrivateData | None) -> None:
        """What the checkpoint's own run asked the private images is part of what this run's samples reveal."""
        if self.inherited and private is None:
            raise UserError("model.ckpt: its training asked private images, but sensitive_data.name is null")
        for release in self.inherited:
            left = release.num_steps - private.ledger.executed(release.name)
            private.ledger.book(release.name, left)

    def _fit_public(self, samples: Samples, loss: EDMLoss) -> None:
        config = self.config.pretrain
        batch_size = min(config.batch_size, len(samples))
        steps_per_epoch = len(samples) // batch_size
        total = config.n_epochs * steps_per_epoch
        start = self._begin("pretrain", config.optim)
        for step in progress(range(start, total), "pretrain", total=total, initial=start):
            epoch, position = divmod(step, steps_per_epoch)
            order = numpy_rng(self.runtime.seed, f"pretrain order {epoch}").permutation(len(samples))
            rng = self.runtime.draws(f"pretrain {step}", batch_size)
            batch = np.sort(order[position * batch_size : (position + 1) * batch_size])
            own = distributed.share(batch_size)
            self.optimizer.zero_grad(set_to_none=True)
            if own.start < own.stop:
                self._public_loss(loss, samples.take(batch[own]), rng[own]).div(batch_size).backward()
            distributed.sum_gradients(self.network.parameters())
            self.optimizer.step()
            self._finish_step(config.snapshot_freq)
        self._use_ema()

    def _public_loss(self, loss: EDMLoss, batch: Samples, rng: Draws) -> torch.Tensor:
        """Sum of the losses of `batch`."""
        images = self._augment(to_float(batch.images, self.runtime.device), rng)
        labels = torch.from_numpy(batch.labels).to(self.runtime.device)
        return loss(self.network, images, labels, rng).sum()

    def _augment(self, images: torch.Tensor, rng: Draws) -> torch.Tensor:
        if not self.config.public_data.flip:
            return images
        flipped = rng.uniform() < 0.5
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)

    def train(self, private: PrivateData) -> None:
        config = self.config.train
        self._book_inherited(private)
        self._begin("train", config.optim)
        steps = dpsgd_steps(
            DP_SGD,
            private,
            self.network,
            self.optimizer,
            EDMLoss(config.loss, autocast=self.runtime.autocast),
            config.dp,
        )
        planned = private.ledger.planned(DP_SGD).num_steps
        for _ in progress(steps, "train (DP-SGD)", total=planned, initial=private.ledger.executed(DP_SGD)):
            self._finish_step(config.snapshot_freq)
        self._use_ema()

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        return Samples(self._sample(self.config.model.sampler_acc, labels, "generate", show=True), labels)

    def _sample(
        self, config: SamplerConfig, labels: np.ndarray, stream: str, show: bool = False
    ) -> np.ndarray:
        """One image per label, from the EMA weights: (N, C, H, W) uint8."""
        network = copy.deepcopy(self.network).requires_grad_(False)
        self.ema.copy_to(network)
        starts = range(0, len(labels), self.config.gen.batch_size)
        starts = starts[distributed.share(len(starts))]
        parts = [np.empty((0, *self.spec.image_shape), np.uint8)]
        for start in progress(starts, "generate", unit="batch") if show else starts:
            batch = torch.from_numpy(labels[start : start + self.config.gen.batch_size]).to(
                self.runtime.device
            )
            rng = self.runtime.rng(f"{stream} {start}")
            denoiser = guided(network, config.guid_scale)
            with self.runtime.autocast():
                images = sample(denoiser, config, self.spec.image_shape, batch, rng)
            parts.append(to_uint8(images))
        return distributed.concatenate(torch.from_numpy(np.concatenate(parts))).numpy()

    # State

    def _begin(self, stage: str, optim: OptimConfig | None) -> int:
        """Enter a stage afresh, or where `load_state_dict` left it; returns the step to start from."""
        if getattr(self, "stage", None) != stage:
            self.stage, self.step = stage, 0
            self.ema = EMA(self.network, self.config.model.ema_rate)
            self.optimizer = None if optim is None else optim.make(self.network.parameters())
        return self.step

    def _finish_step(self, snapshot_freq: int) -> None:
        self.step += 1
        self.ema.update(self.network)
        if self.step % snapshot_freq == 0:
            self.runtime.snapshot(self.stage)  # first: a preview must not outlive the booking of its steps
            labels = balanced_labels(8 * min(self.spec.num_classes, 16), self.spec.num_classes)
            images = self._sample(self.config.model.sampler, labels, f"preview {self.stage} {self.step}")
            self.runtime.preview(self.stage, self.step, images, labels)

    def _use_ema(self) -> None:
        """End a stage: its EMA weights become the weights."""
        self.ema.copy_to(self.network)

    def state_dict(self) -> dict:
        return {
            "stage": self.stage,
            "step": self.step,
            "label_dim": self.network.null_label,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        optim = {"pretrain": self.config.pretrain.optim, "train": self.config.train.optim}.get(state["stage"])
        _load_weights(self.network, state, None)
        self.stage = None
        self._begin(state["stage"], optim)
        self.step = state["step"]
        self.ema.load_state_dict(state["ema"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    # --dry_run

    def parameter_counts(self) -> dict[str, int]:
        return {"UNet": sum(p.numel() for p in self.network.parameters())}

    def costs(self) -> list[Cost]:
        config, spec = self.config, self.spec
        release = dpsgd_release(DP_SGD, spec.num_train, config.train.batch_size, config.train.n_epochs)
        expected = spec.num_train * release.sample_rate
        if config.train.dp.max_batch_size is not None:
            expected = min(expected, config.train.dp.max_batch_size)
        draws = config.train.loss.n_noise_samples
        forward, backward = self._seconds_per_row()
        calls = config.model.sampler_acc.num_steps * (2 if config.model.sampler_acc.type == "edm" else 1)
        return [
            Cost(
                "train",
                f"{release.num_steps} steps x {expected:.0f} images x {draws} noise draws",
                release.num_steps * expected * draws * backward,
            ),
            Cost(
                "generate",
                f"{config.gen.data_num} images x {calls} network calls",
                config.gen.data_num * calls * forward,
            ),
        ]

    def _seconds_per_row(self, rows: int = 16) -> tuple[float, float]:
        """Seconds of one network evaluation, and of one with its gradient, per image."""
        images = torch.zeros((rows, *self.spec.image_shape), device=self.runtime.device)
        condition = torch.zeros(rows, device=self.runtime.device)
        labels = torch.zeros(rows, dtype=torch.int64, device=self.runtime.device)

        def timed(run: Callable[[], object]) -> float:
            run()  # the first call also allocates and chooses kernels
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) / rows

        def evaluate() -> float:
            with torch.no_grad():
                return self.network(images, condition, labels).sum().item()

        def differentiate() -> float:
            self.network(images, condition, labels).sum().backward()
            self.network.zero_grad(set_to_none=True)
            return float(next(self.network.parameters()).detach().flatten()[0])

        return timed(evaluate), timed(differentiate)


def _read_checkpoint(path: str) -> tuple[dict, list[Release]]:
    """The method's state, and the private releases that were booked up to it."""
    from utils.checkpoints import read

    content = read(path)
    state, ledger = content["state"], content.get("ledger") or {"plan": [], "executed": {}}
    if "network" not in state or "label_dim" not in state:
        raise UserError(f"model.ckpt: {path} is not a checkpoint of a diffusion method")
    taken = [(Release(**saved), ledger["executed"][saved["name"]]) for saved in ledger["plan"]]
    return state, [
        replace(release, name=f"checkpoint: {release.name}", num_steps=steps)
        for release, steps in taken
        if steps
    ]


def _load_weights(network: UNet, state: dict, config: ModelConfig | None) -> None:
    """Copy raw weights, or the EMA where `config` asks for it; a different architecture is a UserError."""
    weights = state["network"]
    if config is not None and config.ckpt_weights == "ema":
        weights = {**weights, **state["ema"]["weights"]}
    own = network.state_dict()
    for name in [*own, *weights]:
        have, want = weights.get(name), own.get(name)
        if have is None or want is None or have.shape != want.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (have, want)]
            source = "checkpoint" if config is None else f"model.ckpt: {config.ckpt}"
            raise UserError(
                f"{source} has another architecture: '{name}' is {shapes[0]}, the network's {shapes[1]}"
            )
    network.load_state_dict(weights)
