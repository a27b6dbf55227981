"""DP-Kernel: match the noisy mean embedding of a mixture of Gaussian kernels (after Jiang, Sun & Yang, NeurIPS 2023).

The published method adds a sample of a Gaussian process to the kernel mean of every private batch, 200,002 times. In
the published code that sample is a constant for the gradient: the generator's direction comes from the noise-free
kernels, and the noise moves no more than the sign and length of the step, which RMSprop then takes out. If drawing the
sample fails, training continues without noise. Generated images have the labels of the private batch. The method is
not private at any epsilon.

Here the same kernel, the mean of exp(-|x - x'|^2 / (2 s^2)) over `sigma_list` for images of equal labels, is written in
random Fourier features. Their mean over all private images is released once, with Gaussian noise; fitting the generator
to it is post-processing, with labels from a public distribution.
"""

from dataclasses import dataclass

from models.embedding.mean_embedding import EmbeddingSynthesizer, FitConfig, Schedule
from models.embedding.random_fourier import FeatureConfig, FourierEmbedding
from models.nn.generator import GeneratorConfig
from models.public.pretraining import PublicLabels
from models.synthesizer import Sections
from utils.sections import check_field, check_least


@dataclass(frozen=True)
class ModelConfig(FeatureConfig):
    sigma_list: list[float]  # bandwidths of the kernels on pixels in [-1, 1]; they share the features equally
    Generator: GeneratorConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self.sigma_list, "sigma_list", self.sigma_list, "at least one bandwidth")
        check_field(min(self.sigma_list) > 0, "sigma_list", self.sigma_list, "greater than 0")
        share = 2 * len(self.sigma_list)
        check_field(self.d_rff % share == 0, "d_rff", self.d_rff, f"a multiple of {share}: see sigma_list")


@dataclass(frozen=True)
class StepFitConfig(FitConfig):
    vis_step: int  # steps between decays of the learning rate, snapshots and grids of samples

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "vis_step")

    def schedule(self, num_steps: int) -> Schedule:
        return Schedule(num_steps, self.batch_size, self.lr, self.lr_decay, self.vis_step)


@dataclass(frozen=True)
class PretrainConfig(StepFitConfig, PublicLabels):
    n_epochs: int  # of (number of public images) // batch_size steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "n_epochs")


@dataclass(frozen=True)
class TrainConfig(StepFitConfig):
    max_iter: int  # steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "max_iter")


class DPKernel(EmbeddingSynthesizer):
    """The features are those of several Gaussian kernels; training counts in steps."""

    @dataclass(frozen=True)
    class Config(Sections):
        model: ModelConfig
        pretrain: PretrainConfig
        train: TrainConfig

    def _embedding(self) -> FourierEmbedding:
        config, spec = self.config.model, self.spec
        on_unit_pixels = [(bandwidth / 2) ** 2 for bandwidth in config.sigma_list]
        return FourierEmbedding(
            config, on_unit_pixels, image_size=spec.resolution, channels=spec.channels, runtime=self.runtime
        )

    def _pretraining(self, num_images: int) -> Schedule:
        config = self.config.pretrain
        return config.schedule(config.n_epochs * max(1, num_images // config.batch_size))

    def _training(self) -> Schedule:
        return self.config.train.schedule(self.config.train.max_iter)
