"""DP-FETA-Pro: warm-ups on central images and on a noisy spectrum, then DP-SGD (successor of Gong et al. 2025)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from data.spec import DataSpec, PublicData, Samples
from models.diffusion.synthesizer import DiffusionSynthesizer
from models.embedding.mean_embedding import MEAN_EMBEDDING, EmbeddingGenerator, EpochFitConfig
from models.embedding.random_fourier import FourierConfig, FourierEmbedding
from models.nn.generator import GeneratorConfig
from models.public.central_images import MEAN
from models.synthesizer import balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.draws import Draws
from utils.images import to_float, to_uint8
from utils.memory import require_memory
from utils.runtime import Runtime
from utils.sections import check_least, check_positive
from utils.timing import Cost

FREQUENCY = "frequency"


@dataclass(frozen=True)
class FrequencyConfig(FourierConfig):
    """The frequency stage. Its diffusion model has the optimiser and the loss of pretraining."""

    Generator: GeneratorConfig
    sigma: float  # noise multiplier of the mean embedding
    image_size: int  # pixels that the features and the generator see
    fit: EpochFitConfig  # of the generator to the noisy embedding
    data_num: int  # images that the generator draws for the diffusion model
    batch_size: int  # of these images, in training the diffusion model
    n_epochs: int  # passes over them; 0: no query for the embedding

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "sigma")
        check_least(self, 1, "image_size", "data_num", "batch_size")
        check_least(self, 0, "n_epochs")


class DPFETAPro(DiffusionSynthesizer):
    """DP-FETA with a second warm-up, on images of a generator that DP-MERF's noisy mean embedding has trained: first
    the spatial means, then the frequencies, then DP-SGD. The three are releases of one plan."""

    central_kind = MEAN

    @dataclass(frozen=True)
    class Config(DiffusionSynthesizer.Config):
        freq: FrequencyConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        self.has_frequency_stage = bool(config.pretrain.n_epochs and config.freq.n_epochs)
        self.learns_class_shares = self.has_frequency_stage
        super().__init__(config, spec, runtime)
        freq = config.freq
        require_memory("freq.data_num", freq.data_num, spec.image_shape)
        self.embedding = FourierEmbedding(
            freq, [freq.rff_sigma], image_size=freq.image_size, channels=spec.channels, runtime=runtime
        )
        self.merf = EmbeddingGenerator(
            freq.Generator, self.embedding, freq.image_size, spec.channels, spec.num_classes, runtime
        )
        self.noisy_embedding: torch.Tensor | None = None  # (num_classes, d_rff)

    def pretraining_plan(self) -> list[Release]:
        embedding = [Release(MEAN_EMBEDDING, self.config.freq.sigma)] if self.has_frequency_stage else []
        return [*super().pretraining_plan(), *embedding]

    def _stages(self) -> dict[str, object]:
        stages = super()._stages()
        train = stages.pop("train")
        freq = self.config.freq
        section = replace(self.config.pretrain, batch_size=freq.batch_size, n_epochs=freq.n_epochs)
        return {**stages, FREQUENCY: section, "train": train}

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        super().pretrain(public, private)
        if not self.has_frequency_stage or self._is_completed(FREQUENCY):
            return
        if self.noisy_embedding is None:  # otherwise a resumed run has it from its checkpoint
            self.noisy_embedding = self.embedding.noisy_mean(private)
            self.runtime.snapshot("pretrain")
        self._fit_public(FREQUENCY, self._generated(), self._pretraining_loss(), self._enlarged)

    def _generated(self) -> Samples:
        """What the generator draws after it was fitted to the noisy embedding: post-processing, and the same again in
        a resumed run."""
        freq = self.config.freq
        self.merf.fit("frequency generator", self.noisy_embedding, freq.fit.schedule(self.spec.num_train))
        labels = balanced_labels(freq.data_num, self.spec.num_classes)
        return Samples(self.merf.draw(labels, self.config.gen.batch_size, "frequency images"), labels)

    def _enlarged(self, images: np.ndarray, _: Draws) -> np.ndarray:
        """The generator's images at the resolution of the private ones; uint8. Per batch, for memory's sake."""
        size = self.spec.resolution
        if images.shape[-1] == size:
            return images
        return to_uint8(F.interpolate(to_float(images), size=(size, size), mode="bilinear", antialias=True))

    def state_dict(self) -> dict:
        return {**super().state_dict(), "noisy_embedding": self.noisy_embedding}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        embedding = state["noisy_embedding"]
        self.noisy_embedding = None if embedding is None else embedding.to(self.runtime.device)

    def _warm_ups(self) -> list[tuple[str, int]]:
        frequency = [(FREQUENCY, self.config.freq.data_num)] if self.has_frequency_stage else []
        return [*super()._warm_ups(), *frequency]

    def costs(self) -> list[Cost]:
        if not self.has_frequency_stage:
            return super().costs()
        schedule = self.config.freq.fit.schedule(self.spec.num_train)
        return [self.merf.cost("frequency generator", schedule, self.spec.num_train), *super().costs()]

    def parameter_counts(self) -> dict[str, int]:
        return {**super().parameter_counts(), "generator of the frequency stage": self.merf.num_parameters()}
