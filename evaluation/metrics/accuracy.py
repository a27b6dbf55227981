"""Accuracy on real test images of classifiers trained on the samples, and what its sister metrics share with it."""

from collections.abc import Callable

import numpy as np

from evaluation.registry import Value, metric
from evaluation.report import accuracy_interval
from evaluation.selection import NOT_PRIVATE, RELEASED
from utils.errors import Unavailable


@metric("accuracy", better="higher", needs=("classifiers", "test", "spec"))
def accuracy(classifiers: list, test, spec) -> dict[str, Value | Unavailable]:
    """Percent of `test` that is right, per classifier and selection, and the mean over the classifiers.

    The mean is missing when one of its classifiers is.
    """
    return for_each_choice(
        "accuracy", classifiers, lambda logits: _percent(logits, test.labels, spec.num_classes)
    )


def for_each_choice(
    metric_name: str, classifiers: list, value_of: Callable[[np.ndarray], Value]
) -> dict[str, Value | Unavailable]:
    """`value_of` the logits (N, K) on the test images, per classifier and selection, and the mean over the classifiers
    that were trained on the samples."""
    values = {}
    for selection in dict.fromkeys(name for judged in classifiers for name in judged.choices):
        each = {
            judged.name: _value(judged, selection, value_of)
            for judged in classifiers
            if selection in judged.choices
        }
        values |= {f"{metric_name}/{name}/{selection}": value for name, value in each.items()}
        trained = {name: value for name, value in each.items() if name != RELEASED}
        if trained:
            values[f"{metric_name}/mean/{selection}"] = _mean(trained)
    return values


def facts(judged, selection: str) -> dict:
    """What a number about this choice of this classifier carries."""
    info = {
        "n_fake": judged.num_train, "epoch": judged.choices[selection].epoch, "num_epochs": judged.num_epochs
    }  # fmt: skip
    return info | ({"private": NOT_PRIVATE[selection]} if selection in NOT_PRIVATE else {})


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,), (N,) -> counts (K, K): row = true class, column = predicted class."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


def _value(judged, selection: str, value_of: Callable[[np.ndarray], Value]) -> Value | Unavailable:
    choice = judged.choices[selection]
    if isinstance(choice, Unavailable):
        return choice
    found = value_of(choice.logits)
    return Value(found.value, facts(judged, selection) | found.info, found.details)


def _percent(logits: np.ndarray, labels: np.ndarray, num_classes: int) -> Value:
    confusion = confusion_matrix(logits.argmax(axis=1), labels, num_classes)
    right, of_class = confusion.trace(), confusion.sum(axis=1)
    per_class = [
        100.0 * row[k] / n if n else None for k, (row, n) in enumerate(zip(confusion, of_class, strict=True))
    ]
    info = {
        "interval_95": accuracy_interval(right, len(labels)),
        "majority_class": 100.0 * float(of_class.max() / len(labels)),
    }
    details = {"per_class": per_class, "confusion": confusion.tolist()}
    return Value(100.0 * float(right / len(labels)), info, details)


def _mean(each: dict[str, Value | Unavailable]) -> Value | Unavailable:
    missing = [name for name, value in each.items() if isinstance(value, Unavailable)]
    if missing:
        return Unavailable(f"no value for {', '.join(missing)}")
    values = {name: value.value for name, value in each.items()}
    found = list(values.values())
    info = {"std": float(np.std(found)), "max": max(found), "classifiers": list(each), "values": values}
    shared = next(iter(each.values())).info
    info |= {key: shared[key] for key in ("n_fake", "private", "majority_class") if key in shared}
    return Value(float(np.mean(found)), info)
