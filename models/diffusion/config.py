"""The sections of the diffusion family's configuration."""

from dataclasses import dataclass

import torch

from models.diffusion.loss import LossConfig
from models.diffusion.samplers import SamplerConfig
from models.semantic_query import QueryConfig
from opacus_ext.dpsgd import DPSGDConfig
from utils.sections import check


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
