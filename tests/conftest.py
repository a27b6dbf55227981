"""Shared fixtures: a toy dataset with a public one, and every method at toy size."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings
from toys import QUERY, SELECTIVE, TOYS, trial_settings

from data.locations import has_public_images, is_in_distribution
from data.spec import DataSpec, PublicData, Samples
from models import METHODS
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils.config import load_config
from utils.runtime import Runtime

# Small sums in many threads are slower, and a fixed number of threads makes their rounding repeat.
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

NUM_RECORDS, NUM_CLASSES, RESOLUTION, PUBLIC_CLASSES = 60, 3, 8, 6

# The semantic query of PrivImage, for other methods.
QUERIED = trial_settings({"public_data.name": "glyphs", **SELECTIVE, **QUERY})


@functools.cache
def small_config(name: str, settings: tuple[str, ...], epsilon: str):
    """The method's configuration at toy size, through the command line; `settings` override it."""
    argv = ["--method", name, "--data_name", "digits_8", "--epsilon", epsilon, "preset=quick"]
    values = dict(setting.split("=", 1) for setting in (*trial_settings(TOYS[name]), *settings))
    return load_config([*argv, *(f"{key}={value}" for key, value in values.items())], METHODS).method_config


def random_samples(seed: int, num_records: int, num_classes: int) -> Samples:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_records, 1, RESOLUTION, RESOLUTION), dtype=np.uint8)
    return Samples(images, np.arange(num_records, dtype=np.int64) % num_classes)


@pytest.fixture
def samples() -> Samples:
    """60 random 8x8 grey images in 3 classes."""
    return random_samples(0, NUM_RECORDS, NUM_CLASSES)


@pytest.fixture
def spec() -> DataSpec:
    names = tuple(f"kind {label}" for label in range(NUM_CLASSES))
    return DataSpec("toy", RESOLUTION, 1, NUM_CLASSES, NUM_RECORDS, names)


@pytest.fixture
def public() -> PublicData:
    """48 random 8x8 grey images in 6 classes."""
    names = tuple(f"public {label}" for label in range(PUBLIC_CLASSES))
    return PublicData("toy-public", random_samples(1, 48, PUBLIC_CLASSES), names)


@pytest.fixture
def make_private(samples, spec) -> Callable[..., PrivateData]:
    """make_private(plan, epsilon=inf, noise_seed=None, samples=None, relation=...) -> PrivateData with adopted plan."""

    def make(plan, epsilon=float("inf"), noise_seed=None, records=None, **ledger_options) -> PrivateData:
        ledger = Ledger(Budget(epsilon, 1e-5), **ledger_options)
        ledger.adopt(plan)
        return PrivateData(records or samples, spec, ledger, NoiseSource(noise_seed))

    return make


@dataclasses.dataclass
class Trial:
    """A method with its private data and ledger, ready to run."""

    name: str
    synthesizer: object
    private: PrivateData
    public: PublicData | None

    def run(self) -> None:
        self.synthesizer.pretrain(self.public, self.private)
        self.synthesizer.train(self.private)


@pytest.fixture
def make_method(spec) -> Callable[..., object]:
    """make_method(name, *settings, epsilon=10, runtime=None) -> the small synthesizer; reads no data."""

    def make(name: str, *settings: str, epsilon=10, runtime: Runtime | None = None):
        config = small_config(name, settings, str(epsilon))
        if hasattr(config, "public_data") and has_public_images(config.public_data):
            count = NUM_CLASSES if is_in_distribution(config.public_data) else PUBLIC_CLASSES
            section = dataclasses.replace(config.public_data, n_classes=count)
            config = dataclasses.replace(config, public_data=section)
        return METHODS.resolve(name)(config, spec, runtime or Runtime())

    return make


@pytest.fixture
def make_trial(make_method, make_private, public) -> Callable[..., Trial]:
    """make_trial(name, *settings, epsilon=10, noise_seed=None, runtime=None) -> Trial with the plan adopted."""

    def make(name: str, *settings: str, epsilon=10, noise_seed=None, runtime=None, records=None) -> Trial:
        synthesizer = make_method(name, *settings, epsilon=epsilon, runtime=runtime)
        private = make_private(synthesizer.privacy_plan(), float(epsilon), noise_seed, records)
        section = getattr(synthesizer.config, "public_data", None)
        without = section is None or not has_public_images(section)
        given = public
        if not without and is_in_distribution(section):
            given = PublicData(
                "in_distribution", random_samples(1, 48, NUM_CLASSES), synthesizer.spec.class_names
            )
        return Trial(name, synthesizer, private, None if without else given)

    return make
