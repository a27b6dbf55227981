"""DP-NTK: match a noisy mean embedding of neural tangent kernel features (Yang et al., UAI 2023, arXiv:2303.01687).

One release over all private images. Where the published benchmark's code differs:
- It embeds the first batch alone (2,500 or 5,000 images), which makes the noise on the mean 9 to 54 times larger. Here
  every image counts, and features are computed in closed form instead of by one backward pass per image.
- It compares the mean of every micro-batch with the embedding as if it were infinite, so that `n_splits` changes the
  objective. Here the estimate is unbiased: it takes products of images of different parts, as BatchNorm makes those of
  one part depend on each other. A part holds equally many images of every label.
- Its scheduler is called when the step is a multiple of `scheduler_interval`, which step 0 is: the learning rate is
  decayed once after the first step. Here it is decayed after every `scheduler_interval` steps.
- Its labels of generated images are uniform while the embedding carries the classes' true shares. Here a constant
  feature releases the shares together with the rest.
"""

from dataclasses import dataclass

from models.embedding.mean_embedding import EmbeddingSynthesizer, FitConfig, Schedule
from models.embedding.ntk import NTKConfig, NTKEmbedding
from models.nn.generator import GeneratorConfig
from models.public.pretraining import PublicLabels
from models.synthesizer import Sections
from utils.sections import check_field, check_least


@dataclass(frozen=True)
class ModelConfig(NTKConfig):
    Generator: GeneratorConfig


@dataclass(frozen=True)
class StepFitConfig(FitConfig):
    n_iter: int  # steps
    n_splits: int  # equal parts of a step, two in memory at a time; BatchNorm sees one of them
    scheduler_interval: int  # steps between decays of the learning rate
    snapshot_freq: int  # steps between snapshots, with a grid of samples

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "n_splits", "scheduler_interval", "snapshot_freq")
        least = 2 * self.n_splits
        check_field(self.batch_size >= least, "batch_size", self.batch_size, f"at least 2 n_splits = {least}")
        check_least(self, 0, "n_iter")

    def schedule(self) -> Schedule:
        learning = (self.lr, self.lr_decay, self.scheduler_interval)
        return Schedule(self.n_iter, self.batch_size, *learning, self.n_splits, self.snapshot_freq)


@dataclass(frozen=True)
class PretrainConfig(StepFitConfig, PublicLabels):
    """A fit to public images, and the use of their labels."""


class DPNTK(EmbeddingSynthesizer):
    """The features are the gradients of a random network; training counts in steps."""

    @dataclass(frozen=True)
    class Config(Sections):
        model: ModelConfig
        pretrain: PretrainConfig
        train: StepFitConfig

    def _embedding(self) -> NTKEmbedding:
        spec = self.spec
        num_outputs = max(spec.num_classes, self.config.public_data.n_classes or 0)
        return NTKEmbedding(self.config.model, spec.resolution, spec.channels, num_outputs, self.runtime)

    def _pretraining(self, num_images: int) -> Schedule:
        return self.config.pretrain.schedule()

    def _training(self) -> Schedule:
        return self.config.train.schedule()

    def parameter_counts(self) -> dict[str, int]:
        return {
            **super().parameter_counts(),
            "random network of the features": self.embedding.num_parameters(),
        }
