"""The space in which latent diffusion works: an autoencoder trained on public images, or a published one.

Private images are encoded to the mean of the posterior. The published code draws from the posterior instead, which
needs randomness that must be as secret as the noise; the KL weight of 1e-6 keeps the posterior so narrow that the two
hardly differ. Public images are encoded in the same way. Legend: B batch, Z latent channels, h w latent pixels.
"""

import numpy as np
import torch

from data.spec import DataSpec, Samples
from models.diffusion.autoencoder_training import AutoencoderConfig, AutoencoderTraining, rebuild
from models.diffusion.cost import warm_up_cost
from models.fitting.stages import load_weights
from models.nn.autoencoder import Autoencoder, Pixels
from models.nn.perceptual import SMALLEST
from models.nn.unet import level_sizes
from models.public.batches import public_batches, randomly_flipped
from utils import distributed
from utils.errors import UserError
from utils.images import to_float
from utils.runtime import Runtime
from utils.sections import check
from utils.seeding import numpy_rng
from utils.timing import Cost, batch_rows, seconds_of

PIXELS_AT_ONCE = 2**20  # bounds the memory that encoding and decoding take
PIXELS = "pixels"  # the source that is no autoencoder
SCALED_BY = 2048  # public images whose latents set the scale


class LatentSpace:
    """Encodes images to latents of standard deviation about 1, and back.

    The scale is learnt with the autoencoder, from public latents: diffusion ends in noise of the scale 1 whatever the
    latents' own is. (The published code takes them as they come.) `source`: "diffusers:<name or folder>" takes a
    published autoencoder and trains none, "pixels" has none.
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
        self.image_shape = spec.image_shape
        self.training: AutoencoderTraining | None = None  # while it lasts
        trains_with_lpips = not self.done and config.n_epochs and config.perceptual_weight
        check(
            not trains_with_lpips or spec.resolution >= SMALLEST,
            "pretrain.autoencoder.perceptual_weight",
            config.perceptual_weight,
            f"0 for images of {spec.resolution} px; LPIPS needs {SMALLEST}",
        )

    def _build(self, spec: DataSpec) -> torch.nn.Module:
        if self.source == PIXELS:
            return Pixels(spec.image_shape)
        if self.source is not None:
            from models.nn.pretrained import load_autoencoder

            return load_autoencoder(self.source, spec)
        config, sizes = self.config, level_sizes(spec.resolution, len(self.config.ch_mult))
        check(
            not config.attn_resolutions or not set(config.attn_resolutions).isdisjoint(sizes),
            "pretrain.autoencoder.attn_resolutions",
            config.attn_resolutions,
            f"empty, or name one of the levels' sizes: {', '.join(map(str, sizes))}",
        )
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

    def fit(self, samples: Samples, flip: bool) -> None:
        """Train the autoencoder on public images, or continue its training in a resumed run. `flip`: mirror every other
        image."""
        if self.done or not self.config.n_epochs:
            return
        config = self.config
        self._start()
        batches = public_batches(
            "autoencoder",
            len(samples),
            config.batch_size,
            config.n_epochs,
            self.runtime.seed,
            start=self.step,
        )
        for step, batch in batches:
            own = distributed.share(len(batch))
            rng = self.runtime.draws(f"autoencoder {step}", len(batch))[own]
            images = to_float(samples.images[batch[own]], self.runtime.device)
            images = randomly_flipped(images, rng) if flip else images
            self.training.step(step, images, rng, len(batch))
            self.step += 1
            if self.step % config.snapshot_freq == 0:
                self.runtime.snapshot("pretrain")
        self._finish(samples)

    def costs(self, num_images: int, shape: tuple[int, int, int]) -> list[Cost]:
        """What `fit` takes on `num_images` images of this shape, without LPIPS and discriminator."""
        if self.done or not self.config.n_epochs:
            return []
        rows = batch_rows(shape[-1])
        images = torch.zeros(rows, *shape, device=self.runtime.device)
        self.autoencoder.requires_grad_(True)
        draws = self.runtime.draws("cost", rows)
        seconds = (
            seconds_of(lambda: rebuild(self.autoencoder, images, draws, self.runtime)[0].sum().backward())
            / rows
        )
        self.autoencoder.zero_grad(set_to_none=True)
        self.autoencoder.requires_grad_(False)
        return [warm_up_cost("autoencoder", self.config, num_images, seconds)]

    def private_costs(self, num_images: int, num_samples: int) -> list[Cost]:
        """Of encoding all private images once, and of decoding the samples."""
        rows = batch_rows(self.image_shape[-1])
        images = torch.zeros(rows, *self.image_shape, device=self.runtime.device)
        latents = torch.zeros(rows, *self.shape, device=self.runtime.device)
        encoding = seconds_of(lambda: self.encode(images)) / rows
        decoding = seconds_of(lambda: self.decode(latents)) / rows
        text = f"{num_images:,} private images to latents, {num_samples:,} samples back"
        return [Cost("latents", text, num_images * encoding + num_samples * decoding, part="generate")]

    def _start(self) -> None:
        if self.training is None:
            self.training = AutoencoderTraining(self.autoencoder, self.config, self.image_shape, self.runtime)

    def _finish(self, samples: Samples) -> None:
        self.autoencoder.requires_grad_(False)
        self.training, self.done = None, True
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
            "optimizer": None if self.training is None else self.training.state_dict(),
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
            self.training.load_state_dict(state["optimizer"])
