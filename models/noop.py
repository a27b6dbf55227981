"""Noise: uniform random images. It learns nothing and spends nothing: the dummy that tests the pipeline."""

from dataclasses import dataclass

import numpy as np

from data.spec import Samples
from models.synthesizer import Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.sections import GenConfig
from utils.seeding import numpy_rng


class Noise(Synthesizer):
    @dataclass(frozen=True)
    class Config:
        gen: GenConfig

    def privacy_plan(self) -> list[Release]:
        return []

    def train(self, private: PrivateData) -> None:
        """Nothing to learn."""

    def generate(self, num_samples: int) -> Samples:
        rng = numpy_rng(self.runtime.seed, "noise images")
        images = rng.integers(0, 256, (num_samples, *self.spec.image_shape), dtype=np.uint8)
        return Samples(images, balanced_labels(num_samples, self.spec.num_classes))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
