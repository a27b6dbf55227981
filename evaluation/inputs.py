"""The inputs of metrics by name. Each one is computed at most once per evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cache import PrivateCache
from data.spec import DataSpec, Samples
from evaluation.features import Features, extract
from evaluation.neighbours import NUM_NEIGHBOURS, CentredPoints, centre_of, nearest_others
from evaluation.registry import CLASSIFIERS, EXTRACTOR_NEEDS, check_classifiers
from evaluation.selection import (
    LAST_EPOCH,
    RELEASED,
    Choice,
    ClassifierResult,
    NoisySelection,
    References,
    select_epochs,
    selections,
    split_samples,
)
from extractors import EXTRACTORS
from extractors.extractor import Extractor
from utils.errors import Unavailable
from utils.runtime import log
from utils.sections import EvalConfig

if TYPE_CHECKING:
    from evaluation.unfinished import Unfinished


@dataclass(frozen=True)
class EvaluatorSettings:
    """What an evaluation depends on, apart from images.

    `weights_root` holds the weights of extractors. `cache` keeps features of all images on disk; None keeps none.
    `prompt` describes an image for text-based metrics; {} stands for the class name.
    """

    config: EvalConfig
    spec: DataSpec
    weights_root: Path
    device: str
    seed: int
    cache: PrivateCache | None = None
    prompt: str = "an image of a {}"
    has_samples: bool = True  # False: a released classifier alone is evaluated


# (N, C, H, W) uint8 -> logits (N, K): a classifier that needs no training
Classify = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Images:
    """The images of one evaluation.

    `train` is None if nothing compares with the training images. `select` queries the private validation records
    through a booked mechanism; `validation` holds these records themselves, for the oracle. `released` is the
    classifier that the run releases; without it there is at least one sample.
    """

    samples: Samples
    train: Samples | None
    test: Samples
    select: NoisySelection | None
    validation: Samples | None
    released: Classify | None = None


class Inputs:
    """Images, features and classifiers of one evaluation: the attributes that metrics name in `needs`. Classifiers that
    `kept` holds are not trained again."""

    def __init__(self, settings: EvaluatorSettings, images: Images, kept: "Unfinished") -> None:
        self.settings, self.images, self.kept = settings, images, kept
        self.samples, self.train, self.test = images.samples, images.train, images.test
        self.spec, self.prompt, self.weights_root = settings.spec, settings.prompt, settings.weights_root
        self.device, self.seed = settings.device, settings.seed
        self._features: dict[str, FeatureSets] = {}

    def features(self, extractor: str) -> "FeatureSets":
        """The features that this extractor computes."""
        return self._features.setdefault(extractor, FeatureSets(self, extractor))

    def get(self, need: str, extractor: str) -> object:
        """The value of `need` for a metric that uses `extractor`. Raises Unavailable."""
        return getattr(self.features(extractor) if need in EXTRACTOR_NEEDS else self, need)

    @cached_property
    def classifiers(self) -> list[ClassifierResult]:
        """Every classifier of the config, trained on the samples, and the released one, if there is one. All choices of
        one whose training fails are Unavailable."""
        results = []
        for name in map(CLASSIFIERS.canonical, self.settings.config.classifiers):
            result = self.kept.classifier(name)
            if result is None:
                result = self._train_on_samples(name)
                self.kept.keep_classifier(result)
            results.append(result)
        if self.images.released is not None:
            logits = self.images.released(self.test.images)
            results.append(ClassifierResult(RELEASED, 0, 0, {LAST_EPOCH: Choice(0, logits)}))
        return results

    def _train_on_samples(self, name: str) -> ClassifierResult:
        from evaluation.classifiers.recipe import recipe_for
        from evaluation.classifiers.training import train_classifier

        config = self.settings.config
        chosen, held_out = split_samples(len(self.samples), config.num_val)
        recipe = recipe_for(config.recipe, self.spec, len(chosen))
        wanted = selections(config.mode, config.oracles)
        try:
            trained = train_classifier(
                name, self.samples, chosen, spec=self.spec, recipe=recipe, device=self.device, seed=self.seed,
                batch_size=config.batch_size,
            )  # fmt: skip
        except Unavailable as reason:
            return ClassifierResult(name, len(chosen), recipe.num_epochs, dict.fromkeys(wanted, reason))
        held_out = self.samples.take(held_out)
        references = References(held_out, self.test, self.images.select, self.images.validation)
        return select_epochs(trained, wanted, references)

    @cached_property
    def real_classifiers(self) -> list[ClassifierResult]:
        """Every classifier of the config, trained on the real training images, at its last epoch for every selection.
        One whose ceiling is not measured has Unavailable choices."""
        from evaluation.ceiling import train_on_real, with_ceiling

        config = self.settings.config
        results, measured = [], with_ceiling(config)
        for name in check_classifiers(config.classifiers):
            choice: Choice | Unavailable = Unavailable(f"eval.ceiling={config.ceiling}")
            if name in measured:
                try:
                    choice = train_on_real(name, self.train, self.test, self.settings)
                except Unavailable as reason:
                    log.warning(f"the ceiling of {name} is not available: {reason}")
                    choice = reason
            choices = dict.fromkeys(selections(config.mode, config.oracles), choice)
            epochs = choice.epoch if isinstance(choice, Choice) else 0
            results.append(ClassifierResult(name, len(self.train), epochs, choices))
        return results


class FeatureSets:
    """Features of the images of one evaluation by one extractor. Each set of images is extracted once, on first use."""

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
        return self._require_logits(self._samples)

    @property
    def test_logits(self) -> np.ndarray:
        return self._require_logits(self._test)

    @cached_property
    def train_neighbours(self):
        """Squared distances of the training images to their nearest others: tensor (N, NUM_NEIGHBOURS).

        A set of at most NUM_NEIGHBOURS images has N - 1 columns.
        """
        features = self.train_features
        points = CentredPoints(features, centre_of(features), self._inputs.device)
        return nearest_others(points, min(NUM_NEIGHBOURS, len(points) - 1), "neighbours of real images")

    def _require_logits(self, found: Features) -> np.ndarray:
        if found.logits is None:
            raise Unavailable(
                f"extractor {self.extractor.name} has no class probabilities; use eval.extractor=inception"
            )
        return found.logits

    @cached_property
    def _train(self) -> Features:
        return self._extract(self._inputs.train, "real images")

    @cached_property
    def _test(self) -> Features:
        return self._extract(self._inputs.test, "test images")

    @cached_property
    def _samples(self) -> Features:
        return self._extract(self._inputs.samples, "samples")

    def _extract(self, samples: Samples, what: str) -> Features:
        settings = self._inputs.settings
        return extract(
            self.extractor, samples.images, batch_size=settings.config.batch_size,
            description=f"{self.extractor.name} features of {what}", cache=settings.cache,
        )  # fmt: skip
