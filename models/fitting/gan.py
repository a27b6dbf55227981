"""What the GANs share: pretraining on public images, the averaged generator that draws the samples, and checkpoints."""

import abc
import copy

import numpy as np
import torch
from torch import nn

from data.spec import DataSpec, Samples
from models.fitting.batches import in_batches
from models.fitting.stages import Staged
from models.public.pretraining import Pretraining
from models.synthesizer import Sections, Synthesizer, balanced_labels, preview_labels
from opacus_ext.accounting import Release
from utils.images import to_uint8
from utils.runtime import Runtime


class GAN(Staged, Synthesizer):
    """A generator and critics that are trained on public images first and on private images afterwards.

    `pretrains`: the configuration has public training steps. A constructor of a subclass creates `self.generator` and
    ends with `_start_stage("start")`.
    """

    selects_public_classes = True
    generator: nn.Module

    def __init__(self, config: Sections, spec: DataSpec, runtime: Runtime, *, pretrains: bool) -> None:
        super().__init__(config, spec, runtime)
        self.pretraining = Pretraining(config.public_data, config.pretrain.query, pretrains, spec, runtime)

    @abc.abstractmethod
    def _draw(self, generator: nn.Module, labels: torch.Tensor, stream: str) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1], one image per label (B,), with the randomness that `stream` names."""

    def pretraining_plan(self) -> list[Release]:
        return self.pretraining.plan()

    @property
    def learns_from_public_images(self) -> bool:
        return self.pretraining.used

    def settings_without_effect(self) -> dict[str, str]:
        return self.pretraining.settings_without_effect()

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        return Samples(self._sample(labels, "generate", show=True), labels)

    def _preview(self) -> Samples:
        labels = preview_labels(self.spec.num_classes)
        return Samples(self._sample(labels, f"preview {self.step}"), labels)

    def _sample(self, labels: np.ndarray, stream: str, show: bool = False) -> np.ndarray:
        """One image per label from the averaged weights: (N, C, H, W) uint8."""
        generator = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.ema.copy_to(generator)

        def draw(rows: slice) -> np.ndarray:
            batch = torch.from_numpy(labels[rows]).to(self.runtime.device)
            return to_uint8(self._draw(generator, batch, f"{stream} {rows.start}"))

        size, description = self.config.gen.batch_size, "generate" if show else None
        return in_batches(len(labels), size, draw, self.spec.image_shape, description)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "central": self.pretraining.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.pretraining.load_state_dict(state["central"])
