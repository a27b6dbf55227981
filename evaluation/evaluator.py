"""Judge samples: run the metrics of the config on inputs that are computed once, and report."""

from pathlib import Path

from data.spec import DataSpec, Samples
from evaluation.errors import Unavailable
from evaluation.inputs import Inputs
from evaluation.registry import METRICS, Metric, Value, check_classifiers, check_extractor, check_metrics
from evaluation.report import Report
from evaluation.selection import NoisySelection
from utils.errors import UserError
from utils.sections import EvalConfig

__all__ = ["Evaluator", "NoisySelection"]


class Evaluator:
    """The metrics of `config` for one dataset.

    `weights_root` holds the weights of feature extractors. `cache_dir`, when given, keeps features on disk; those of
    private images are private.
    """

    def __init__(
        self, config: EvalConfig, spec: DataSpec, weights_root: Path, device: str, seed: int,
        cache_dir: Path | None = None,
    ) -> None:  # fmt: skip
        self.values = check_metrics(config.metrics)
        check_extractor(config.extractor)
        if "accuracy" in self.values and not check_classifiers(config.classifiers):
            raise UserError("eval.classifiers is empty; the metric accuracy needs at least one")
        self.config, self.spec = config, spec
        self.weights_root, self.device, self.seed, self.cache_dir = (
            Path(weights_root),
            device,
            seed,
            cache_dir,
        )

    def evaluate(
        self, samples: Samples, *, train: Samples, test: Samples, select: NoisySelection | None
    ) -> Report:
        """Judge `samples` against the real `train` images (fidelity) and the real `test` images (accuracy).

        `select` answers for the private validation records; only eval.mode=val asks it, once per classifier. A metric
        that cannot be computed is listed as missing and never hides the others. Raises UserError when images do not
        have the dataset's size and channels or labels lie outside its classes.
        """
        for what, images in (("samples", samples), ("training images", train), ("test images", test)):
            check_samples(what, images, self.spec)
        inputs = Inputs(
            self.config, self.spec, samples=samples, train=train, test=test, select=select,
            weights_root=self.weights_root, device=self.device, seed=self.seed, cache_dir=self.cache_dir,
        )  # fmt: skip
        report = Report({}, {}, {})
        for metric in dict.fromkeys(METRICS.resolve(value) for value in self.values):
            for name, outcome in self._outcomes(metric, inputs).items():
                if name.split("/")[0] not in self.values:
                    continue
                if isinstance(outcome, Unavailable):
                    report.missing[name] = str(outcome)
                    continue
                outcome = outcome if isinstance(outcome, Value) else Value(outcome)
                report.metrics[name] = float(outcome.value)
                report.metric_info[name] = _info(metric, name, inputs) | outcome.info
        return report

    def _outcomes(self, metric: Metric, inputs: Inputs) -> dict[str, float | Value | Unavailable]:
        """Full names and what became of them."""
        try:
            _check_floor(metric, inputs)
            found = metric.compute(*(getattr(inputs, need) for need in metric.needs))
        except Unavailable as reason:
            found = dict.fromkeys(metric.better, reason)
        found = found if isinstance(found, dict) else {metric.name: found}
        suffix = f"/{check_extractor(self.config.extractor)}" if metric.uses_extractor else ""
        return {name + suffix: outcome for name, outcome in found.items()}


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
    for what, images in counts:
        if len(images) < metric.min_images:
            raise Unavailable(f"needs at least {metric.min_images} {what}, there are {len(images)}")


def _info(metric: Metric, name: str, inputs: Inputs) -> dict:
    """What is known about a value that was computed, besides what its metric says."""
    info = {"better": metric.better[name.split("/")[0]], "n_real": 0, "n_fake": len(inputs.samples)}
    if {"test", "test_features"} & set(metric.needs):
        info["n_real"] = len(inputs.test)
    if {"train", "train_features"} & set(metric.needs):
        info["n_real"] = len(inputs.train)
        info["private"] = "compares with the private training images without noise"
    if metric.uses_extractor:
        info |= {"extractor": inputs.extractor.name, **inputs.extractor.info}
    return info
