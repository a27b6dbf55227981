"""The embedded sensitive set: 1,797 real handwritten digits that scikit-learn ships (UCI optdigits)."""

import numpy as np

from data.spec import Samples
from data.splits import stratified_test_rows

NUM_TEST = 360


def load_digits_8() -> tuple[Samples, Samples]:
    """(train, test): 1,437 and 360 images (N, 1, 8, 8), ink 0..16 scaled to uint8 0..255; fixed stratified split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    everything = Samples(images, bunch.target.astype(np.int64))
    test_rows = stratified_test_rows(everything.labels, NUM_TEST, "digits_8 test split")
    train_rows = np.setdiff1d(np.arange(len(everything)), test_rows)
    return everything.take(train_rows), everything.take(test_rows)
