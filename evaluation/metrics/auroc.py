"""Area under the receiver operating characteristic (AUROC) on real test images."""

import numpy as np

from evaluation.metrics.accuracy import for_each_choice
from evaluation.registry import Value, metric
from utils.errors import Unavailable


@metric("auroc", better="higher", needs=("classifiers", "test"))
def auroc(classifiers: list, test) -> dict[str, Value | Unavailable]:
    """The AUROC in [0, 1] per classifier and selection, and the mean over the classifiers; of more than two classes the
    mean over the classes of each against all others. Classes without a test image do not count."""
    if len(np.unique(test.labels)) < 2:
        raise Unavailable("needs test images of at least two classes")
    return for_each_choice(
        "auroc",
        classifiers,
        # Scores that do not look at the image are in a random order.
        lambda logits: Value(area(logits, test.labels), {"majority_class": 0.5}),
    )


def area(logits: np.ndarray, labels: np.ndarray) -> float:
    """One class against the others, on average over the classes that `labels` (N,) has; logits (N, K)."""
    from scipy.special import logsumexp
    from sklearn.metrics import roc_auc_score

    logits, areas = logits.astype(np.float64), []
    for label in np.unique(labels):
        # The log odds rank images as the probability of the class does, but are not rounded to 1.
        odds = logits[:, label] - logsumexp(np.delete(logits, label, axis=1), axis=1)
        areas.append(roc_auc_score(labels == label, odds))
    return float(np.mean(areas))
