"""OpenAI's ImageNet diffusion networks as image generators: those that Private Evolution was published with.

The weights are fetched by the user (docs/private_evolution.md) and load by name. Sampling is deterministic DDIM (Song
et al. 2021, arXiv:2010.02502) over `timestep_respacing`. The degree of a variation is the number of these timesteps
that are left out at the noisy end: 0 is almost a new image.
"""

import pickle
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.spec import DataSpec, PublicData
from models.diffusion.timesteps import SCHEDULES, respaced
from models.evolution.apis.api import Candidates, ImageAPI
from models.fitting.batches import in_batches
from models.fitting.stages import load_weights
from models.nn.guided_unet import GuidedUNet, GuidedUNetConfig
from utils.errors import MissingWeights, UserError
from utils.images import to_float, to_uint8
from utils.places import path_of
from utils.runtime import Runtime
from utils.sections import check_field, check_least
from utils.seeding import numpy_rng

MODEL_LABEL = "imagenet label"


@dataclass(frozen=True)
class GuidedDiffusionAPIConfig:
    model_path: str | None  # the weights file; None: under its published name in --weights_root
    network: GuidedUNetConfig
    diffusion_steps: int  # timesteps that the network was trained with
    noise_schedule: str  # cosine or linear
    timestep_respacing: str  # which of them are visited: see models/diffusion/timesteps.py
    batch_size: int  # images per forward pass

    def __post_init__(self) -> None:
        check_field(
            self.noise_schedule in SCHEDULES,
            "noise_schedule",
            self.noise_schedule,
            f"one of {', '.join(SCHEDULES)}",
        )
        check_least(self, 2, "diffusion_steps")
        check_least(self, 1, "batch_size")
        self.timesteps()

    def timesteps(self) -> list[int]:
        """The visited ones, increasing."""
        return respaced(self.diffusion_steps, self.timestep_respacing)


class ImprovedDiffusionAPI(ImageAPI):
    """The class-conditional ImageNet network at 64 px of improved-diffusion. Each image has a random ImageNet label,
    which its variations keep. Images are colour, whatever the private ones are."""

    Config = GuidedDiffusionAPIConfig
    name = "improved_diffusion"
    WEIGHTS = "imagenet64_cond_270M_250K.pt"
    SOURCE = "https://openaipublic.blob.core.windows.net/diffusion/march-2021/imagenet64_cond_270M_250K.pt"

    def __init__(self, config: GuidedDiffusionAPIConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self._network: GuidedUNet | None = None
        self._timesteps = config.timesteps()
        self._alpha_bar = SCHEDULES[config.noise_schedule](config.diffusion_steps)[self._timesteps].tolist()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.config.network.image_size
        return 3, size, size

    def check_degree(self, degree: float) -> None:
        most = len(self._timesteps) - 1
        if degree != int(degree) or not 0 <= degree <= most:
            raise UserError(
                f"{degree:g} is not allowed for api {self.name}; it must be a whole number from 0 to {most}"
            )

    def require_ready(self) -> None:
        self._weights_file()

    def prepare(self, public: PublicData | None) -> None:
        """Nothing to learn; missing weights show now."""
        self.network()

    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        model_labels = self._model_labels(len(labels), rng_name)

        def draw(rows: slice) -> np.ndarray:
            noise = self._noise(rows, f"{rng_name} {rows.start}")
            return self._denoised(noise, len(self._timesteps), model_labels[rows])

        return Candidates(
            self._in_batches(len(labels), draw, f"random images ({self.name})"),
            labels,
            {MODEL_LABEL: model_labels},
        )

    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        model_labels = candidates.info[MODEL_LABEL]
        left = len(self._timesteps) - int(degree)

        def draw(rows: slice) -> np.ndarray:
            images = to_float(candidates.images[rows], self.runtime.device)
            kept, noise = self._alpha_bar[left - 1], self._noise(rows, f"{rng_name} {rows.start}")
            return self._denoised(kept**0.5 * images + (1 - kept) ** 0.5 * noise, left, model_labels[rows])

        images = self._in_batches(len(candidates), draw, f"variations of degree {degree:g}")
        return Candidates(images, candidates.labels, candidates.info)

    def _in_batches(self, count: int, draw: Callable[[slice], np.ndarray], description: str) -> np.ndarray:
        return in_batches(count, self.config.batch_size, draw, self.image_shape, description)

    def _model_labels(self, count: int, rng_name: str) -> np.ndarray:
        """(count,) int64 labels of the network; 0 where it knows none."""
        rng = numpy_rng(self.runtime.seed, f"{rng_name} model labels")
        return rng.integers(self.config.network.num_classes or 1, size=count)

    def _noise(self, rows: slice, stream: str) -> torch.Tensor:
        shape = (rows.stop - rows.start, *self.image_shape)
        return torch.randn(shape, generator=self.runtime.rng(stream), device=self.runtime.device)

    @torch.no_grad()
    def _denoised(self, x: torch.Tensor, num_timesteps: int, model_labels: np.ndarray) -> np.ndarray:
        """DDIM (equation 12, eta = 0) from the noisiest of the first `num_timesteps` visited timesteps to an image.

        The estimate of the clean image is clipped to its range; the next step uses the noise that fits the clipped one.
        """
        network, labels = self.network(), torch.from_numpy(model_labels).to(x.device)
        labels = None if self.config.network.num_classes is None else labels
        for step in reversed(range(num_timesteps)):
            kept, kept_next = self._alpha_bar[step], self._alpha_bar[step - 1] if step else 1.0
            timesteps = torch.full((len(x),), self._timesteps[step], device=x.device)
            with self.runtime.autocast():
                noise = network(x, timesteps, labels)[:, :3].float()
            clean = ((x - (1 - kept) ** 0.5 * noise) / kept**0.5).clamp(-1, 1)
            noise = (x - kept**0.5 * clean) / (1 - kept) ** 0.5
            x = kept_next**0.5 * clean + (1 - kept_next) ** 0.5 * noise
        return to_uint8(x)

    def network(self) -> GuidedUNet:
        """The published network, loaded at the first call. Raises MissingWeights with the command that fetches it."""
        if self._network is None:
            with torch.device("meta"):
                network = GuidedUNet(self.config.network)
            path = self._weights_file()
            load_weights(network.to_empty(device="cpu"), _read_weights(path, self.name), str(path))
            self._network = self.runtime.place(network).eval().requires_grad_(False)
        return self._network

    def _weights_file(self) -> Path:
        key, given = f"model.api_params.{self.name}.model_path", self.config.model_path
        path = path_of(given, key) if given else self.runtime.weights_root / self.WEIGHTS
        if not path.is_file():
            raise MissingWeights(
                f"{key}: no weights file {path}; fetch it: "
                f"curl --create-dirs -o {shlex.quote(str(path))} {self.SOURCE}"
            )
        return path

    def parameter_counts(self) -> dict[str, int]:
        with torch.device("meta"):
            return {"UNet": sum(p.numel() for p in GuidedUNet(self.config.network).parameters())}


class GuidedDiffusionAPI(ImprovedDiffusionAPI):
    """The class-conditional ImageNet network at 128 px of guided-diffusion, used without guidance."""

    name = "guided_diffusion"
    WEIGHTS = "128x128_diffusion.pt"
    SOURCE = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/128x128_diffusion.pt"


def _read_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a weights file by name; it may hold nothing else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"model.api_params.{name}.model_path: {path} is not readable ({reason})") from error
