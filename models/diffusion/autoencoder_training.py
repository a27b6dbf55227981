"""Training of the autoencoder of latent diffusion on public images (Rombach et al. 2022, arXiv:2112.10752, appendix
G.1): absolute error, perceptual distance, KL divergence, and from some step on a patch discriminator, whose weight
follows the gradients (Esser et al. 2021, arXiv:2012.09841, equation 7).

Legend: B batch, C H W pixels.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.nn.autoencoder import Posterior
from models.nn.patch_discriminator import PatchDiscriminator, generator_loss, hinge_loss
from models.nn.perceptual import PerceptualDistance
from utils import distributed
from utils.draws import Draws
from utils.runtime import Runtime
from utils.sections import check_field, check_least, check_positive

BETAS = (0.5, 0.9)  # of both Adam optimisers


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
    perceptual_weight: float  # of LPIPS, against the mean absolute error; 0: none
    adversarial_weight: float  # of the discriminator's gradient, in units of the other terms'; 0: none
    adversarial_start: int  # step at which the discriminator sets in

    def __post_init__(self) -> None:
        check_least(self, 1, "ch", "latent_channels", "batch_size", "snapshot_freq")
        check_positive(self, "lr")
        check_least(
            self, 0, "kl_weight", "perceptual_weight", "adversarial_weight", "adversarial_start", "n_epochs"
        )
        factors = len(self.ch_mult) > 0 and min(self.ch_mult) > 0
        check_field(factors, "ch_mult", self.ch_mult, "one factor of at least 1 per level")


def rebuild(
    autoencoder: nn.Module, images: torch.Tensor, rng: Draws, runtime: Runtime
) -> tuple[torch.Tensor, Posterior]:
    """(B, C, H, W) -> the images decoded from draws of their posterior, and the posterior."""
    with runtime.autocast():
        posterior: Posterior = autoencoder.encode(images)
        noise = rng.normal(*posterior.mean.shape[1:])
        return autoencoder.decode(posterior.sample(noise)).float(), posterior


class AutoencoderTraining:
    """The steps of one autoencoder's training. Raises Unavailable before the first one if LPIPS is not available."""

    def __init__(
        self, autoencoder: nn.Module, config: AutoencoderConfig, image_shape: tuple, runtime: Runtime
    ) -> None:
        self.config, self.runtime = config, runtime
        self.autoencoder = autoencoder.requires_grad_(True)
        self.optimizer = torch.optim.Adam(autoencoder.parameters(), lr=config.lr, betas=BETAS)
        channels, size, _ = image_shape
        self.perceptual = self.discriminator = None
        if config.perceptual_weight:
            self.perceptual = runtime.place(PerceptualDistance())
        if config.adversarial_weight:
            with runtime.seeded("patch discriminator"):
                self.discriminator = runtime.place(PatchDiscriminator(size, channels))
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.lr, betas=BETAS
            )

    def step(self, index: int, images: torch.Tensor, rng: Draws, batch_size: int) -> None:
        """Step number `index`: `images` (B, C, H, W), maybe none, are this process's part of a batch of batch_size."""
        adversarial = self.discriminator is not None and index >= self.config.adversarial_start
        rebuilt, losses = self.losses(images, rng)
        loss = losses.sum() / batch_size
        if adversarial:
            loss = loss + self._adversarial_term(loss, rebuilt, batch_size)
        self._descend(self.optimizer, loss)
        if adversarial:
            error = hinge_loss(self._scores(images), self._scores(rebuilt.detach()))
            self._descend(self.discriminator_optimizer, error.sum() / batch_size)

    def losses(self, images: torch.Tensor, rng: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> the images rebuilt, and per image (B,) mean absolute error + perceptual_weight * LPIPS +
        kl_weight * KL / pixels."""
        rebuilt, posterior = rebuild(self.autoencoder, images, rng, self.runtime)
        error = (rebuilt - images).abs().flatten(1).mean(1)
        pixels = images.shape[1:].numel()
        losses = error + self.config.kl_weight / pixels * posterior.divergence()
        if self.perceptual is not None:
            losses = losses + self.config.perceptual_weight * self.perceptual(images, rebuilt)
        return rebuilt, losses

    def _adversarial_term(self, loss: torch.Tensor, rebuilt: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The discriminator's term, scaled to a gradient of adversarial_weight times that of `loss` in the last layer.

        The norms are those of the whole batch, whatever share of it this process has.
        """
        fooling = generator_loss(self._scores(rebuilt)).sum() / batch_size
        last = self.autoencoder.decoder[-1].weight
        own = torch.stack([torch.autograd.grad(term, last, retain_graph=True)[0] for term in (loss, fooling)])
        of_loss, of_fooling = distributed.concatenate(own[None]).sum(0).flatten(1).norm(dim=1)
        return self.config.adversarial_weight * (of_loss / (of_fooling + 1e-4)).clamp(max=1e4) * fooling

    def _scores(self, images: torch.Tensor) -> torch.Tensor:
        with self.runtime.autocast():
            return self.discriminator(images).float()

    def _descend(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        parameters = optimizer.param_groups[0]["params"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.sum_gradients(parameters)
        optimizer.step()

    def state_dict(self) -> dict:
        """All but the autoencoder's weights."""
        state = {"optimizer": self.optimizer.state_dict()}
        if self.discriminator is not None:
            state |= {
                "discriminator": self.discriminator.state_dict(),
                "judging": self.discriminator_optimizer.state_dict(),
            }
        return state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["judging"])
