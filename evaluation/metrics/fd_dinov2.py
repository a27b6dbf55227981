"""Frechet distance of DINOv2 features (Stein et al. 2023, arXiv:2306.04675)."""

import numpy as np

from evaluation.metrics.fid import fid
from evaluation.registry import Value, metric


@metric(
    "fd_dinov2", better="lower", needs=("train_features", "sample_features"), extractor="dinov2", min_images=2
)
def fd_dinov2(real: np.ndarray, fake: np.ndarray) -> Value:
    return fid(real, fake)
