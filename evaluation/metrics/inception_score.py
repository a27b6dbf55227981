"""Inception score (Salimans et al. 2016, arXiv:1606.03498), one split over all images."""

import numpy as np

from evaluation.registry import metric

CHUNK = 8192  # rows that are converted to float64 at a time


@metric("inception_score", better="higher", needs=("sample_logits",), min_images=10)
def inception_score(logits: np.ndarray) -> float:
    """exp(mean KL(p(y|x) || p(y))) of class logits (N, K); between 1 and min(N, K).

    Equal to exp(H(p(y)) - mean H(p(y|x))), which needs one pass.
    """
    total, entropy = np.zeros(logits.shape[1]), 0.0
    for start in range(0, len(logits), CHUNK):
        shifted = logits[start : start + CHUNK].astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        probabilities = np.exp(log_probabilities)
        total += probabilities.sum(axis=0)
        entropy -= (probabilities * log_probabilities).sum()
    marginal = total / len(logits)
    positive = marginal[marginal > 0]
    return float(np.exp(-(positive * np.log(positive)).sum() - entropy / len(logits)))
