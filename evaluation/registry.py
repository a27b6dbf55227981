"""Tables of metrics and classifiers. Nothing here imports torch, so names can be checked before a run starts.

A new metric is a new file in evaluation/metrics with one decorated function:

    @metric("fid", better="lower", needs=("train_features", "sample_features"), min_images=2)
    def fid(real, fake): ...
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from extractors import EXTRACTORS
from utils.errors import UserError
from utils.registry import Registry
from utils.sections import EvalConfig

CLASSIFIERS = Registry(
    "eval.classifiers",
    {
        "logistic_regression": "evaluation.classifiers.logistic_regression:build",
        "small_cnn": "evaluation.classifiers.small_cnn:build",
        "resnet": "evaluation.classifiers.resnet:build",
        "wrn": "evaluation.classifiers.wrn:build",
        "resnext": "evaluation.classifiers.resnext:build",
    },
)

# Fast enough to train on all real training images too: eval.ceiling=auto measures their ceiling.
SMALL_CLASSIFIERS = ("logistic_regression", "small_cnn")

METRICS = Registry("eval.metrics", {})

EXTRACTOR_NEEDS = ("train_features", "test_features", "sample_features", "sample_logits", "train_neighbours")
NEEDS = (
    *EXTRACTOR_NEEDS, "classifiers", "samples", "train", "test", "spec", "prompt", "device", "seed", "weights_root"
)  # fmt: skip
TRAINING_NEEDS = {"train", "train_features", "train_neighbours"}


@dataclass(frozen=True)
class Value:
    """A metric's value. `info` goes into the report's `metric_info`; `details` are tables that are too large for it."""

    value: float
    info: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Metric:
    """One entry of the table; see `metric` for the fields."""

    name: str
    better: dict[str, str]
    needs: tuple[str, ...]
    min_images: int
    extractor: str | None
    check: Callable | None
    memorisation: dict[str, str]
    compute: Callable

    @property
    def uses_extractor(self) -> bool:
        return any(need in EXTRACTOR_NEEDS for need in self.needs)

    @property
    def uses_classifiers(self) -> bool:
        return "classifiers" in self.needs


def metric(
    name: str, *, better: str | dict[str, str], needs: tuple[str, ...], min_images: int = 1,
    extractor: str | None = None, check: Callable | None = None, memorisation: dict[str, str] | None = None,
):  # fmt: skip
    """Register a function as the metric `name`.

    `needs` names the attributes of evaluation.inputs.Inputs that the function receives, in this order. It returns
    a float or a Value, or a dict of several named ones, in which an Unavailable stands for a missing value; `better`
    is then a dict too ("higher" or "lower" per first part of the names). Values of metrics that need an extractor get
    "/<extractor>" appended to their names; `extractor` fixes the extractor, otherwise eval.extractor does. Image sets
    smaller than `min_images` are refused. `check(weights_root)` raises Unavailable if something that only this metric
    needs is not installed. `memorisation`: how to read each value that indicates copies of training images.
    """
    unknown_needs = set(needs) - set(NEEDS)
    if unknown_needs:
        raise UserError(
            f"metric '{name}' needs {', '.join(sorted(unknown_needs))}; known: {', '.join(NEEDS)}"
        )
    better = {name: better} if isinstance(better, str) else better
    assert set(better.values()) <= {"higher", "lower"}, better

    def register(compute: Callable) -> Callable:
        entry = Metric(name, better, needs, min_images, extractor, check, memorisation or {}, compute)
        for known_as in {name, *better}:
            METRICS.register(known_as, entry)
        return compute

    return register


@functools.cache
def load_metrics() -> None:
    """Import every module of evaluation/metrics, which fills METRICS."""
    package = importlib.import_module("evaluation.metrics")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"evaluation.metrics.{module.name}")


def check_metrics(names: Iterable[str]) -> list[str]:
    """The canonical names of the requested values, each once; a group ("precision_recall") is expanded.

    Raises UserError for an unknown name.
    """
    load_metrics()
    values = []
    for name in names:
        canonical, entry = METRICS.canonical(name), METRICS.resolve(name)
        values += [canonical] if canonical in entry.better else list(entry.better)
    return list(dict.fromkeys(values))


def needs_of(names: Iterable[str]) -> set[str]:
    """The union of the needs of these metrics. Raises UserError for an unknown name."""
    load_metrics()
    return {need for name in names for need in METRICS.resolve(name).needs}


def comparing_with_training(names: Iterable[str]) -> list[str]:
    """Those of these values that are computed from the private training images, by their canonical names."""
    return [name for name in check_metrics(names) if TRAINING_NEEDS & needs_of([name])]


def need_classifiers(names: Iterable[str]) -> list[str]:
    """Those of these values that need trained classifiers, by their canonical names."""
    return [name for name in check_metrics(names) if METRICS.resolve(name).uses_classifiers]


def of_classifiers(config: EvalConfig) -> tuple[EvalConfig, list[str]]:
    """The part of an evaluation that needs no samples, for a run whose only product is a classifier, and the names of
    the metrics that are left out."""
    kept = need_classifiers(config.metrics)
    left_out = [name for name in check_metrics(config.metrics) if name not in kept]
    only = replace(config, metrics=kept, classifiers=[], ceiling="none", gallery=None, oracles=False)
    return only, left_out


def memorisation_metrics() -> dict[str, str]:
    """All values that indicate copies of training images -> how to read them."""
    load_metrics()
    entries = dict.fromkeys(METRICS.resolve(name) for name in sorted(METRICS))
    return {name: text for entry in entries for name, text in entry.memorisation.items()}


def check_classifiers(names: Iterable[str]) -> list[str]:
    """The canonical classifier names. Raises UserError for an unknown or a repeated name."""
    canonical = [CLASSIFIERS.canonical(name) for name in names]
    for name in canonical:
        if canonical.count(name) > 1:
            raise UserError(f"eval.classifiers: '{name}' is listed twice; name every classifier once")
    return canonical


def check_extractor(name: str) -> str:
    """The canonical name of a feature extractor. Raises UserError for an unknown name."""
    return EXTRACTORS.canonical(name)
