"""The space in which latent diffusion works: an autoencoder trained on public images, or a published one.

Private images are encoded to the mean of the posterior. The published code draws from the posterior instead, which
needs randomness that must be as secret as the noise; the KL weight of 1e-6 keeps the posterior so narrow that the two
hardly differ. Public images are encoded in the same way. Legend: B batch, Z latent channels, h w latent pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data.spec import DataSpec, Samples
from models.diffusion.checkpoint import load_weights
from models.nn.autoencoder import Autoencoder, Posterior
from utils import distributed
from utils.draws import Draws
from utils.errors import UserError
from utils.images import to_float
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field
from utils.seeding import numpy_rng

PIXELS_AT_ONCE = 2**20  # bounds the memory that encoding and decoding take
SCALED_BY = 2048  # public images whose latents set the scale


@dataclass(frozen=True)
class AutoencoderConfig:
    ch: int  # base width
    ch_mult: list[int]  # width factor per level, each level at half the resolution
    attn_resolutions: list[int]  # pixels of the levels that attend
    latent_channels: int
    batch_size: int
    n_epochs: int  # passes over the public images
    snapshot_freq: int  # steps between snapshots
    lr: float
    kl_weight: float  # of the KL divergence, against the sum of absolute errors

    def __post_init__(self) -> None:
        for field in ("ch", "latent_channels", "batch_size", "snapshot_freq"):
            check_field(getattr(self, field) > 0, field, getattr(self, field), "at least 1")
        check_field(self.lr > 0, "lr", self.lr, "greater than 0")
        check_field(self.kl_weight >= 0, "kl_weight", self.kl_weight, "0 or more")
        check_field(self.n_epochs >= 0, "n_epochs", self.n_epochs, "0 or more")
        check_field(len(self.ch_mult) > 0, "ch_mult", self.ch_mult, "one factor per level")


class LatentSpace:
    """Encodes images to latents of standard deviation about 1, and back.

    The scale is learnt with the autoencoder, from public latents: diffusion ends in noise of the scale 1 whatever the
    latents' own is. (The published code takes them as they come.) `source`: "diffusers:<name or folder>" takes a
    published autoencoder and trains none.
    """

    def __init__(
        self, config: AutoencoderConfig, source: str | None, spec: DataSpec, runtime: Runtime
    ) -> None:
        self.config, self.source, self.runtime = config, source, runtime
        self.autoencoder = runtime.place(self._build(spec)).requires_grad_(False)
        self.shape = self.autoencoder.latent_shape  # (Z, h, w)
        self.rows = max(1, PIXELS_AT_ONCE // spec.resolution**2)
        self.done = source is not None
        self.scale = self.autoencoder.scale if self.done else 1.0
        self.step = 0
        self.optimizer: torch.optim.Optimizer | None = None  # while it is trained

    def _build(self, spec: DataSpec) -> torch.nn.Module:
        if self.source is not None:
            from models.nn.pretrained import load_autoencoder

            return load_autoencoder(self.source, spec)
        config = self.config
        with self.runtime.seeded("autoencoder"):
            return Autoencoder(
                image_size=spec.resolution,
                channels=spec.channels,
                latent_channels=config.latent_channels,
                ch=config.ch,
                ch_mult=config.ch_mult,
                attn_resolutions=config.attn_resolutions,
            )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, Z, h, w) float32."""
        with self.runtime.autocast():
            parts = [self.autoencoder.encode(part).mean.float() for part in images.split(self.rows)]
        return torch.cat(parts) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, Z, h, w) -> (B, C, H, W) float32, nominally in [-1, 1]."""
        with self.runtime.autocast():
            parts = [
                self.autoencoder.decode(part).float() for part in (latents / self.scale).split(self.rows)
            ]
        return torch.cat(parts)

    def fit(self, samples: Samples, augment: Callable[[torch.Tensor, Draws], torch.Tensor]) -> None:
        """Train the autoencoder on public images, or what is left of it in a resumed run: L1 and KL.

        The published training adds a perceptual distance (LPIPS) and, after 50,000 steps, a patch discriminator.
        Both sharpen photographs; LPIPS needs weights that would have to be downloaded, and they are left out.
        """
        if self.done or not self.config.n_epochs:
            return
        batch_size = min(self.config.batch_size, len(samples))
        steps_per_epoch = len(samples) // batch_size
        total = self.config.n_epochs * steps_per_epoch
        self._start()
        for step in progress(range(self.step, total), "autoencoder", total=total, initial=self.step):
            epoch, position = divmod(step, steps_per_epoch)
            order = numpy_rng(self.runtime.seed, f"autoencoder order {epoch}").permutation(len(samples))
            batch = np.sort(order[position * batch_size : (position + 1) * batch_size])
            own = distributed.share(batch_size)
            rng = self.runtime.draws(f"autoencoder {step}", batch_size)[own]
            self.optimizer.zero_grad(set_to_none=True)
            if own.start < own.stop:
                images = to_float(samples.images[batch[own]], self.runtime.device)
                self._loss(augment(images, rng), rng).div(batch_size).backward()
            distributed.sum_gradients(self.autoencoder.parameters())
            self.optimizer.step()
            self.step += 1
            if self.step % self.config.snapshot_freq == 0:
                self.runtime.snapshot("pretrain")
        self._finish(samples)

    def _loss(self, images: torch.Tensor, rng: Draws) -> torch.Tensor:
        """Sum over images of mean absolute error + kl_weight * KL / pixels."""
        with self.runtime.autocast():
            posterior: Posterior = self.autoencoder.encode(images)
            rebuilt = self.autoencoder.decode(posterior.sample(rng.normal(*self.shape)))
        error = (rebuilt - images).abs().flatten(1).sum(1)
        return (error + self.config.kl_weight * posterior.divergence()).sum() / images[0].numel()

    def _start(self) -> None:
        self.autoencoder.requires_grad_(True)
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(
                self.autoencoder.parameters(), lr=self.config.lr, betas=(0.5, 0.9)
            )

    def _finish(self, samples: Samples) -> None:
        self.autoencoder.requires_grad_(False)
        self.optimizer, self.done = None, True
        chosen = numpy_rng(self.runtime.seed, "latent scale").permutation(len(samples))[:SCALED_BY]
        latents = self.encode(to_float(samples.images[np.sort(chosen)], self.runtime.device))
        self.scale = 1.0 / max(latents.std().item(), 1e-6)
        self.runtime.snapshot("pretrain")

    def state_dict(self) -> dict:
        """A published autoencoder is named, not copied."""
        return {
            "source": self.source,
            "done": self.done,
            "scale": self.scale,
            "step": self.step,
            "weights": None if self.source is not None else self.autoencoder.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict, origin: str = "checkpoint") -> None:
        if state["source"] != self.source:
            raise UserError(
                f"model.autoencoder: {self.source} is not allowed; the latents of {origin} are those of "
                f"{state['source'] or 'its own autoencoder (null)'}"
            )
        if self.source is None:
            load_weights(self.autoencoder, state["weights"], origin)
        self.done, self.scale, self.step = state["done"], state["scale"], state["step"]
        if state["optimizer"] is not None:
            self._start()
            self.optimizer.load_state_dict(state["optimizer"])
