"""Frechet distance of two feature sets (Heusel et al. 2017, arXiv:1706.08500)."""

import numpy as np

from evaluation.registry import Value, metric

CHUNK = 8192  # rows that are converted to float64 at a time


@metric("fid", better="lower", needs=("train_features", "sample_features"), min_images=2)
def fid(real: np.ndarray, fake: np.ndarray) -> Value:
    """The Frechet distance, and whether a covariance is rank-deficient because there are fewer images than features."""
    return Value(frechet_distance(real, fake), {"n_below_dim": min(len(real), len(fake)) < real.shape[1]})


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D), (M, D); N, M >= 2. At least 0.

    Exact for singular covariances: no matrix square root, no added diagonal.
    """
    mean_real, covariance_real = _moments(real)
    mean_fake, covariance_fake = _moments(fake)
    traces = np.trace(covariance_real) + np.trace(covariance_fake)
    distance = (
        np.sum((mean_real - mean_fake) ** 2) + traces - 2 * _trace_sqrt(covariance_real, covariance_fake)
    )
    return float(max(distance, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) in float64, without a float64 copy of all features."""
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def _trace_sqrt(first: np.ndarray, second: np.ndarray) -> float:
    """tr((C1 C2)^(1/2)) of two covariances.

    C1 C2 has the eigenvalues of the symmetric matrix R^T C2 R with R R^T = C1; R has one column per eigenvalue of
    C1 that rounding cannot explain.
    """
    eigenvalues, vectors = np.linalg.eigh(first)
    kept = eigenvalues > eigenvalues[-1] * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(eigenvalues[kept])
    product = root.T @ second @ root
    return float(np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum())
