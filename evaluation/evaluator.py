"""Compute the metrics of a configuration for one set of samples."""

import hashlib
from collections.abc import Callable
from importlib.metadata import version

from data.spec import DataSpec, Samples
from evaluation.inputs import Classify, EvaluatorSettings, Images, Inputs
from evaluation.neighbours import nearest_training
from evaluation.reference import num_as_samples, real_values
from evaluation.registry import (
    EXTRACTOR_NEEDS,
    METRICS,
    TRAINING_NEEDS,
    Metric,
    Value,
    check_classifiers,
    check_extractor,
    check_metrics,
    need_classifiers,
)
from evaluation.report import Report
from evaluation.selection import NoisySelection
from evaluation.unfinished import Unfinished
from utils.errors import Unavailable, UserError
from utils.runtime import log

# How a computation can fail, out of GPU memory included. Any other exception is a bug and not a missing value.
FAILURES = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
__all__ = ["Evaluator", "EvaluatorSettings", "NoisySelection"]


class Evaluator:
    """The metrics of a configuration for one dataset. Raises UserError for unknown names, before anything runs."""

    def __init__(self, settings: EvaluatorSettings) -> None:
        config = settings.config
        self.settings, self.values = settings, check_metrics(config.metrics)
        check_extractor(config.extractor)
        using = need_classifiers(self.values)
        if using and not check_classifiers(config.classifiers) and settings.has_samples:
            raise UserError(f"eval.classifiers: empty; the metric {using[0]} needs at least one")

    def evaluate(
        self, samples: Samples, *, train: Samples | None, test: Samples, select: NoisySelection | None,
        validation: Samples | None = None, kept: Unfinished | None = None, released: Classify | None = None,
    ) -> Report:  # fmt: skip
        """Evaluate `samples` against the real `train` images (fidelity) and the real `test` images (accuracy).

        `train` may be None if no requested value compares with them (registry.comparing_with_training) and no ceiling
        is measured (ceiling.with_ceiling). `select` queries the private validation records; only eval.mode=val calls
        it, once per classifier. `validation` holds these records themselves, for the oracle of eval.oracles. `kept`
        holds results of this evaluation from before it was stopped, and gets each new one. `released` is a classifier
        that the run releases; with it there may be no samples. A metric that cannot be
        computed is reported as missing and never hides the others. Raises UserError if images do not have the dataset's
        size and channels, or if labels lie outside its classes.
        """
        for what, images in (("samples", samples), ("training images", train), ("test images", test)):
            if images is not None and not (images is samples and released is not None and len(samples) == 0):
                check_samples(what, images, self.settings.spec)
        images = Images(samples, train, test, select, validation, released)
        inputs = Inputs(self.settings, images, kept or Unfinished())
        report = Report()
        for metric in dict.fromkeys(METRICS.resolve(value) for value in self.values):
            self._add_metric(metric, inputs, report)
        if self.settings.config.gallery:
            self._add_gallery(inputs, report)
        return report

    def _add_metric(self, metric: Metric, inputs: Inputs, report: Report) -> None:
        """Compute one metric, for the samples and for real images."""
        extractor = metric.extractor or check_extractor(self.settings.config.extractor)
        suffix = f"/{extractor}" if metric.uses_extractor else ""
        outcomes, real = _outcomes(metric, inputs, extractor)
        for name, outcome in outcomes.items():
            value_name = name.split("/")[0]
            if value_name not in self.values:
                continue
            if isinstance(outcome, Unavailable):
                report.missing[name + suffix] = str(outcome)
                continue
            report.metrics[name + suffix] = float(outcome.value)
            info = _info(metric, value_name, inputs, extractor) | outcome.info
            if name in real and metric.uses_classifiers:
                info["ceiling"] = real[name]
            elif name in real:
                info |= {"real_floor": real[name], "n_floor": num_as_samples(metric, inputs)}
            report.metric_info[name + suffix] = info
            if outcome.details:
                report.details[name + suffix] = outcome.details

    def _add_gallery(self, inputs: Inputs, report: Report) -> None:
        features = inputs.features(check_extractor(self.settings.config.extractor))

        def compute() -> dict[int, list[int]]:
            points = features.train_features, features.sample_features
            return nearest_training(*points, inputs.samples.labels, inputs.device)

        try:
            report.nearest.update(_guarded("gallery", compute))
        except Unavailable as reason:
            report.missing["gallery"] = str(reason)


def _outcomes(
    metric: Metric, inputs: Inputs, extractor: str
) -> tuple[dict[str, Value | Unavailable], dict[str, float]]:
    """The outcome of each value, by name without extractor, and the values of real images."""
    try:
        _require_enough_images(metric, inputs)
        key = _guarded(f"metric {metric.name}", lambda: _key(metric, inputs, extractor))
        # Classifiers are kept themselves, and their metrics take no time.
        known = None if metric.uses_classifiers else inputs.kept.metric(key)
        if known is not None:
            return known
        arguments = [_input(need, metric, inputs, extractor) for need in metric.needs]
        found = _guarded(f"metric {metric.name}", lambda: metric.compute(*arguments))
    except Unavailable as reason:
        return dict.fromkeys(metric.better, reason), {}
    compared = len(inputs.samples) > 0 and (metric.uses_extractor or metric.uses_classifiers)
    real = _real_values(metric, inputs, extractor) if compared else {}
    values = {
        name: outcome if isinstance(outcome, Value | Unavailable) else Value(outcome)
        for name, outcome in (found if isinstance(found, dict) else {metric.name: found}).items()
    }
    if not metric.uses_classifiers:
        inputs.kept.keep_metric(key, values, real)
    return values, real


def _key(metric: Metric, inputs: Inputs, extractor: str) -> str:
    """The name of the metric's values, which depends on the weights of its extractor. Raises Unavailable."""
    if not metric.uses_extractor:
        return metric.name
    identity = inputs.features(extractor).extractor.identity
    return f"{metric.name}-{extractor}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _input(need: str, metric: Metric, inputs: Inputs, extractor: str) -> object:
    """The metric's argument for `need`. A failing extractor makes the metric unavailable; failing classifiers, and a
    failure of the mechanism that selects their epochs, end the run."""
    if need in EXTRACTOR_NEEDS:
        return _guarded(f"metric {metric.name}", lambda: inputs.get(need, extractor))
    return inputs.get(need, extractor)


def _real_values(metric: Metric, inputs: Inputs, extractor: str) -> dict[str, float]:
    """The values of real images; {} if they fail, since the values of the samples do not depend on them."""
    what = f"metric {metric.name} of real images"
    try:
        return _guarded(what, lambda: real_values(metric, inputs, extractor))
    except Unavailable as reason:
        log.warning(f"{what} is not available: {reason}")
        return {}


def _guarded(what: str, compute: Callable):
    """The result of `compute`; Unavailable if it fails, so that one failure does not cost the other metrics."""
    try:
        return compute()
    except UserError:
        raise
    except FAILURES as error:
        log.warning(f"{what} failed", exc_info=error)
        reason = " ".join(str(error).split()) or "no message"
        raise Unavailable(
            f"failed with {type(error).__name__}: {reason}; the traceback is in the log"
        ) from error


def check_samples(what: str, samples: Samples, spec: DataSpec) -> None:
    """Raise UserError unless the images have the shape, and the labels the range, of `spec`."""
    if len(samples) == 0:
        raise UserError(f"{what}: empty; give at least one image")
    if samples.images.shape[1:] != spec.image_shape:
        found, expected = (
            "x".join(map(str, shape)) for shape in (samples.images.shape[1:], spec.image_shape)
        )
        raise UserError(
            f"{what}: images are {found} (channels x height x width) but {spec.name} has {expected}; convert them first"
        )
    low, high = samples.labels.min(), samples.labels.max()
    if low < 0 or high >= spec.num_classes:
        raise UserError(f"{what}: labels range from {low} to {high}; allowed are 0 to {spec.num_classes - 1}")


def _require_enough_images(metric: Metric, inputs: Inputs) -> None:
    """Raise Unavailable if an image set is too small for the metric to be meaningful."""
    judges_released = metric.uses_classifiers and inputs.images.released is not None
    counts = [] if judges_released else [("samples", inputs.samples)]
    counts += [("real images", inputs.train)] if "train_features" in metric.needs else []
    counts += [("test images", inputs.test)] if "test_features" in metric.needs else []
    for what, images in counts:
        if len(images) < metric.min_images:
            raise Unavailable(f"needs at least {metric.min_images} {what}; there are {len(images)}")


def _info(metric: Metric, value_name: str, inputs: Inputs, extractor: str) -> dict:
    """The facts about a computed value, in addition to those of the metric itself."""
    info = {"better": metric.better[value_name], "n_real": 0, "n_fake": len(inputs.samples)}
    info["versions"] = {package: version(package) for package in ("numpy", "torch")}
    if {"test", "test_features"} & set(metric.needs):
        info["n_real"] = len(inputs.test)
    if {"train", "train_features"} & set(metric.needs):
        info["n_real"] = len(inputs.train)
    if TRAINING_NEEDS & set(metric.needs):
        info["private"] = "compares with the private training images without noise"
    if metric.uses_extractor:
        info |= {"extractor": extractor, **inputs.features(extractor).extractor.info}
    return info
