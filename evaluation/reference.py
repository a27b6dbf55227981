"""What real images score: the reference next to every value of the samples."""

import numpy as np

from evaluation.inputs import Inputs
from evaluation.registry import Metric, Value
from utils.errors import Unavailable
from utils.seeding import numpy_rng


def num_as_samples(metric: Metric, inputs: Inputs) -> int:
    """The number of test images that stand for samples."""
    return len(inputs.test) // 2 if "test_features" in metric.needs else len(inputs.test)


def real_values(metric: Metric, inputs: Inputs, extractor: str) -> dict[str, float]:
    """The metric's values for real images instead of the samples, by name; {} if there are too few real images.

    The real images are test images. A metric that also compares with test images gets one half of them as samples and
    the other half as test images. Classifiers are trained on the real training images (evaluation/ceiling.py).
    """
    features, count = inputs.features(extractor), num_as_samples(metric, inputs)
    as_samples = as_test = np.arange(len(inputs.test))
    if count < len(as_samples):
        order = numpy_rng(0, "real floor").permutation(len(as_samples))
        as_samples, as_test = order[:count], order[count:]
    if min(len(as_samples), len(as_test)) < metric.min_images:
        return {}
    replaced = {
        "sample_features": lambda: features.test_features[as_samples],
        "sample_logits": lambda: features.test_logits[as_samples],
        "test_features": lambda: features.test_features[as_test],
        "classifiers": lambda: inputs.real_classifiers,
    }
    arguments = [
        replaced[need]() if need in replaced else inputs.get(need, extractor) for need in metric.needs
    ]
    found = metric.compute(*arguments)
    found = found if isinstance(found, dict) else {metric.name: found}
    return {
        name: float(outcome.value if isinstance(outcome, Value) else outcome)
        for name, outcome in found.items()
        if not isinstance(outcome, Unavailable)
    }
