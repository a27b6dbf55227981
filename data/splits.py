"""Fixed splits: test records, validation records, and the records of a run on a part of a set.

Seeds are constants, so every run uses the same splits."""

import numpy as np

from data.groups import grouped_rows
from utils.seeding import numpy_rng


def stratified_test_rows(labels: np.ndarray, num_test: int, stream: str) -> np.ndarray:
    """Sorted indices of `num_test` records, in proportion to the classes (largest remainder).

    Every class keeps at least one record outside, so fewer are returned if there are many tiny classes.
    """
    rng = numpy_rng(0, stream)
    counts = np.bincount(labels)
    exact = counts * (num_test / len(labels))
    quota = np.floor(exact).astype(int)
    for label in np.argsort(quota - exact, kind="stable")[: num_test - quota.sum()]:
        quota[label] += 1
    quota = np.minimum(quota, np.maximum(counts - 1, 0))
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:share] for label, share in enumerate(quota)]
    return np.sort(np.concatenate(chosen))


def random_test_rows(num_records: int, num_test: int, stream: str) -> np.ndarray:
    """Sorted indices of `num_test` of `num_records` records, drawn without regard to the labels."""
    return np.sort(numpy_rng(0, stream).permutation(num_records)[:num_test])


def training_subset(num_records: int, num_used: int) -> np.ndarray:
    """Sorted indices of the `num_used` records of a run on a part of a set: the first of a fixed permutation.

    Depends only on the two counts, so it reveals nothing about the records.
    """
    return random_test_rows(num_records, num_used, "training subset")


def public_share(labels: np.ndarray, num_public: int, num_classes: int, seed: int) -> np.ndarray:
    """Sorted indices of the records that are declared public: of each class the first num_public / num_classes in a
    permutation that depends on the seed and on the number of records alone.

    `labels` (N,) decide only to which class a record counts; every class must have that many.
    """
    order = numpy_rng(seed, "public share").permutation(len(labels))
    each = num_public // num_classes
    chosen = [order[labels[order] == label][:each] for label in range(num_classes)]
    assert all(len(rows) == each for rows in chosen), "a class has too few records"
    return np.sort(np.concatenate(chosen))


def validation_split(
    num_records: int, num_val: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(train rows, validation rows), both sorted. Depends only on the two counts, and on `groups` (N,) if they
    are given: then whole groups are held out, with about num_val records."""
    if groups is None:
        held_out = random_test_rows(num_records, num_val, "validation split")
    else:
        held_out = grouped_rows(groups, num_val, "validation split")
    return np.setdiff1d(np.arange(num_records), held_out, assume_unique=True), held_out
