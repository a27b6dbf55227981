"""Feature likelihood divergence (Jiralerspong et al. 2023, arXiv:2302.04440), on test and on training images.

Legend: N points to be explained, M centres, D features.
"""

import math

import numpy as np

from evaluation.features import in_fixed_order
from evaluation.neighbours import MAX_DISTANCES, CentredPoints, squared_distances
from evaluation.registry import Value, metric
from utils.progress import progress

MAX_CENTRES = 10_000
LEARNING_RATE, MAX_EPOCHS, BATCH_SIZE = 0.5, 50, 10_000
# The fit may stop after so many epochs, once the mean losses of the last few agree. Fewer are no sign of the end: with
# this learning rate the loss rises for an epoch before it falls on.
MIN_EPOCHS, LAST_LOSSES, STOP_BELOW = 7, 5, 5e-4
BACKGROUND_SCALE = 0.9  # distances to the background component are shrunk, so that it reaches far points
# Of standardised features: a centre on top of a point would need -inf, and one that explains no point may drift.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = math.log(1e-6), 40.0


@metric(
    "fld",
    better={"fld": "lower", "fld_train": "lower", "fld_gap": "higher"},
    needs=("train_features", "test_features", "sample_features", "device"),
    min_images=20,
    memorisation={"fld_gap": "about 0 for fresh images, far below 0 for copies"},
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
        CentredPoints(in_fixed_order(points) / width, centre / scale, device)[:]
        for points in (train, test, fake)
    )
    half = len(train) // 2
    fake = fake[:MAX_CENTRES]
    # As many centres as there are samples: fewer explain less, however good they are.
    num_baseline = min(len(fake), half)
    baseline = Mixture(train[:num_baseline], train[num_baseline:]).nll(test)
    mixture = Mixture(fake, train)
    on_test, on_train = (100 * (mixture.nll(points) - baseline) for points in (test, train))
    info = {"num_centres": len(fake), "num_baseline_centres": num_baseline, "n_test": len(test)}
    values = {"fld": on_test, "fld_train": on_train, "fld_gap": on_train - on_test}
    return {name: Value(value, info) for name, value in values.items()}


class Mixture:
    """Equally weighted isotropic Gaussians, one per row of `centres` (M, D); their variances are fitted to `points`
    (N, D) by maximum likelihood. In the fit alone one more Gaussian at the mean of `points`, which weighs as much as
    all others together, takes the points that are far from every centre."""

    def __init__(self, centres, points) -> None:
        import torch

        self.centres, self.dim = centres, points.shape[1]
        distances = self._distances_with_background(points)
        nearest = distances.min(dim=0).values + 1e-3
        self._log_variances = (nearest / self.dim).log().clamp_(min=MIN_LOG_VARIANCE)
        self._log_variances[-1] = 0
        optimizer = torch.optim.Adam([self._log_variances], lr=LEARNING_RATE)
        losses = []
        for _ in progress(range(MAX_EPOCHS), "fit FLD", unit="epoch"):
            total = 0.0
            for start in range(0, len(points), BATCH_SIZE):
                total += self._step(distances[start : start + BATCH_SIZE], optimizer)
            losses.append(total / len(points))
            if settled(losses):
                break

    @property
    def log_variances(self):
        """Of the centres (M,)."""
        return self._log_variances[:-1]

    def nll(self, points) -> float:
        """Mean negative log-likelihood of points (N, D), per feature."""
        total = 0.0
        for rows in self._rows(len(points)):
            exponents = _exponents(
                squared_distances(points[rows], self.centres), self.log_variances, self.dim
            )
            total -= exponents.logsumexp(dim=1).double().sum().item()
        return (total / len(points) + math.log(len(self.centres))) / self.dim

    def _step(self, distances, optimizer) -> float:
        """One step of the optimiser on a batch of distances (B, M + 1); returns the batch's summed negative
        log-likelihood per feature before it. The gradient of log-variance s is mean(r (D - d / e^s)) / 2, r the share
        of the component in the point."""
        import torch

        gradient, total = torch.zeros_like(self._log_variances), 0.0
        for rows in self._rows(len(distances)):
            exponents = _exponents(distances[rows], self._log_variances, self.dim)
            exponents[:, :-1] -= math.log(len(self.centres))
            log_density = exponents.logsumexp(dim=1, keepdim=True)
            shares = (exponents - log_density).exp_()
            scaled = distances[rows] * (-self._log_variances).exp()
            gradient += (shares * (self.dim - scaled)).sum(dim=0) / 2
            total -= log_density.double().sum().item()
        self._log_variances.grad = gradient / (len(distances) * self.dim)
        optimizer.step()
        self._log_variances.clamp_(min=MIN_LOG_VARIANCE, max=MAX_LOG_VARIANCE)
        return total / self.dim

    def _distances_with_background(self, points):
        """Squared distances (N, M + 1) to all centres, the background last."""
        import torch

        found = torch.empty(len(points), len(self.centres) + 1, device=points.device)
        background = points.mean(dim=0, keepdim=True)
        for rows in self._rows(len(points)):
            found[rows, :-1] = squared_distances(points[rows], self.centres)
            found[rows, -1:] = squared_distances(points[rows], background) * BACKGROUND_SCALE**2
        return found

    def _rows(self, num_points: int):
        step = max(1, MAX_DISTANCES // (len(self.centres) + 1))
        return (slice(start, start + step) for start in range(0, num_points, step))


def settled(losses: list[float]) -> bool:
    """Is the last loss of an epoch no other than the few before it?"""
    last = losses[-LAST_LOSSES:]
    return len(losses) >= MIN_EPOCHS and max(abs(losses[-1] - loss) for loss in last) < STOP_BELOW


def _exponents(distances, log_variances, dim: int):
    """Log-densities (B, M) of Gaussians of (M,) log-variances in `dim` dimensions at squared distances (B, M)."""
    return -0.5 * (distances * (-log_variances).exp() + dim * (log_variances + math.log(2 * math.pi)))
