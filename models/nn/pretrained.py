"""Published networks, loaded through the diffusers library, which is an optional package: pip install diffusers.

A network is named "diffusers:<name on the Hugging Face hub, or folder>". A folder may hold the network itself or a
pipeline with the network in its usual place ("vae", "unet"). Legend: B batch, Z latent channels, h w latent pixels.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from data.spec import DataSpec
from models.nn.autoencoder import Posterior
from utils.errors import UserError
from utils.runtime import log

PREFIX = "diffusers:"


class PretrainedAutoencoder(nn.Module):
    """A published AutoencoderKL with the interface of `Autoencoder`. Grey images are shown to it as grey colour images,
    and decoded to the mean of the colours where it works in colour. `scale` brings its latents to deviation 1."""

    def __init__(self, model: nn.Module, spec: DataSpec) -> None:
        super().__init__()
        self.model = model
        self.channels = spec.channels
        self.scale = model.config.scaling_factor
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        if spec.resolution % factor:
            raise UserError(
                f"model.autoencoder: it divides the resolution by {factor}, and {spec.resolution} px is no "
                f"multiple of that"
            )
        self.latent_shape = (model.config.latent_channels, *[spec.resolution // factor] * 2)

    def encode(self, images: torch.Tensor) -> Posterior:
        shown = images.expand(-1, self.model.config.in_channels, -1, -1)
        posterior = self.model.encode(shown).latent_dist
        return Posterior(posterior.mean, posterior.logvar)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self.model.decode(latents).sample
        return images if images.shape[1] == self.channels else images.mean(1, keepdim=True)


class PretrainedConditionalUNet(nn.Module):
    """A published UNet2DConditionModel as (latents (B, Z, h, w), timesteps (B,), labels (B,)) -> (B, Z, h, w).

    In place of a text it reads two tokens, the class and the null label, as `LatentUNet` does.
    """

    conditions = ("num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim")

    def __init__(self, model: nn.Module, label_dim: int) -> None:
        super().__init__()
        self.model = model
        self.null_label = label_dim
        self.label_embedding = nn.Embedding(label_dim + 1, model.config.cross_attention_dim)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens = torch.stack([labels, torch.full_like(labels, self.null_label)], dim=1)
        return self.model(latents, timesteps, self.label_embedding(tokens)).sample


class PretrainedUNet(nn.Module):
    """A published UNet2DModel as (latents (B, Z, h, w), timesteps (B,), labels (B,)) -> (B, Z, h, w).

    The class is a vector added to the timestep's. Of a class-conditional network the first rows of its own table are
    kept, one per class of this one; all other rows start as zero, at which the network is the published one.
    """

    conditions = ("class_embed_type",)

    def __init__(self, model: nn.Module, label_dim: int) -> None:
        super().__init__()
        self.model = model
        self.null_label = label_dim
        width = model.time_embedding.linear_2.out_features
        self.label_embedding = nn.Embedding(label_dim + 1, width)
        nn.init.zeros_(self.label_embedding.weight)
        if model.class_embedding is not None:
            known = model.class_embedding.weight.detach()[:label_dim]
            self.label_embedding.weight.data[: len(known)] = known
        model.class_embedding = nn.Identity()  # it is handed the vectors themselves

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(latents, timesteps, class_labels=self.label_embedding(labels)).sample


UNETS = {"UNet2DConditionModel": PretrainedConditionalUNet, "UNet2DModel": PretrainedUNet}


def load_autoencoder(source: str, spec: DataSpec) -> PretrainedAutoencoder:
    """Of model.autoencoder; UserError if there is none, or if it does not fit the images."""
    model = _load("model.autoencoder", source, ["AutoencoderKL"], "vae")
    if model.config.in_channels not in (spec.channels, 3):
        raise UserError(
            f"model.autoencoder: {source} takes {model.config.in_channels} channels, the images have {spec.channels}"
        )
    return PretrainedAutoencoder(model, spec)


def load_unet(source: str, latent_shape: tuple[int, int, int], label_dim: int) -> nn.Module:
    """The network of model.backbone; UserError if there is none, if it does not fit the latents (Z, h, w), or if it
    needs a condition other than a class."""
    model = _load("model.backbone", source, UNETS, "unet")
    wrapper = UNETS[type(model).__name__]
    for end in ("in_channels", "out_channels"):
        if (found := model.config[end]) != latent_shape[0]:
            raise UserError(
                f"model.backbone: {source} has {end} {found}, the autoencoder's latents have {latent_shape[0]} channels"
            )
    for condition in wrapper.conditions:
        if (found := model.config.get(condition)) is not None:
            raise UserError(
                f"model.backbone: {source} expects a condition that no class can give ({condition}={found})"
            )
    halvings = 2 ** (len(model.config.block_out_channels) - 1)
    if latent_shape[-1] % halvings:
        raise UserError(
            f"model.backbone: {source} needs latents whose pixels {halvings} divides; these have {latent_shape[-1]}"
        )
    return wrapper(model, label_dim)


def require_schedule(source: str, schedule: dict[str, object]) -> None:
    """Raise UserError if a published network states a training noise other than `schedule`, which names the values of
    model.schedule, or a prediction other than the one there."""
    published = _published_schedule(source.removeprefix(PREFIX))
    if not published:
        log.info(
            f"model.backbone: {source} does not state its noise; model.schedule must be what it was trained with"
        )
    names = {"num_timesteps": "num_train_timesteps", "type": "beta_schedule"}
    for key, value in schedule.items():
        if (found := published.get(names.get(key, key), value)) != value:
            raise UserError(
                f"model.schedule.{key}: {value} is not allowed; {source} was trained with {found}"
            )
    if (target := published.get("prediction_type", "epsilon")) != "epsilon":
        raise UserError(
            f"model.backbone: {source} predicts '{target}'; it must predict the noise ('epsilon')"
        )


def _published_schedule(name: str) -> dict[str, object]:
    """The configuration of a pipeline's scheduler; empty where there is none."""
    from diffusers import DDPMScheduler

    for place in ("scheduler", None):  # None: in old pipelines of one network
        with contextlib.suppress(OSError):
            return DDPMScheduler.load_config(name, subfolder=place)
    return {}


def _load(key: str, source: str, kinds: Collection[str], subfolder: str) -> nn.Module:
    """The network, of one of these classes of the diffusers library, in float32 and eval mode."""
    name = source.removeprefix(PREFIX)
    if name == source or not name:
        others = "null, pixels" if key == "model.autoencoder" else "null"
        raise UserError(f"{key}: {source} is not allowed; it must be {others} or {PREFIX}<name or folder>")
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{key}: {source} needs the diffusers library; pip install diffusers") from error
    place = {"subfolder": subfolder if (Path(name) / subfolder).is_dir() else None}
    try:
        kind = diffusers.AutoencoderKL.load_config(name, **place).get(
            "_class_name"
        )  # any class reads any config
        model = getattr(diffusers, kind).from_pretrained(name, **place) if kind in kinds else None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}: {source} is not readable as {' or '.join(kinds)} ({reason[:150]})"
        ) from error
    if model is None:
        raise UserError(f"{key}: {source} is of class {kind}; it must be {' or '.join(kinds)}")
    return model.float().eval()
