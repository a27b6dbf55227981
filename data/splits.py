"""Fixed splits: which records are test, which are validation, which a trial on a part of a set uses.

Seeds are constants, so every run agrees."""

import numpy as np

from utils.seeding import numpy_rng


def stratified_test_rows(labels: np.ndarray, num_test: int, stream: str) -> np.ndarray:
    """Sorted indices of `num_test` records, as many from each class as its share allows (largest remainder).

    Every class keeps at least one record outside, so fewer are returned when there are that many tiny classes.
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
    """Sorted indices of the `num_used` records that a trial on a part of a set uses: the first of a fixed permutation.

    Depends on nothing but the two counts, so it tells nothing about the records.
    """
    return random_test_rows(num_records, num_used, "training subset")


def validation_split(num_records: int, num_val: int) -> tuple[np.ndarray, np.ndarray]:
    """(train rows, validation rows), both sorted. Depends on nothing but the two counts."""
    held_out = random_test_rows(num_records, num_val, "validation split")
    return np.setdiff1d(np.arange(num_records), held_out, assume_unique=True), held_out
