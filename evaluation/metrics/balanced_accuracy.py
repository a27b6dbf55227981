"""Balanced accuracy on real test images: every class counts the same, however many test images it has."""

import numpy as np

from evaluation.metrics.accuracy import confusion_matrix, for_each_choice
from evaluation.registry import Value, metric
from utils.errors import Unavailable


@metric("balanced_accuracy", better="higher", needs=("classifiers", "test", "spec"))
def balanced_accuracy(classifiers: list, test, spec) -> dict[str, Value | Unavailable]:
    """The mean over classes of the percent of their test images that is right, per classifier and selection, and the
    mean over the classifiers. Classes without a test image do not count."""
    return for_each_choice(
        "balanced_accuracy", classifiers, lambda logits: _balanced(logits, test.labels, spec.num_classes)
    )


def _balanced(logits: np.ndarray, labels: np.ndarray, num_classes: int) -> Value:
    confusion = confusion_matrix(logits.argmax(axis=1), labels, num_classes)
    of_class = confusion.sum(axis=1)
    shares = confusion.diagonal()[of_class > 0] / of_class[of_class > 0]
    # Always answering one class is right for that class alone.
    return Value(100.0 * float(shares.mean()), {"majority_class": 100.0 / len(shares)})
