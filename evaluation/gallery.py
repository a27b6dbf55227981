"""Samples beside the training images that are nearest to them."""

import numpy as np

from evaluation.inputs import Passes
from evaluation.neighbours import CentredPoints, centre_of, nearest, squared_distances

PER_CLASS, NEIGHBOURS, MAX_ROWS = 2, 4, 40


def nearest_training(passes: Passes, labels: np.ndarray, device: str) -> dict[int, list[int]]:
    """Sample -> its NEIGHBOURS nearest training images by features, nearest first; rows count from 0.

    Per class the PER_CLASS samples that are closest to a training image: where copies would show.
    """
    train, fake = passes.train_features, passes.sample_features
    centre = centre_of(train)
    train = CentredPoints(train, centre, device)
    closeness = nearest(fake, train, centre, "gallery")[0].cpu().numpy()
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rows = [of_class[np.argsort(closeness[of_class], kind="stable")[:PER_CLASS]] for of_class in rows]
    chosen = np.concatenate(rows)[:MAX_ROWS]
    squared = squared_distances(CentredPoints(fake[chosen], centre, device)[:], train[:])
    found = squared.topk(min(NEIGHBOURS, len(train)), largest=False).indices
    return {int(row): neighbours for row, neighbours in zip(chosen, found.tolist(), strict=True)}
