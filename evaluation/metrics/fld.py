"""Feature likelihood divergence (Jiralerspong et al. 2023, arXiv:2302.04440), on test and on training images.

Legend: N points to be explained, M centres, D features.
"""

import math

import numpy as np

from evaluation.neighbours import MAX_DISTANCES, CentredPoints, squared_distances
from evaluation.ordering import in_own_order
from evaluation.registry import Value, metric
from utils.progress import progress

MAX_CENTRES = 10_000
LEARNING_RATE, MAX_EPOCHS, BATCH_SIZE, STOP_BELOW = 0.5, 50, 10_000, 5e-4
BACKGROUND_SCALE = 0.9  # distances to the background component are shrunk, so that it reaches far points
MIN_LOG_VARIANCE = math.log(1e-6)  # of standardised features: a centre on top of a point would need -inf


@metric(
    "fld",
    better={"fld": "lower", "fld_train": "lower", "fld_gap": "higher"},
    needs=("train_features", "test_features", "sample_features", "device"),
    min_images=20,
)
def fld(train: np.ndarray, test: np.ndarray, fake: np.ndarray, device: str = "cpu") -> dict[str, Value]:
    """100 times the negative log-likelihood per feature under a mixture that is centred on the samples, less that of
    a baseline mixture of training images. Features (N, D), (H, D), (M, D).

    `fld` explains the test images (the original), `fld_train` the training images (the variant of the published
    benchmark); `fld_gap` is fld_train - fld: far below 0 where the samples fit the training images alone, as copies do.
    """
    centre, scale = test.mean(axis=0, dtype=np.float64), test.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1
    width = scale.astype(np.float32)
    train, test, fake = (
        CentredPoints(in_own_order(points) / width, centre / scale, device)[:]
        for points in (train, test, fake)
    )
    half = len(train) // 2
    baseline = Mixture(train[:half][:MAX_CENTRES], train[half:]).nll(test)
    mixture = Mixture(fake[:MAX_CENTRES], train)
    on_test, on_train = (100 * (mixture.nll(points) - baseline) for points in (test, train))
    info = {"num_centres": min(len(fake), MAX_CENTRES), "n_test": len(test)}
    values = {"fld": on_test, "fld_train": on_train, "fld_gap": on_train - on_test}
    return {name: Value(value, info) for name, value in values.items()}


class Mixture:
    """Equally weighted isotropic Gaussians, one per row of `centres` (M, D) and a wide one at the mean of `points`;
    their variances are fitted to `points` (N, D) by maximum likelihood."""

    def __init__(self, centres, points) -> None:
        import torch

        self.centres, self.background = centres, points.mean(dim=0, keepdim=True)
        distances = self._distances(points)
        self.log_variances = (
            (distances.min(dim=0).values / points.shape[1]).log().clamp_(min=MIN_LOG_VARIANCE)
        )
        optimizer = torch.optim.Adam([self.log_variances], lr=LEARNING_RATE)
        before = math.inf
        for _ in progress(range(MAX_EPOCHS), "fit FLD", unit="epoch"):
            total = 0.0
            for start in range(0, len(points), BATCH_SIZE):
                total += self._step(distances[start : start + BATCH_SIZE], optimizer)
            if before - total / len(points) < STOP_BELOW * abs(before if math.isfinite(before) else 1):
                break
            before = total / len(points)

    def nll(self, points) -> float:
        """Mean negative log-likelihood of points (N, D), per feature."""
        total = 0.0
        for rows in self._rows(len(points)):
            total -= self._exponents(self._distances(points[rows])).logsumexp(dim=1).double().sum().item()
        return (total / len(points) + math.log(len(self.log_variances))) / points.shape[1]

    def _step(self, distances, optimizer) -> float:
        """One step of the optimiser on a batch of distances (B, M + 1); returns the batch's summed negative
        log-likelihood per feature before it. The gradient of log-variance s is mean(r (D - d / e^s)) / 2, r the share
        of the component in the point."""
        import torch

        dim = self.centres.shape[1]
        gradient, total = torch.zeros_like(self.log_variances), 0.0
        for rows in self._rows(len(distances)):
            exponents = self._exponents(distances[rows])
            log_density = exponents.logsumexp(dim=1, keepdim=True)
            shares = (exponents - log_density).exp_()
            gradient += (shares * (dim - distances[rows] * (-self.log_variances).exp())).sum(dim=0) / 2
            total -= (log_density - math.log(len(self.log_variances))).double().sum().item()
        self.log_variances.grad = gradient / (len(distances) * dim)
        optimizer.step()
        self.log_variances.clamp_(min=MIN_LOG_VARIANCE)
        return total / dim

    def _exponents(self, distances):
        """Log-densities (B, M + 1) of the components at squared distances of that shape."""
        dim = self.centres.shape[1]
        return -0.5 * (
            distances * (-self.log_variances).exp() + dim * (self.log_variances + math.log(2 * math.pi))
        )

    def _distances(self, points):
        """Squared distances (N, M + 1) to all centres, the background last."""
        import torch

        found = torch.empty(len(points), len(self.centres) + 1, device=points.device)
        for rows in self._rows(len(points)):
            found[rows, :-1] = squared_distances(points[rows], self.centres)
            found[rows, -1:] = squared_distances(points[rows], self.background) * BACKGROUND_SCALE**2
        return found

    def _rows(self, num_points: int):
        step = max(1, MAX_DISTANCES // (len(self.centres) + 1))
        return (slice(start, start + step) for start in range(0, num_points, step))
