"""The synthetic population of Private Evolution: shares of the classes, and survival by noisy votes."""

import numpy as np

SELECTIONS = ("sample", "rank")


def class_sizes(total: int, num_classes: int) -> np.ndarray:
    """(num_classes,) int64: `total` divided evenly, the first classes one more. Private proportions have no say."""
    return total // num_classes + (np.arange(num_classes) < total % num_classes)


def class_labels(total: int, num_classes: int) -> np.ndarray:
    """(total,) int64: one block per class."""
    return np.repeat(np.arange(num_classes, dtype=np.int64), class_sizes(total, num_classes))


def consecutive(sizes: np.ndarray) -> list[slice]:
    """Ranges of these sizes, one after the other."""
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def survivors(
    votes: np.ndarray, count: int, selection: str, threshold: float, rng: np.random.Generator
) -> np.ndarray:
    """(count,) indices of the candidates of one class that survive, chosen by their noisy votes (n,).

    "sample" draws with replacement, in proportion to a candidate's votes above `threshold`. If no candidate has votes
    above it, all are equally likely; this rule uses only the released numbers, so it reveals nothing more about the
    private records. "rank" takes the `count` candidates with the most votes, the first of equal ones; it does not
    depend on the threshold.
    """
    if selection == "rank":
        return np.argsort(-votes, kind="stable")[:count]
    weights = np.maximum(votes.astype(np.float64) - threshold, 0.0)
    total = weights.sum()
    return rng.choice(len(votes), size=count, p=weights / total if total > 0 else None)
