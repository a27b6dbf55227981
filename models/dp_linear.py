"""DP-Linear: the reference for every synthesizer. A linear classifier on fixed features, fitted with the same budget.

It answers whether synthetic images are worth it: its product is a classifier, not a dataset (see models/linear/fit.py).
With pixels as features, the noisy class means are images too: one per class.
"""

from dataclasses import dataclass

from data.spec import DataSpec, PublicData, Samples
from models.linear.classifier import LinearClassifier
from models.linear.features import FeatureConfig, FeatureMap
from models.linear.fit import SGD, FitConfig, LinearFit
from models.public.config import PublicDataConfig
from models.synthesizer import Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.errors import UserError
from utils.images import to_uint8
from utils.runtime import Runtime
from utils.sections import GenConfig
from utils.timing import Cost


class DPLinear(Synthesizer):
    @dataclass(frozen=True)
    class Config:
        model: FeatureConfig
        train: FitConfig
        gen: GenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        features = FeatureMap(config.model, spec, runtime.weights_root, runtime.device)
        self.linear = LinearFit("linear", config.train, features, spec, runtime)

    def privacy_plan(self) -> list[Release]:
        return [self.linear.release()]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        if self.linear.needs_public_images:
            if public is None:
                raise UserError(
                    "model.num_directions: needs public images, and this run has none; give public_data.name, or "
                    "model.num_directions=null"
                )
            self.linear.features.learn(public)

    def train(self, private: PrivateData) -> None:
        self.linear.fit(private)

    @property
    def makes_images(self) -> bool:
        model = self.config.model
        return model.features == "pixels" and model.num_directions is None and self.config.train.fit != SGD

    def generate(self, num_samples: int) -> Samples:
        """The class means, each scaled to the full range of pixels, repeated."""
        means = self.linear.class_sums[:, :-1].clamp(min=0)
        pixels = to_uint8(2 * means / means.amax(1, keepdim=True).clamp(min=1e-12) - 1)
        labels = balanced_labels(num_samples, self.spec.num_classes)
        return Samples(pixels.reshape(-1, *self.spec.image_shape)[labels], labels)

    def released_classifier(self) -> LinearClassifier:
        return self.linear.classifier()

    def state_dict(self) -> dict:
        return self.linear.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.linear.load_state_dict(state)

    def parameter_counts(self) -> dict[str, int]:
        return {"linear layer": self.linear.layer.weight.numel()}

    @property
    def uses_public_images(self) -> bool:
        return self.linear.needs_public_images

    def public_costs(self, num_images: int) -> list[Cost]:
        return [
            Cost("pretrain", f"features of {num_images} images", num_images * self.linear.seconds_per_image())
        ]

    def costs(self) -> list[Cost]:
        return self.linear.costs()
