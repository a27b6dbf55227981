"""What real images score: the best that a metric can be expected to say about samples."""

import numpy as np

from evaluation.inputs import Inputs
from evaluation.registry import Metric, Value
from utils.errors import Unavailable
from utils.seeding import numpy_rng


def real_floor(metric: Metric, inputs: Inputs, extractor: str) -> dict[str, float]:
    """The metric's values with real images in the place of the samples, by name; {} where there are too few.

    These are test images; a metric that also compares with the test images gets one half of them as samples and the
    other as test images. Classifiers are trained on the real training images (evaluation/ceiling.py).
    """
    passes = inputs.passes(extractor)
    stand_in = rest = np.arange(len(inputs.test))
    if "test_features" in metric.needs:
        order = numpy_rng(0, "real floor").permutation(len(stand_in))
        stand_in, rest = order[: len(order) // 2], order[len(order) // 2 :]
    if min(len(stand_in), len(rest)) < metric.min_images:
        return {}
    replaced = {
        "sample_features": lambda: passes.test_features[stand_in],
        "sample_logits": lambda: passes.test_logits[stand_in],
        "test_features": lambda: passes.test_features[rest],
        "classifiers": lambda: inputs.real_classifiers,
    }
    given = [replaced[need]() if need in replaced else inputs.given(need, extractor) for need in metric.needs]
    found = metric.compute(*given)
    found = found if isinstance(found, dict) else {metric.name: found}
    return {
        name: float(outcome.value if isinstance(outcome, Value) else outcome)
        for name, outcome in found.items()
        if not isinstance(outcome, Unavailable)
    }
