"""The family of latent diffusion methods: the diffusion family on the latents of an autoencoder.

Stages: autoencoder and latent UNet on public images, DP-SGD on the latents of the private ones, sampling and decoding.
Architecture, loss, schedule and sampler are those of Rombach et al. 2022 (arXiv:2112.10752) in the published sizes.
"""

from dataclasses import dataclass

import torch
from torch import nn

from data.locations import has_public_images
from data.spec import DataSpec, PublicData
from models.diffusion.autoencoder_training import AutoencoderConfig
from models.diffusion.checkpoint import read_checkpoint
from models.diffusion.config import PretrainConfig, TrainConfig
from models.diffusion.ddpm import DDIMConfig, NoiseLoss, NoiseLossConfig, ScheduleConfig, sample_ddim
from models.diffusion.latent_space import LatentSpace
from models.diffusion.synthesizer import DiffusionSynthesizer
from models.nn.latent_unet import LatentUNet
from models.nn.unet import level_sizes
from opacus_ext.private_data import PrivateData
from utils.errors import UserError
from utils.runtime import Runtime
from utils.sections import check, check_field, check_least
from utils.timing import Cost


@dataclass(frozen=True)
class LatentNetworkConfig:
    nf: int  # base width
    ch_mult: list[int]  # width factor per level, each level at half the resolution
    attn_resolutions: list[int]  # latent pixels of the levels with transformers
    num_res_blocks: int
    head_width: int  # channels per attention head
    context_dim: int  # width of the class token

    def __post_init__(self) -> None:
        check_least(self, 1, "num_res_blocks", "head_width", "context_dim")
        check_field(
            self.nf > 3 and self.nf % self.head_width == 0 and self.nf % 4 == 0,
            "nf",
            self.nf,
            f"a multiple of 4 and of head_width = {self.head_width}",
        )
        factors = len(self.ch_mult) > 0 and min(self.ch_mult) > 0
        check_field(factors, "ch_mult", self.ch_mult, "one factor of at least 1 per level")


@dataclass(frozen=True)
class LatentModelConfig:
    network: LatentNetworkConfig
    autoencoder: (
        str | None
    )  # diffusers:<name or folder>: a published AutoencoderKL; pixels: none; None: trained on public_data
    schedule: ScheduleConfig
    ema_rate: float
    sampler: DDIMConfig  # previews
    sampler_acc: DDIMConfig  # the images that are delivered
    ckpt: str | None  # checkpoint to start from
    ckpt_weights: str  # which of its weights: ema or raw

    def __post_init__(self) -> None:
        check_field(0 <= self.ema_rate < 1, "ema_rate", self.ema_rate, "in [0, 1)")
        check_field(self.ckpt_weights in ("ema", "raw"), "ckpt_weights", self.ckpt_weights, "ema or raw")
        for key in ("sampler", "sampler_acc"):
            steps, most = getattr(self, key).num_steps, self.schedule.num_timesteps
            check_field(steps <= most, f"{key}.num_steps", steps, f"at most schedule.num_timesteps = {most}")


@dataclass(frozen=True)
class LatentPretrainConfig(PretrainConfig):
    loss: NoiseLossConfig
    autoencoder: AutoencoderConfig


@dataclass(frozen=True)
class LatentTrainConfig(TrainConfig):
    loss: NoiseLossConfig
    lr_warmup_steps: int  # optimiser steps over which the learning rate rises linearly to its value

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "lr_warmup_steps")


class LatentDiffusion(DiffusionSynthesizer):
    """Base of DP-LDM and DP-LoRA, which differ in what the private stage trains. Their public stages are the same, and
    each can start from a checkpoint of the other.

    Two departures from the published code: the class embedder is trained in public pretraining too (there it is left
    out of the optimiser by mistake, so that public classes are random vectors), and stages begin from averaged
    weights, with which images are drawn (there an average is kept, but never used).
    """

    @dataclass(frozen=True)
    class Config(DiffusionSynthesizer.Config):
        model: LatentModelConfig
        pretrain: LatentPretrainConfig
        train: LatentTrainConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        self._require_autoencoder(config)
        self.latents = LatentSpace(config.pretrain.autoencoder, config.model.autoencoder, spec, runtime)
        self.sigmas = config.model.schedule.sigmas().to(runtime.device)
        super().__init__(config, spec, runtime)
        if config.model.ckpt is not None:
            state, _ = read_checkpoint(config.model.ckpt)
            self._load_autoencoder(state, f"model.ckpt: {config.model.ckpt}")

    @staticmethod
    def _require_autoencoder(config: Config) -> None:
        """Raise UserError where an autoencoder would have to be trained, but there are no public images."""
        public, model = config.public_data, config.model
        trained_elsewhere = model.ckpt is not None or model.autoencoder is not None
        check(
            has_public_images(public) or trained_elsewhere,
            "public_data.name",
            public.name,
            "a public set, on which the autoencoder is trained, unless model.autoencoder or model.ckpt is given",
        )

    @property
    def learns_from_public_images(self) -> bool:
        return super().learns_from_public_images or self.config.model.autoencoder is None

    # Seams

    @property
    def network_shape(self) -> tuple[int, int, int]:
        return self.latents.shape

    def _build_network(self, label_dim: int) -> nn.Module:
        shape, (channels, size, _) = self.config.model.network, self.latents.shape
        halvings = len(shape.ch_mult) - 1
        check(
            2**halvings <= size,
            "model.network.ch_mult",
            shape.ch_mult,
            f"one factor per level, and latents of {size} px cannot be halved {halvings} times",
        )
        sizes = level_sizes(size, len(shape.ch_mult))
        check(
            not shape.attn_resolutions or not set(shape.attn_resolutions).isdisjoint(sizes),
            "model.network.attn_resolutions",
            shape.attn_resolutions,
            f"empty, or name one of the levels' sizes in latent pixels: {', '.join(map(str, sizes))}",
        )
        return LatentUNet(
            latent_size=size,
            channels=channels,
            label_dim=label_dim,
            nf=shape.nf,
            ch_mult=shape.ch_mult,
            attn_resolutions=shape.attn_resolutions,
            num_res_blocks=shape.num_res_blocks,
            head_width=shape.head_width,
            context_dim=shape.context_dim,
        )

    def _make_loss(self, config: NoiseLossConfig, unconditional: bool = False) -> NoiseLoss:
        return NoiseLoss(config, self.sigmas, unconditional, self.runtime.autocast)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.latents.encode(images)

    def _encode_private(self, private: PrivateData) -> PrivateData:
        return private.map(self.latents.encode)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.latents.decode(latents)

    def _draw(
        self, network: nn.Module, config: DDIMConfig, labels: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        return sample_ddim(network, self.sigmas, config, self.network_shape, labels, rng)

    # Stages

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        self._book_inherited(private)  # first: snapshots of the autoencoder hold the network's weights too
        if public is not None:
            self.latents.fit(public.samples, flip=self._flips())
        super().pretrain(public, private)

    def _enter_stage(self, stage: str) -> int:
        step = super()._enter_stage(stage)
        self._set_learning_rate()
        return step

    def _finish_step(self, snapshot_freq: int) -> None:
        super()._finish_step(snapshot_freq)
        self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        """Of the next step of the private stage. The ramp counts optimiser steps; the published one counts physical
        batches, so that there it depends on how much memory the machine has."""
        config = self.config.train
        if self.stage == "train" and config.lr_warmup_steps:
            share = min(1.0, (self.step + 1) / config.lr_warmup_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = config.optim.params.lr * share

    # State

    def state_dict(self) -> dict:
        return {**super().state_dict(), "autoencoder": self.latents.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._load_autoencoder(state, "checkpoint")
        super().load_state_dict(state)

    def _load_autoencoder(self, state: dict, origin: str) -> None:
        if "autoencoder" not in state:
            raise UserError(f"{origin} holds no autoencoder; it must be one of DP-LDM or DP-LoRA")
        self.latents.load_state_dict(state["autoencoder"], origin)

    # --dry_run

    def public_costs(self, num_images: int) -> list[Cost]:
        return [*self.latents.costs(num_images, self.spec.image_shape), *super().public_costs(num_images)]

    def costs(self) -> list[Cost]:
        return [*self.latents.private_costs(self.spec.num_train, self.config.gen.data_num), *super().costs()]

    def remaining_share(self, cost: Cost) -> float:
        if cost.stage != "autoencoder":
            return super().remaining_share(cost)
        return 0.0 if self.latents.done else 1 - self.latents.step / cost.steps

    def parameter_counts(self) -> dict[str, int]:
        weights = sum(parameter.numel() for parameter in self.latents.autoencoder.parameters())
        return {"autoencoder": weights, **super().parameter_counts()}
