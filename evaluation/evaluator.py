"""Judge samples: run the metrics of the config on inputs that are computed once, and report."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from data.cache import PrivateCache
from data.spec import DataSpec, Samples
from evaluation.floor import real_floor
from evaluation.gallery import nearest_training
from evaluation.inputs import Inputs
from evaluation.registry import (
    EXTRACTOR_NEEDS,
    METRICS,
    Metric,
    Value,
    check_classifiers,
    check_extractor,
    check_metrics,
    needs_of,
)
from evaluation.report import Report
from evaluation.selection import NoisySelection
from utils.errors import Unavailable, UserError
from utils.runtime import log
from utils.sections import EvalConfig

# What a computation can fail with, memory that a GPU lacks included; anything else is no failure of a metric.
FAILURES = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
__all__ = ["Evaluator", "NoisySelection"]


class Evaluator:
    """The metrics of `config` for one dataset.

    `weights_root` holds the weights of feature extractors. `cache`, when given, keeps the features of all images on
    disk. `prompt` describes an image for text-based metrics; {} stands for the class name.
    """

    def __init__(
        self, config: EvalConfig, spec: DataSpec, weights_root: Path, device: str, seed: int,
        cache: PrivateCache | None = None, prompt: str = "an image of a {}",
    ) -> None:  # fmt: skip
        self.values = check_metrics(config.metrics)
        check_extractor(config.extractor)
        needing = [value for value in self.values if "classifiers" in needs_of([value])]
        if needing and not check_classifiers(config.classifiers):
            raise UserError(f"eval.classifiers is empty; the metric {needing[0]} needs at least one")
        self.config, self.spec, self.prompt = config, spec, prompt
        self.weights_root, self.device, self.seed = Path(weights_root), device, seed
        self.cache = cache

    def evaluate(
        self, samples: Samples, *, train: Samples | None, test: Samples, select: NoisySelection | None,
        validation: Samples | None = None,
    ) -> Report:  # fmt: skip
        """Judge `samples` against the real `train` images (fidelity) and the real `test` images (accuracy).

        `train` may be None where nothing that is asked for compares with them (registry.comparing_with_training)
        and no ceiling is measured (ceiling.with_ceiling).
        `select` answers for the private validation records; only eval.mode=val asks it, once per classifier.
        `validation` holds these records themselves, for the oracle that eval.oracles adds. A metric that cannot be
        computed is listed as missing and never hides the others. Raises UserError when images do not have the
        dataset's size and channels or labels lie outside its classes.
        """
        for what, images in (("samples", samples), ("training images", train), ("test images", test)):
            if images is not None:
                check_samples(what, images, self.spec)
        inputs = Inputs(
            self.config, self.spec, samples=samples, train=train, test=test, select=select, validation=validation,
            prompt=self.prompt, weights_root=self.weights_root, device=self.device, seed=self.seed,
            cache=self.cache,
        )  # fmt: skip
        report = Report()
        for metric in dict.fromkeys(METRICS.resolve(value) for value in self.values):
            self._add(metric, inputs, report)
        if self.config.gallery:
            self._add_gallery(inputs, report)
        return report

    def _add(self, metric: Metric, inputs: Inputs, report: Report) -> None:
        """Compute one metric, and what real images would score."""
        extractor = metric.extractor or check_extractor(self.config.extractor)
        suffix = f"/{extractor}" if metric.uses_extractor else ""
        outcomes, floor = _outcomes(metric, inputs, extractor)
        for name, outcome in outcomes.items():
            value_name = name.split("/")[0]
            if value_name not in self.values:
                continue
            if isinstance(outcome, Unavailable):
                report.missing[name + suffix] = str(outcome)
                continue
            outcome = outcome if isinstance(outcome, Value) else Value(outcome)
            report.metrics[name + suffix] = float(outcome.value)
            info = _info(metric, value_name, inputs, extractor) | outcome.info
            real = "ceiling" if "classifiers" in metric.needs else "real_floor"
            info |= {real: floor[name]} if name in floor else {}
            report.metric_info[name + suffix] = info
            if outcome.details:
                report.details[name + suffix] = outcome.details

    def _add_gallery(self, inputs: Inputs, report: Report) -> None:
        passes = inputs.passes(check_extractor(self.config.extractor))
        try:
            nearest = _guarded(
                "gallery", lambda: nearest_training(passes, inputs.samples.labels, self.device)
            )
            report.nearest.update(nearest)
        except Unavailable as reason:
            report.missing["gallery"] = str(reason)


def _outcomes(
    metric: Metric, inputs: Inputs, extractor: str
) -> tuple[dict[str, float | Value | Unavailable], dict[str, float]]:
    """Names without extractor and what became of them, and what real images score."""
    try:
        _check_floor(metric, inputs)
        given = [_given(need, metric, inputs, extractor) for need in metric.needs]
        found = _guarded(f"metric {metric.name}", lambda: metric.compute(*given))
    except Unavailable as reason:
        return dict.fromkeys(metric.better, reason), {}
    compared = metric.uses_extractor or "classifiers" in metric.needs
    floor = _floor(metric, inputs, extractor) if compared else {}
    return found if isinstance(found, dict) else {metric.name: found}, floor


def _given(need: str, metric: Metric, inputs: Inputs, extractor: str) -> object:
    """What the metric gets for `need`. A failure of an extractor is one of the metric; a failure of classifiers, and of
    the mechanism that selects them, ends the run."""
    if need in EXTRACTOR_NEEDS:
        return _guarded(f"metric {metric.name}", lambda: inputs.given(need, extractor))
    return inputs.given(need, extractor)


def _floor(metric: Metric, inputs: Inputs, extractor: str) -> dict[str, float]:
    """What real images score; {} where that fails, as the value of the samples stands without it."""
    what = f"metric {metric.name} of real images"
    try:
        return _guarded(what, lambda: real_floor(metric, inputs, extractor))
    except Unavailable as reason:
        log.warning(f"{what} is left out: {reason}")
        return {}


def _guarded(what: str, compute: Callable):
    """What `compute` returns; Unavailable if it fails, so that hours of the other metrics are not lost with it."""
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
    """Raise UserError unless the images have the shape, and the labels the range, that `spec` promises."""
    if len(samples) == 0:
        raise UserError(f"{what}: there are none; give at least one image")
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


def _check_floor(metric: Metric, inputs: Inputs) -> None:
    """Refuse image sets that are too small for the metric to mean anything."""
    counts = [("samples", inputs.samples)]
    counts += [("real images", inputs.train)] if "train_features" in metric.needs else []
    counts += [("test images", inputs.test)] if "test_features" in metric.needs else []
    for what, images in counts:
        if len(images) < metric.min_images:
            raise Unavailable(f"needs at least {metric.min_images} {what}, there are {len(images)}")


def _info(metric: Metric, value_name: str, inputs: Inputs, extractor: str) -> dict:
    """What is known about a value that was computed, besides what its metric says."""
    info = {"better": metric.better[value_name], "n_real": 0, "n_fake": len(inputs.samples)}
    info["versions"] = {package: version(package) for package in ("numpy", "torch")}
    if {"test", "test_features"} & set(metric.needs):
        info["n_real"] = len(inputs.test)
    if {"train", "train_features"} & set(metric.needs):
        info["n_real"] = len(inputs.train)
        info["private"] = "compares with the private training images without noise"
    if metric.uses_extractor:
        info |= {"extractor": extractor, **inputs.passes(extractor).extractor.info}
    return info
