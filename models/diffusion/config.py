"""The sections of the diffusion family's configuration."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.diffusion.loss import LossConfig
from models.diffusion.samplers import SamplerConfig
from models.nn.unet import UNet, level_sizes
from models.public.semantic_query import QueryConfig
from opacus_ext.dpsgd import DPSGDConfig
from utils.runtime import log
from utils.sections import check_field, check_least, check_positive
from utils.typed import Number


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
        check_field(
            levels >= 0 and 2**levels <= self.image_size,
            "ch_mult",
            self.ch_mult,
            f"one factor per level, and {self.image_size} px cannot be halved {levels} times",
        )
        check_field(min(self.ch_mult) > 0, "ch_mult", self.ch_mult, "factors of at least 1")
        check_field(self.nf > 2 and self.nf % 4 == 0, "nf", self.nf, "a positive multiple of 4")
        check_least(self, 1, "num_res_blocks")
        sizes = level_sizes(self.image_size, levels + 1)
        check_field(
            not self.attn_resolutions or not set(self.attn_resolutions).isdisjoint(sizes),
            "attn_resolutions",
            self.attn_resolutions,
            f"empty, or name one of the levels' sizes: {', '.join(map(str, sizes))}",
        )

    def make(self, label_dim: int, dropout: float = 0.0, num_augment_labels: int = 0) -> UNet:
        sizes = level_sizes(self.image_size, len(self.ch_mult))
        if missing := [size for size in self.attn_resolutions if size not in sizes]:
            log.info(f"model.network.attn_resolutions: no level has {missing} pixels; there are {sizes}")
        return UNet(
            image_size=self.image_size,
            channels=self.num_in_channels,
            label_dim=label_dim,
            nf=self.nf,
            ch_mult=self.ch_mult,
            attn_resolutions=self.attn_resolutions,
            num_res_blocks=self.num_res_blocks,
            dropout=dropout,
            num_augment_labels=num_augment_labels,
        )


@dataclass(frozen=True)
class ModelConfig:
    network: NetworkConfig
    ema_rate: float
    sampler: SamplerConfig  # previews
    sampler_acc: SamplerConfig  # the images that are delivered
    ckpt: str | None  # checkpoint to start from
    ckpt_weights: str  # which of its weights: ema or raw

    def __post_init__(self) -> None:
        check_field(0 <= self.ema_rate < 1, "ema_rate", self.ema_rate, "in [0, 1)")
        check_field(self.ckpt_weights in ("ema", "raw"), "ckpt_weights", self.ckpt_weights, "ema or raw")


@dataclass(frozen=True)
class OptimParams:
    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        check_least(self, 0, "weight_decay")


@dataclass(frozen=True)
class OptimConfig:
    optimizer: str
    params: OptimParams

    def __post_init__(self) -> None:
        check_field(
            self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}"
        )

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](
            parameters, lr=self.params.lr, weight_decay=self.params.weight_decay
        )


OPTIMIZERS: dict[str, type] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


@dataclass(frozen=True)
class WarmUpConfig:
    batch_size: int
    n_epochs: int  # passes over the central images; 0: no query for them

    def __post_init__(self) -> None:
        check_least(self, 1, "batch_size")
        check_least(self, 0, "n_epochs")


@dataclass(frozen=True)
class PretrainConfig:
    cond: bool  # False: every label is replaced by the null label
    batch_size: int
    n_epochs: int  # passes over the (selected) public images
    snapshot_freq: int  # steps between snapshots
    optim: OptimConfig
    loss: LossConfig
    query: QueryConfig  # classifier behind the semantic query; used when public_data.selective.ratio < 1
    warm_up: WarmUpConfig  # on central images of the private set; the rest is as for public images

    def __post_init__(self) -> None:
        check_field(self.batch_size > 0, "batch_size", self.batch_size, "a positive number of images")
        check_least(self, 0, "n_epochs")
        check_least(self, 1, "snapshot_freq")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int | None  # nominal: q = 1 / ceil(N / batch_size); None: all N in every step
    n_epochs: Number  # passes over the private images; a fraction ends within a pass
    snapshot_freq: int
    optim: OptimConfig
    loss: LossConfig
    dp: DPSGDConfig

    def __post_init__(self) -> None:
        check_least(self, 1, "snapshot_freq")
