"""A diffusion network of this toolkit as an image generator: Private Evolution with a small own network.

Random images are samples. A variation is its candidate with noise, denoised again (SDEdit, Meng et al. 2022). Its
degree counts the steps of a cosine schedule of `sampler.num_steps` that are left out at the noisy end, as in the
published benchmark: the noise of that step is rounded down to the sampler's grid. 0 is almost a new image.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from data.spec import DataSpec, PublicData
from models.diffusion.checkpoint import chosen_weights, read_checkpoint, require_fit
from models.diffusion.config import ModelConfig, NetworkConfig
from models.diffusion.denoiser import Denoiser, guided
from models.diffusion.public_pretraining import PublicPretraining, PublicStageConfig
from models.diffusion.samplers import SamplerConfig, network_calls, noise_levels, resample, sample
from models.diffusion.timesteps import cosine_schedule, respaced
from models.evolution.apis.api import Candidates, ImageAPI
from models.fitting.batches import in_batches
from models.fitting.stages import load_weights
from opacus_ext.accounting import Release
from utils.errors import UserError
from utils.images import to_float, to_uint8
from utils.runtime import Runtime
from utils.sections import GenConfig, check_field, check_least
from utils.seeding import numpy_rng
from utils.timing import Cost, batch_rows, seconds_of

VARIATION_TIMESTEPS = 1000  # of the cosine schedule that degrees refer to
MODEL_LABEL = "model label"


@dataclass(frozen=True)
class DiffusionAPIConfig:
    ckpt: str | None  # checkpoint of a diffusion method; None: a network is pretrained on the public set
    ckpt_weights: str  # which of its weights: ema or raw
    network: NetworkConfig
    ema_rate: float
    sampler: SamplerConfig
    batch_size: int  # images per forward pass
    pretrain: PublicStageConfig  # without ckpt; `cond` also states how a checkpoint was pretrained

    def __post_init__(self) -> None:
        check_field(0 <= self.ema_rate < 1, "ema_rate", self.ema_rate, "in [0, 1)")
        check_field(self.ckpt_weights in ("ema", "raw"), "ckpt_weights", self.ckpt_weights, "ema or raw")
        check_least(self, 1, "batch_size")


class DiffusionAPI(ImageAPI):
    """A network of the diffusion family: from a checkpoint, or pretrained on the public set as PDP-Diffusion does.

    A network that was pretrained with public labels gets a random label for each image, which variations keep. One that
    was pretrained without labels gets the null label. One that was also trained on private images gets the private
    classes; the privacy cost of its checkpoint is part of the plan.
    """

    Config = DiffusionAPIConfig

    def __init__(self, config: DiffusionAPIConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        with runtime.seeded("network"):  # untrained; pretraining makes one with a row per public label
            self.network = runtime.place(config.network.make(spec.num_classes)).eval()
        self.is_ready = False
        self.knows_classes = False  # its labels are the private classes
        self.pretraining: PublicPretraining | None = None
        self._interrupted: dict | None = None  # pretraining that a resumed run continues
        self._inherited: list[Release] = []
        if config.ckpt is not None:
            checkpoint, self._inherited = read_checkpoint(config.ckpt)
            self._take(checkpoint, config.ckpt_weights, f"ckpt: {config.ckpt}")

    def check_degree(self, degree: float) -> None:
        most = self.config.sampler.num_steps - 1
        if degree != int(degree) or not 0 <= degree <= most:
            raise UserError(
                f"{degree:g} is not allowed for api diffusion; it must be a whole number from 0 to {most}"
            )

    @property
    def needs_public_images(self) -> bool:
        return self.config.ckpt is None

    def releases(self) -> list[Release]:
        return self._inherited

    def public_costs(self, num_images: int, num_classes: int) -> list[Cost]:
        return [] if self.is_ready else self._new_pretraining(num_classes).public_costs(num_images)

    def remaining_share(self, cost: Cost) -> float:
        return 1.0 if self._interrupted is None else 1 - self._interrupted["step"] / cost.steps

    def seconds_per_image(self) -> float:
        """Of a new image; a variation takes fewer calls of the network."""
        few, rows = dataclasses.replace(self.config.sampler, num_steps=2), batch_rows(self.spec.resolution)
        labels, rng = self._on_device(np.zeros(rows, np.int64)), self.runtime.rng("timing")
        seconds = seconds_of(lambda: sample(self._denoiser(), few, self.image_shape, labels, rng)) / rows
        return seconds * network_calls(self.config.sampler) / network_calls(few)

    def prepare(self, public: PublicData | None) -> None:
        if self.is_ready:
            return
        self.pretraining = self._new_pretraining(public.num_classes)
        if self._interrupted is not None:
            self.pretraining.load_state_dict(self._interrupted)
        self.pretraining.pretrain(public, None)
        self._take(self.pretraining.state_dict(), "ema", "pretraining")
        self.pretraining = self._interrupted = None

    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        model_labels = self._model_labels(labels, rng_name)
        denoiser, config = self._denoiser(), self.config.sampler

        def draw(rows: slice) -> np.ndarray:
            rng = self.runtime.rng(f"{rng_name} {rows.start}")
            with self.runtime.autocast():
                return to_uint8(
                    sample(denoiser, config, self.image_shape, self._on_device(model_labels[rows]), rng)
                )

        images = in_batches(
            len(labels), self.config.batch_size, draw, self.image_shape, "random images (diffusion)"
        )
        return Candidates(images, labels, {MODEL_LABEL: model_labels})

    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        model_labels = candidates.info[MODEL_LABEL]
        denoiser, config, first = self._denoiser(), self.config.sampler, self.first_level(degree)

        def draw(rows: slice) -> np.ndarray:
            images = to_float(candidates.images[rows], self.runtime.device)
            rng = self.runtime.rng(f"{rng_name} {rows.start}")
            with self.runtime.autocast():
                return to_uint8(
                    resample(denoiser, config, images, first, self._on_device(model_labels[rows]), rng)
                )

        images = in_batches(
            len(candidates),
            self.config.batch_size,
            draw,
            self.image_shape,
            f"variations of degree {degree:g}",
        )
        return Candidates(images, candidates.labels, candidates.info)

    def first_level(self, degree: float) -> int:
        """Number of the sampler's first noise level that is not above the noise of `degree`."""
        num_steps = self.config.sampler.num_steps
        kept = respaced(VARIATION_TIMESTEPS, str(num_steps))
        alpha_bar = float(cosine_schedule(VARIATION_TIMESTEPS)[kept[num_steps - 1 - int(degree)]])
        noise = (1 / alpha_bar - 1) ** 0.5
        levels = noise_levels(self.config.sampler)
        return next((index for index, level in enumerate(levels) if level <= noise), num_steps - 1)

    # The network

    def _new_pretraining(self, label_dim: int) -> PublicPretraining:
        config, sampler = self.config, self.config.sampler
        model = ModelConfig(config.network, config.ema_rate, sampler, sampler, ckpt=None, ckpt_weights="ema")
        gen = GenConfig(config.batch_size, config.batch_size, None, 0.5, "relabel")
        section = PublicPretraining.Config(model, config.pretrain, gen)
        return PublicPretraining(section, label_dim, self.spec, self.runtime)

    def _take(self, state: dict, weights: str, source: str) -> None:
        """Build the network with the chosen weights ("ema" or "raw") of a method's state."""
        self.knows_classes = state["private_labels"]
        require_fit(state, source, self.spec.image_shape, self.spec.num_classes if self.knows_classes else 0)
        self._build(state["label_dim"], chosen_weights(state, weights), source)

    def _build(self, label_dim: int, weights: dict[str, torch.Tensor], source: str) -> None:
        network = self.config.network.make(label_dim)
        load_weights(network, weights, source)
        self.network = self.runtime.place(network).eval().requires_grad_(False)
        self.is_ready = True

    def _denoiser(self) -> Denoiser:
        return guided(self.network, self.config.sampler.guid_scale)

    def _model_labels(self, labels: np.ndarray, rng_name: str) -> np.ndarray:
        """(N,) int64: the network's own label of every new image."""
        if self.knows_classes:
            return labels
        if not self.config.pretrain.cond:
            return np.full_like(labels, self.network.null_label)
        rng = numpy_rng(self.runtime.seed, f"{rng_name} model labels")
        return rng.integers(self.network.null_label, size=len(labels))

    def _on_device(self, labels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(labels).to(self.runtime.device)

    # State

    def state_dict(self) -> dict:
        if self.is_ready:
            return {
                "label_dim": self.network.null_label,
                "knows_classes": self.knows_classes,
                "weights": self.network.state_dict(),
            }
        return {} if self.pretraining is None else {"pretraining": self.pretraining.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._interrupted = state.get("pretraining")
        if "weights" in state:
            self.knows_classes = state["knows_classes"]
            self._build(state["label_dim"], state["weights"], "checkpoint")

    def parameter_counts(self) -> dict[str, int]:
        return {"UNet": sum(p.numel() for p in self.network.parameters())}
