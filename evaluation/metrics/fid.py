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
    traces = np.trace(first_covariance) + np.trace(second_covariance)
    if len(fewer) <= len(first_mean):  # the centred points are then a root of their covariance
        root = (fewer - first_mean).T / np.sqrt(len(fewer) - 1)
        trace_of_root = trace_sqrt_by_root(root, second_covariance)
    else:
        trace_of_root = trace_sqrt(first_covariance, second_covariance)
    return float(max(np.sum((first_mean - second_mean) ** 2) + traces - 2 * trace_of_root, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) in float64, without a float64 copy of all features."""
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def trace_sqrt(first: np.ndarray, second: np.ndarray) -> float:
    """tr((C1 C2)^(1/2)) of two covariances (D, D), which is a sum over the eigenvalues of C1 C2.

    For C1 = R R^T they are those of the symmetric matrix R^T C2 R. R is the Cholesky factor; a singular C1 has a root
    with one column per eigenvalue that rounding cannot explain.
    """
    from scipy.linalg import LinAlgError, cholesky
    from scipy.linalg.blas import dtrmm

    try:
        root = cholesky(first, lower=True, check_finite=False)
    except LinAlgError:
        eigenvalues, vectors = np.linalg.eigh(first)
        kept = eigenvalues > eigenvalues[-1] * np.finfo(np.float64).eps
        return trace_sqrt_by_root(vectors[:, kept] * np.sqrt(eigenvalues[kept]), second)
    # Products with a triangle take half the time.
    product = dtrmm(1.0, root, second, side=1, lower=1)
    return _sum_of_roots(dtrmm(1.0, root, product, side=0, lower=1, trans_a=1, overwrite_b=1))


def trace_sqrt_by_root(root: np.ndarray, second: np.ndarray) -> float:
    """The same for C1 = R R^T with any root R (D, r)."""
    return _sum_of_roots(root.T @ second @ root)


def _sum_of_roots(product: np.ndarray) -> float:
    """Sum of the roots of the eigenvalues of a symmetric matrix, of which those below 0 are rounding."""
    from scipy.linalg import eigvalsh

    return float(np.sqrt(np.clip(eigvalsh(product, driver="evd"), 0, None)).sum())
