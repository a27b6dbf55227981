"""What metrics can ask for by name; each thing is computed at most once per evaluation."""

from functools import cached_property
from pathlib import Path

import numpy as np

from data.spec import DataSpec, Samples
from evaluation.errors import Unavailable
from evaluation.features import Extractor, Features, extract
from evaluation.registry import CLASSIFIERS, EXTRACTORS
from evaluation.selection import JudgedClassifier, NoisySelection, judge, selections, split_samples
from utils.sections import EvalConfig


class Inputs:
    """Images, features and classifiers of one evaluation."""

    def __init__(
        self, config: EvalConfig, spec: DataSpec, *, samples: Samples, train: Samples, test: Samples,
        select: NoisySelection | None, weights_root: Path, device: str, seed: int, cache_dir: Path | None,
    ) -> None:  # fmt: skip
        self.config, self.spec = config, spec
        self.samples, self.train, self.test, self.select = samples, train, test, select
        self.weights_root, self.device, self.seed, self.cache_dir = weights_root, device, seed, cache_dir

    @cached_property
    def extractor(self) -> Extractor:
        """Raises MissingWeights."""
        return EXTRACTORS.resolve(self.config.extractor)(self.spec, self.weights_root, self.device)

    @property
    def train_features(self) -> np.ndarray:
        return self._train_pass.features

    @property
    def test_features(self) -> np.ndarray:
        return self._test_pass.features

    @property
    def sample_features(self) -> np.ndarray:
        return self._sample_pass.features

    @property
    def sample_logits(self) -> np.ndarray:
        if self._sample_pass.logits is None:
            raise Unavailable(
                f"extractor {self.extractor.name} has no class probabilities; use eval.extractor=inception"
            )
        return self._sample_pass.logits

    @cached_property
    def classifiers(self) -> list[JudgedClassifier]:
        """Every classifier of the config, trained on the samples. One that cannot be has Unavailable choices."""
        return [self._judged(CLASSIFIERS.canonical(name)) for name in self.config.classifiers]

    def _judged(self, name: str) -> JudgedClassifier:
        from evaluation.classifiers.recipe import recipe_for
        from evaluation.classifiers.training import train_classifier

        chosen, held_out = split_samples(len(self.samples), self.config.num_val)
        recipe = recipe_for(self.config.recipe, self.spec, len(chosen))
        try:
            trained = train_classifier(
                name, self.samples, chosen, spec=self.spec, recipe=recipe, device=self.device, seed=self.seed,
                batch_size=self.config.batch_size,
            )  # fmt: skip
        except Unavailable as reason:
            choices = dict.fromkeys(selections(self.config.mode), reason)
            return JudgedClassifier(name, len(chosen), recipe.num_epochs, choices)
        held_out = self.samples.take(held_out)
        return judge(trained, self.config.mode, test=self.test, held_out=held_out, noisy=self.select)

    @cached_property
    def _train_pass(self) -> Features:
        return self._pass(self.train, "real images")

    @cached_property
    def _test_pass(self) -> Features:
        return self._pass(self.test, "test images")

    @cached_property
    def _sample_pass(self) -> Features:
        return self._pass(self.samples, "samples")

    def _pass(self, samples: Samples, what: str) -> Features:
        description = f"{self.extractor.name} features of {what}"
        return extract(
            self.extractor, samples.images, batch_size=self.config.batch_size, description=description,
            cache_dir=self.cache_dir,
        )  # fmt: skip
