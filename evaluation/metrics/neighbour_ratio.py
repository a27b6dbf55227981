"""nn_ratio: are samples nearer to the training images than to images that the generator has never seen?"""

import numpy as np

from evaluation.features import in_fixed_order
from evaluation.neighbours import CentredPoints, centre_of, nearest
from evaluation.registry import Value, metric


@metric(
    "nn_ratio",
    better="higher",
    needs=("train_features", "test_features", "sample_features", "device"),
    min_images=10,
    memorisation={"nn_ratio": "1 if the training images left no trace, lower for copies"},
)
def nn_ratio(train: np.ndarray, test: np.ndarray, fake: np.ndarray, device: str = "cpu") -> Value:
    """Mean distance of fake points to the nearest training point, divided by that to the nearest test point.

    Features (N, D), (H, D), (M, D). Both references have equal size, since a larger set is nearer by its size alone:
    the larger one is split into blocks of the size of the smaller, and the mean over the blocks counts. 1 in
    expectation if the training images left no trace. Copies are at distance 0 from one block: 1 - 1 / blocks.
    """
    centre, size = centre_of(train), min(len(train), len(test))
    means, num_blocks = [], []
    for name, points in (("training", train), ("test", test)):
        points = CentredPoints(in_fixed_order(points), centre, device)
        starts = range(0, len(points) - size + 1, size)
        each = [
            nearest(fake, points[start : start + size], centre, f"nearest {name} images")[0]
            for start in starts
        ]
        means.append(sum(squared.sqrt().double().mean().item() for squared in each) / len(each))
        num_blocks.append(len(each))
    ratio = means[0] / means[1] if means[1] > 0 else 1.0
    return Value(ratio, {"reference_size": size, "train_blocks": num_blocks[0], "n_holdout": len(test)})
