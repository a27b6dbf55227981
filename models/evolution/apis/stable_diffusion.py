"""Stable Diffusion, and whatever else the diffusers library can turn text and images into images with.

Random images come from the prompt of their class. A variation is image to image with the same prompt; its degree is the
strength in (0, 1], the share of the denoising steps that are taken: 1 is a new image. Needs pip install diffusers
transformers; the library fetches weights on its own where `source` is no folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.convert import resized
from data.spec import DataSpec, PublicData
from models.evolution.apis.api import Candidates, ImageAPI
from models.evolution.apis.prompts import check_prompt, class_prompts
from models.fitting.batches import in_batches
from utils.errors import Unavailable, UserError
from utils.runtime import Runtime
from utils.sections import check_field, check_least

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class StableDiffusionAPIConfig:
    source: str  # name on the Hugging Face hub, or folder, of a text-to-image pipeline
    prompt: str  # "{}" stands for the class name
    prompts: list[str] | None  # one per class; None: `prompt`
    resolution: int  # pixels at which the pipeline works
    image_size: int  # pixels of the candidates that are kept, and varied again
    num_steps: int  # denoising steps of a random image
    guidance_scale: float
    batch_size: int  # images per forward pass

    def __post_init__(self) -> None:
        check_prompt("prompt", self.prompt)
        check_least(self, 1, "resolution", "image_size", "num_steps", "batch_size")
        check_field(self.resolution % 8 == 0, "resolution", self.resolution, "a multiple of 8")
        check_least(self, 0, "guidance_scale")


class StableDiffusionAPI(ImageAPI):
    """A text-to-image pipeline, and the image-to-image pipeline with the same networks."""

    Config = StableDiffusionAPIConfig

    def __init__(self, config: StableDiffusionAPIConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self.prompts = class_prompts(config.prompt, config.prompts, spec)
        self._pipelines = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.config.image_size, self.config.image_size

    def check_degree(self, degree: float) -> None:
        steps = self.config.num_steps
        if not 1 / steps <= degree <= 1:
            raise UserError(
                f"{degree:g} is not allowed for api stable_diffusion; it is the strength of image to image and "
                f"must be from {1 / steps:g} (one step of {steps}) to 1"
            )

    def require_ready(self) -> None:
        _pipeline_classes()  # weights show when they are loaded, which takes long

    def prepare(self, public: PublicData | None) -> None:
        """Nothing to learn; what is missing shows now."""
        self.pipelines()

    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        pipeline, _ = self.pipelines()
        size = self.config.resolution

        def draw(rows: slice) -> np.ndarray:
            return self._run(pipeline, labels, rows, rng_name, width=size, height=size)

        return Candidates(self._in_batches(len(labels), draw, "random images (stable_diffusion)"), labels)

    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        _, pipeline = self.pipelines()

        def draw(rows: slice) -> np.ndarray:
            shown = torch.from_numpy(resized(candidates.images[rows], self.config.resolution)).float() / 255
            return self._run(pipeline, candidates.labels, rows, rng_name, image=shown, strength=degree)

        images = self._in_batches(len(candidates), draw, f"variations of strength {degree:g}")
        return Candidates(images, candidates.labels)

    def _in_batches(self, count: int, draw: Callable[[slice], np.ndarray], description: str) -> np.ndarray:
        return in_batches(count, self.config.batch_size, draw, self.image_shape, description)

    @torch.no_grad()
    def _run(
        self,
        pipeline: "DiffusionPipeline",
        labels: np.ndarray,
        rows: slice,
        rng_name: str,
        **arguments: object,
    ) -> np.ndarray:
        """(B, 3, image_size, image_size) uint8 for the classes of these rows."""
        found = pipeline(
            prompt=[self.prompts[label] for label in labels[rows]],
            num_inference_steps=self.config.num_steps,
            guidance_scale=self.config.guidance_scale,
            generator=self.runtime.rng(f"{rng_name} {rows.start}"),
            output_type="np",
            **arguments,
        ).images
        pixels = (np.asarray(found) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
        return resized(np.ascontiguousarray(pixels), self.config.image_size)

    def pipelines(self) -> tuple:
        """(text to image, image to image), loaded at the first call. Raises UserError with what is missing."""
        if self._pipelines is None:
            self._pipelines = self._load()
        return self._pipelines

    def _load(self) -> tuple:
        to_images, to_variations = _pipeline_classes()
        source = self.config.source
        try:
            text = to_images.from_pretrained(source)
            text.to(
                self.runtime.device, torch.bfloat16 if self.runtime.precision == "bf16" else torch.float32
            )
            image = to_variations.from_pipe(text)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"model.api_params.stable_diffusion.source: {source} cannot be loaded ({reason})"
            ) from error
        for pipeline in (text, image):
            pipeline.set_progress_bar_config(disable=True)
        return text, image


def _pipeline_classes() -> tuple[type, type]:
    """Those of text to image and of image to image."""
    try:
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
    except (ImportError, RuntimeError) as error:  # the library wraps what its own imports raise
        raise Unavailable(
            "model.api=stable_diffusion needs the diffusers library; pip install diffusers transformers"
        ) from error
    return AutoPipelineForText2Image, AutoPipelineForImage2Image
