"""A method whose samples a DP classifier labels: the images show the private data, the teacher knows their classes.

The teacher is a linear classifier on fixed features (models/linear/fit.py) with a share of the budget, planned in the
same ledger. Using it on samples is post-processing.
"""

import numpy as np

from data.spec import PublicData, Samples
from models.linear.classifier import LinearClassifier
from models.linear.fit import LinearFit
from models.released.classifier import ReleasedClassifier, logits_of
from models.synthesizer import Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.errors import UserError
from utils.runtime import log
from utils.timing import Cost

TEACHER = "teacher"  # its query, and its entry in the checkpoint
RELABEL, FILTER = "relabel", "filter"
MOST_DRAWS = 4  # times the number of samples


class Taught(Synthesizer):
    """`method` with a teacher, whose noise multiplier is fixed. What the teacher does not change is the method's."""

    def __init__(self, method: Synthesizer, teacher: LinearFit, noise_multiplier: float, use: str) -> None:
        self.selects_public_classes = method.selects_public_classes
        self.learns_class_shares = method.learns_class_shares
        super().__init__(method.config, method.spec, method.runtime)
        self.method, self.teacher = method, teacher
        self.noise_multiplier, self.use = noise_multiplier, use

    def privacy_plan(self) -> list[Release]:
        return [self.teacher.release(self.noise_multiplier), *self.method.privacy_plan()]

    def pretraining_plan(self) -> list[Release]:
        return self.method.pretraining_plan()

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        if self.teacher.needs_public_images:
            if public is None:
                raise UserError(
                    "gen.teacher: model.num_directions needs public images, and this run has none"
                )
            self.teacher.features.learn(public)
        self.method.pretrain(public, private)

    def train(self, private: PrivateData) -> None:
        self.teacher.fit(private)
        self.method.train(private)

    @property
    def makes_images(self) -> bool:
        return self.method.makes_images

    def generate(self, num_samples: int) -> Samples:
        if self.use == RELABEL:
            drawn = self.method.generate(num_samples)
            labels = self._labels_of(drawn.images)
            log.info(
                f"gen.teacher: {int((labels != drawn.labels).sum()):,} of {num_samples:,} samples are relabelled"
            )
            return Samples(drawn.images, labels)
        return self._filtered(num_samples)

    def _filtered(self, num_samples: int) -> Samples:
        """Samples that the teacher labels alike, the same number of each class; others fill classes that have too few
        after MOST_DRAWS times as many draws."""
        wanted = balanced_labels(num_samples, self.spec.num_classes)
        counts = np.bincount(wanted, minlength=self.spec.num_classes)
        draws = num_samples
        while True:
            drawn = self.method.generate(draws)
            agrees = self._labels_of(drawn.images) == drawn.labels
            found = np.bincount(drawn.labels[agrees], minlength=self.spec.num_classes)
            if (found >= counts).all() or draws >= MOST_DRAWS * num_samples:
                break
            draws = min(2 * draws, MOST_DRAWS * num_samples)
        lacking = int(np.clip(counts - found, 0, None).sum())
        if lacking:
            log.info(
                f"gen.teacher: {lacking:,} of {num_samples:,} samples are labelled otherwise by the teacher"
            )
        order = np.argsort(~agrees, kind="stable")  # those that agree first
        places = {label: iter(order[drawn.labels[order] == label]) for label in range(self.spec.num_classes)}
        return drawn.take(np.array([next(places[label]) for label in wanted]))

    def _labels_of(self, images: np.ndarray) -> np.ndarray:
        """(N,) int64, by one process for all: rounding may decide a label."""
        classifier: LinearClassifier = self.teacher.classifier()
        device = self.runtime.device
        return distributed.from_main(
            lambda: logits_of(classifier, images, device, TEACHER).argmax(1).astype(np.int64)
        )

    def released_classifier(self) -> ReleasedClassifier:
        return self.method.released_classifier() or self.teacher.classifier()

    def state_dict(self) -> dict:
        """That of the method, so that other runs can start from it, with the teacher's."""
        return {**self.method.state_dict(), TEACHER: self.teacher.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.teacher.load_state_dict(state[TEACHER])
        self.method.load_state_dict({name: value for name, value in state.items() if name != TEACHER})

    def parameter_counts(self) -> dict[str, int]:
        return {**self.method.parameter_counts(), TEACHER: self.teacher.layer.weight.numel()}

    def missing_requirements(self) -> list[str]:
        return self.method.missing_requirements()

    def settings_without_effect(self) -> dict[str, str]:
        return self.method.settings_without_effect()

    @property
    def uses_public_images(self) -> bool:
        return self.method.uses_public_images or self.teacher.needs_public_images

    @property
    def learns_from_public_images(self) -> bool:
        return self.method.learns_from_public_images or self.teacher.needs_public_images

    def public_costs(self, num_images: int) -> list[Cost]:
        return self.method.public_costs(num_images)

    def costs(self) -> list[Cost]:
        return [*self.teacher.costs(TEACHER), *self.method.costs()]

    def remaining_share(self, cost: Cost) -> float:
        return self.method.remaining_share(cost)
