"""DP-MERF: match a noisy mean embedding of random Fourier features (Harder et al., AISTATS 2021).

Where the published benchmark's code differs:
- Its labels of generated images are uniform while the embedding carries the classes' true shares, so that small classes
  are fitted to too short a vector. Here a constant feature releases the shares together with the rest.
- It compares the mean of a batch with the embedding as if the batch were infinite, and draws labels independently.
  Here the estimate is unbiased and a batch holds equally many images of every label.
"""

from dataclasses import dataclass

from models.embedding.mean_embedding import EmbeddingSynthesizer, EpochFitConfig, Schedule
from models.embedding.random_fourier import FourierConfig, FourierEmbedding
from models.nn.generator import GeneratorConfig
from models.public.pretraining import PublicLabels
from models.synthesizer import Sections


@dataclass(frozen=True)
class ModelConfig(FourierConfig):
    Generator: GeneratorConfig


@dataclass(frozen=True)
class PretrainConfig(EpochFitConfig, PublicLabels):
    """A fit to public images, and the use of their labels."""


class DPMERF(EmbeddingSynthesizer):
    """The features are those of one Gaussian kernel; training counts in epochs."""

    @dataclass(frozen=True)
    class Config(Sections):
        model: ModelConfig
        pretrain: PretrainConfig
        train: EpochFitConfig

    def _embedding(self) -> FourierEmbedding:
        config, spec = self.config.model, self.spec
        return FourierEmbedding(
            config,
            [config.rff_sigma],
            image_size=spec.resolution,
            channels=spec.channels,
            runtime=self.runtime,
        )

    def _pretraining(self, num_images: int) -> Schedule:
        return self.config.pretrain.schedule(num_images)

    def _training(self) -> Schedule:
        return self.config.train.schedule(self.spec.num_train)
