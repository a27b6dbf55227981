"""IDPS: a DP classifier from in-distribution public data (Park, Choi & Lee, CVPR 2024; published as DPTrainer).

A diffusion network that is trained on the public share of the data draws a pool of labelled images. A classifier is
trained on them without noise, and then with DP-SGD on the private images. The classifier is the product; the samples
come from the pool, and with gen.agree only those that the classifier labels alike.

Where the published code differs: it reports the best epoch on the test images, standardises pixels with statistics of
the whole training set, updates the average of the weights after every physical batch, and can steer the pool by a
classifier that has seen all private images. Here the last average is the product and is tested once, pixels are in
[-1, 1], the average is updated once per step, and the pool is not steered. The diffusion network has its full learning
rate from the first step; the published one raises it over the first 5 percent of training.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.samples_file import read_samples, write_samples
from data.spec import DataSpec, PublicData, Samples
from models.diffusion.augmented import AugmentConfig, AugmentedPretraining
from models.diffusion.config import ModelConfig
from models.diffusion.cost import generation_cost, seconds_per_image
from models.diffusion.public_pretraining import PublicStageConfig
from models.public.config import PublicDataConfig
from models.released.agreement import draw_agreeing
from models.released.wide_resnet import WideResNetClassifier
from models.synthesizer import Synthesizer, balanced_labels
from models.warm_start.classifier import ClassifierConfig, TrainConfig, WarmStartedClassifier, WarmUpConfig
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.errors import UserError
from utils.runtime import Runtime
from utils.sections import GenConfig, check_choice, check_least
from utils.timing import Cost

POOL = "pretrain/pool.npz"
SYNTHETIC, PUBLIC, BOTH = "syn", "public", "syn+public"


@dataclass(frozen=True)
class PoolConfig:
    num: int  # images that the diffusion network draws
    data: str  # images of the warm-up: syn, public, or syn+public

    def __post_init__(self) -> None:
        check_least(self, 1, "num")
        check_choice("data", self.data, (SYNTHETIC, PUBLIC, BOTH))


@dataclass(frozen=True)
class AgreeingGenConfig(GenConfig):
    agree: bool  # only samples that the released classifier gives their own label, as far as a few draws find them


class IDPS(Synthesizer):
    @dataclass(frozen=True)
    class Config:
        model: ModelConfig  # of the pool
        augment: AugmentConfig  # of the pool
        pretrain: PublicStageConfig  # of the pool
        classifier: ClassifierConfig
        pool: PoolConfig
        warm_up: WarmUpConfig
        train: TrainConfig
        gen: AgreeingGenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        # The pool's labels are those of the private classes.
        pool = AugmentedPretraining.Config(config.model, config.pretrain, config.gen, config.augment)
        self.generator = AugmentedPretraining(pool, spec.num_classes, spec, runtime)
        flip = config.public_data.flip
        self.fit = WarmStartedClassifier(config.classifier, config.warm_up, config.train, flip, spec, runtime)

    def privacy_plan(self) -> list[Release]:
        return [self.fit.release()]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        public = self._require_public(public)
        self.generator.pretrain(public, None)
        if self.config.warm_up.n_epochs:
            self.fit.fit_public(self._images_of(public))

    def _require_public(self, public: PublicData | None) -> PublicData:
        names = None if public is None else public.class_names
        if names != self.spec.class_names:
            raise UserError(
                f"public_data.name: {self.config.public_data.name} has other classes than the private images; IDPS "
                f"needs images of the same classes: public_data.name=in_distribution sensitive_data.num_public=<count>"
            )
        return public

    def _images_of(self, public: PublicData) -> Samples:
        """The images of the warm-up."""
        if self.config.pool.data == PUBLIC:
            return public.samples
        drawn = self._drawn_pool()
        if self.config.pool.data == SYNTHETIC:
            return drawn
        return Samples(
            np.concatenate([drawn.images, public.samples.images]),
            np.concatenate([drawn.labels, public.samples.labels]),
        )

    def _drawn_pool(self) -> Samples:
        """The synthetic images: those of an earlier start of this run, else drawn now."""
        path = None if self.runtime.folder is None else self.runtime.folder / POOL
        kept = distributed.from_main(
            lambda: read_samples(path) if path is not None and path.exists() else None
        )
        if kept is not None:
            return kept
        pool = self.generator.generate(self.config.pool.num)
        if path is not None:
            write_samples(path, pool)
        return pool

    def train(self, private: PrivateData) -> None:
        pool = None if self.config.train.extender == "none" else self._drawn_pool()
        self.fit.fit_private(private, pool)

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        sampler = self.config.model.sampler_acc

        def draw(labels: np.ndarray, stream: str) -> np.ndarray:
            return self.generator._sample(sampler, labels, stream, show=True)

        if not self.config.gen.agree:
            return Samples(draw(labels, "generate"), labels)
        return Samples(draw_agreeing(draw, labels, self.fit.product(), self.runtime.device), labels)

    def released_classifier(self) -> WideResNetClassifier:
        return self.fit.product()

    def state_dict(self) -> dict:
        return {"pool": self.generator.state_dict(), "classifier": self.fit.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.load_state_dict(state["pool"])
        self.fit.load_state_dict(state["classifier"])

    def settings_without_effect(self) -> dict[str, str]:
        config, without_effect = self.config, {}
        if config.warm_up.n_epochs == 0:
            without_effect["warm_up"] = "there is no warm-up (warm_up.n_epochs=0)"
        if config.train.extender == "none":
            without_effect["train.public_batch_size"] = "no public gradient is mixed in (train.extender=none)"
        if config.pool.data == PUBLIC and config.train.extender == "none":
            without_effect["pool.num"] = "the warm-up takes the public images alone (pool.data=public)"
        return without_effect

    def parameter_counts(self) -> dict[str, int]:
        count = sum(parameter.numel() for parameter in self.fit.network.parameters())
        return {**self.generator.parameter_counts(), "classifier": count}

    def public_costs(self, num_images: int) -> list[Cost]:
        config, pool = self.config, self.config.pool
        count = {SYNTHETIC: pool.num, PUBLIC: num_images, BOTH: pool.num + num_images}[pool.data]
        costs = self.generator.public_costs(num_images)
        if pool.data != PUBLIC:
            costs.append(replace(self._sampling_cost(pool.num), stage="pool"))
        return [*costs, self.fit.warm_up_cost(count)] if config.warm_up.n_epochs else costs

    def costs(self) -> list[Cost]:
        return [self.fit.train_cost(), self._sampling_cost(self.config.gen.data_num)]

    def _sampling_cost(self, num_images: int) -> Cost:
        forward, _ = seconds_per_image(self.generator.network, self.spec.image_shape, self.runtime.device)
        return generation_cost(
            replace(self.config.gen, data_num=num_images), self.config.model.sampler_acc, forward
        )
