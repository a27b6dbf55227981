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
    fewer, more = sorted((real, fake), key=len)
    first_mean, first_covariance = _moments(fewer)
    second_mean, second_covariance = _moments(more)
    # With no more points than features the centred points are a root of their covariance.
    few = len(fewer) <= len(first_mean)
    root = (fewer - first_mean).T / np.sqrt(len(fewer) - 1) if few else root_of(first_covariance)
    traces = np.trace(first_covariance) + np.trace(second_covariance)
    trace_of_root = trace_sqrt(root, second_covariance)
    return float(max(np.sum((first_mean - second_mean) ** 2) + traces - 2 * trace_of_root, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) in float64, without a float64 copy of all features."""
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def root_of(covariance: np.ndarray) -> np.ndarray:
    """R with R R^T = C (D, D): the Cholesky factor, or for a singular C its eigenvectors, one column per eigenvalue
    that rounding cannot explain."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        eigenvalues, vectors = np.linalg.eigh(covariance)
    kept = eigenvalues > eigenvalues[-1] * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def trace_sqrt(root: np.ndarray, second: np.ndarray) -> float:
    """tr((C1 C2)^(1/2)) for C1 = R R^T: C1 C2 has the eigenvalues of the symmetric matrix R^T C2 R."""
    product = root.T @ second @ root
    return float(np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum())
