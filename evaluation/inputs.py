"""What metrics can ask for by name; each thing is computed at most once per evaluation."""

from functools import cached_property
from pathlib import Path

import numpy as np

from data.cache import PrivateCache
from data.spec import DataSpec, Samples
from evaluation.features import Features, extract
from evaluation.neighbours import NUM_NEIGHBOURS, CentredPoints, centre_of, nearest_others
from evaluation.registry import CLASSIFIERS, EXTRACTOR_NEEDS, check_classifiers
from evaluation.selection import (
    Choice,
    JudgedClassifier,
    NoisySelection,
    References,
    judge,
    selections,
    split_samples,
)
from extractors import EXTRACTORS
from extractors.extractor import Extractor
from utils.errors import Unavailable
from utils.runtime import log
from utils.sections import EvalConfig


class Inputs:
    """Images, features and classifiers of one evaluation."""

    def __init__(
        self, config: EvalConfig, spec: DataSpec, *, samples: Samples, train: Samples | None, test: Samples,
        select: NoisySelection | None, validation: Samples | None, prompt: str, weights_root: Path, device: str,
        seed: int, cache: PrivateCache | None,
    ) -> None:  # fmt: skip
        self.config, self.spec, self.prompt = config, spec, prompt
        self.samples, self.train, self.test = samples, train, test
        self.select, self.validation = select, validation
        self.weights_root, self.device, self.seed, self.cache = weights_root, device, seed, cache
        self._passes: dict[str, Passes] = {}

    def passes(self, extractor: str) -> "Passes":
        """What the extractor of this name makes of the images."""
        return self._passes.setdefault(extractor, Passes(self, extractor))

    def given(self, need: str, extractor: str) -> object:
        """What a metric that uses `extractor` gets for `need`. Raises Unavailable."""
        return getattr(self.passes(extractor) if need in EXTRACTOR_NEEDS else self, need)

    @cached_property
    def classifiers(self) -> list[JudgedClassifier]:
        """Every classifier of the config, trained on the samples. One that cannot be has Unavailable choices."""
        return [self._judged(CLASSIFIERS.canonical(name)) for name in self.config.classifiers]

    def _judged(self, name: str) -> JudgedClassifier:
        from evaluation.classifiers.recipe import recipe_for
        from evaluation.classifiers.training import train_classifier

        chosen, held_out = split_samples(len(self.samples), self.config.num_val)
        recipe = recipe_for(self.config.recipe, self.spec, len(chosen))
        wanted = selections(self.config.mode, self.config.oracles)
        try:
            trained = train_classifier(
                name, self.samples, chosen, spec=self.spec, recipe=recipe, device=self.device, seed=self.seed,
                batch_size=self.config.batch_size,
            )  # fmt: skip
        except Unavailable as reason:
            return JudgedClassifier(name, len(chosen), recipe.num_epochs, dict.fromkeys(wanted, reason))
        references = References(self.samples.take(held_out), self.test, self.select, self.validation)
        return judge(trained, wanted, references)

    @cached_property
    def real_classifiers(self) -> list[JudgedClassifier]:
        """Every classifier of the config, trained on the real training images, at its last epoch whatever selects the
        others'. One that is not measured has Unavailable choices."""
        from evaluation.ceiling import trained_on_real, with_ceiling

        judged, measured = [], with_ceiling(self.config)
        for name in check_classifiers(self.config.classifiers):
            choice: Choice | Unavailable = Unavailable(f"eval.ceiling={self.config.ceiling}")
            if name in measured:
                try:
                    choice = trained_on_real(
                        name, self.train, self.test, spec=self.spec, config=self.config, device=self.device,
                        seed=self.seed, cache=self.cache,
                    )  # fmt: skip
                except Unavailable as reason:
                    log.warning(f"the ceiling of {name} is left out: {reason}")
                    choice = reason
            choices = dict.fromkeys(selections(self.config.mode, self.config.oracles), choice)
            epochs = choice.epoch if isinstance(choice, Choice) else 0
            judged.append(JudgedClassifier(name, len(self.train), epochs, choices))
        return judged


class Passes:
    """The features of one extractor: each set of images passes through it once, and only when it is asked for."""

    def __init__(self, inputs: Inputs, name: str) -> None:
        self._inputs, self._name = inputs, name

    @cached_property
    def extractor(self) -> Extractor:
        """Raises Unavailable."""
        kind = EXTRACTORS.resolve(self._name)
        return kind(self._inputs.spec, self._inputs.weights_root, self._inputs.device)

    @property
    def train_features(self) -> np.ndarray:
        return self._train.features

    @property
    def test_features(self) -> np.ndarray:
        return self._test.features

    @property
    def sample_features(self) -> np.ndarray:
        return self._samples.features

    @property
    def sample_logits(self) -> np.ndarray:
        return self._with_logits(self._samples)

    @property
    def test_logits(self) -> np.ndarray:
        return self._with_logits(self._test)

    @cached_property
    def train_neighbours(self):
        """Squared distances of the training images to their nearest others: tensor (N, NUM_NEIGHBOURS).

        Smaller sets have as many columns as others exist.
        """
        features = self.train_features
        points = CentredPoints(features, centre_of(features), self._inputs.device)
        return nearest_others(points, min(NUM_NEIGHBOURS, len(points) - 1), "neighbours of real images")

    def _with_logits(self, found: Features) -> np.ndarray:
        if found.logits is None:
            raise Unavailable(
                f"extractor {self.extractor.name} has no class probabilities; use eval.extractor=inception"
            )
        return found.logits

    @cached_property
    def _train(self) -> Features:
        return self._pass(self._inputs.train, "real images")

    @cached_property
    def _test(self) -> Features:
        return self._pass(self._inputs.test, "test images")

    @cached_property
    def _samples(self) -> Features:
        return self._pass(self._inputs.samples, "samples")

    def _pass(self, samples: Samples, what: str) -> Features:
        return extract(
            self.extractor, samples.images, batch_size=self._inputs.config.batch_size,
            description=f"{self.extractor.name} features of {what}", cache=self._inputs.cache,
        )  # fmt: skip
