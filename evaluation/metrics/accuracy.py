"""Accuracy on real test images of classifiers trained on the samples."""

import numpy as np

from evaluation.errors import Unavailable
from evaluation.registry import Value, metric
from evaluation.selection import BEST_TEST


@metric("accuracy", better="higher", needs=("classifiers", "test"))
def accuracy(classifiers: list, test) -> dict[str, Value | Unavailable]:
    """Percent of `test` that is right, per classifier and selection, and the mean over the classifiers.

    The mean is missing when one of its classifiers is.
    """
    values = {}
    for selection in classifiers[0].choices:
        each = {judged.name: _percent(judged, selection, test.labels) for judged in classifiers}
        values |= {f"accuracy/{name}/{selection}": value for name, value in each.items()}
        values[f"accuracy/mean/{selection}"] = _mean(each)
    return values


def _percent(judged, selection: str, labels: np.ndarray) -> Value | Unavailable:
    choice = judged.choices[selection]
    if isinstance(choice, Unavailable):
        return choice
    info = {"n_fake": judged.num_train, "epoch": choice.epoch, "num_epochs": judged.num_epochs}
    if selection == BEST_TEST:
        info["private"] = "the epoch is chosen on the test images without noise; not a private result"
    return Value(100.0 * float((choice.logits.argmax(axis=1) == labels).mean()), info)


def _mean(each: dict[str, Value | Unavailable]) -> Value | Unavailable:
    missing = [name for name, value in each.items() if isinstance(value, Unavailable)]
    if missing:
        return Unavailable(f"no value for {', '.join(missing)}")
    percents = [value.value for value in each.values()]
    info = {"std": float(np.std(percents)), "max": max(percents), "classifiers": list(each)}
    shared = next(iter(each.values())).info
    info |= {key: shared[key] for key in ("n_fake", "private") if key in shared}
    return Value(float(np.mean(percents)), info)
