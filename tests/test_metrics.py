"""Fidelity metrics against closed forms, slow loops and torch-fidelity on the same features."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.metrics.fid import fid, frechet_distance
from evaluation.metrics.inception_score import inception_score
from evaluation.metrics.precision_recall import precision_recall


def gaussian(num: int, mean: np.ndarray, root: np.ndarray, seed: int) -> np.ndarray:
    """Points (num, D) whose sample mean is `mean` and whose sample covariance is root^T root, both exactly."""
    points = np.random.default_rng(seed).normal(size=(num, len(mean)))
    points -= points.mean(axis=0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(points, rowvar=False)), points.T).T
    return white @ root + mean


def random_features(num: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim))
    return (rng.normal(size=(num, dim)) @ mixing + shift).astype(np.float32)


@pytest.mark.parametrize("zeroed", [0, 3])
def test_frechet_distance_of_diagonal_gaussians(zeroed):
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 8)
    first[:zeroed] = 0.0  # a singular covariance
    second[-zeroed or 8 :] = 0.0
    means = rng.normal(size=(2, 8))
    real, fake = gaussian(50, means[0], np.diag(first), 1), gaussian(60, means[1], np.diag(second), 2)
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((first - second) ** 2)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("num", [300, 12])  # 12 images of 20 features: both covariances are singular
def test_frechet_distance_matches_sqrtm(num):
    real, fake = random_features(num, 20, 1), random_features(num, 20, 2, shift=0.3)
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(20)).real
    difference = real.mean(0, dtype=np.float64) - fake.mean(0, dtype=np.float64)
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num", [400, 40])
def test_frechet_distance_matches_torch_fidelity(num):
    real, fake = random_features(num, 64, 3), random_features(num, 64, 4, shift=0.1)
    statistics = [fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (real, fake)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_of_equal_sets_is_zero_and_order_does_not_matter():
    real, fake = random_features(100, 32, 5), random_features(90, 32, 6)
    assert frechet_distance(real, real.copy()) == pytest.approx(0.0, abs=1e-8 * np.trace(np.cov(real.T)))
    shuffled = fake[np.random.default_rng(0).permutation(90)]
    assert frechet_distance(real, shuffled) == pytest.approx(frechet_distance(real, fake), rel=1e-9)
    assert frechet_distance(fake, real) == pytest.approx(frechet_distance(real, fake), rel=1e-9)


def test_chunks_do_not_change_the_frechet_distance(monkeypatch):
    real, fake = random_features(100, 16, 5), random_features(90, 16, 6)
    whole = frechet_distance(real, fake)
    monkeypatch.setattr("evaluation.metrics.fid.CHUNK", 7)
    assert frechet_distance(real, fake) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(("num", "below"), [(31, True), (32, False)])
def test_fid_says_when_there_are_fewer_images_than_features(num, below):
    assert fid(random_features(64, 32, 0), random_features(num, 32, 1)).info["n_below_dim"] is below


def test_inception_score_bounds():
    confident = 100 * np.eye(10, dtype=np.float32)[np.arange(50) % 10]
    assert inception_score(confident) == pytest.approx(10.0)
    assert inception_score(np.zeros((50, 10), np.float32)) == pytest.approx(1.0)
    assert inception_score(confident[:1].repeat(50, axis=0)) == pytest.approx(1.0)


def test_inception_score_matches_torch_fidelity_and_ignores_order(monkeypatch):
    logits = 3 * np.random.default_rng(0).normal(size=(200, 30)).astype(np.float32) + 1000
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=1)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("evaluation.metrics.inception_score.CHUNK", 17)
    assert inception_score(logits[::-1]) == pytest.approx(expected, rel=1e-6)


def slow_precision(real: np.ndarray, fake: np.ndarray, k: int) -> float:
    """The share of fake points that lie in a ball around some real point, one pair at a time."""
    radii = []
    for i, point in enumerate(real):
        others = sorted(np.linalg.norm(point - other) for j, other in enumerate(real) if j != i)
        radii.append(others[k - 1])
    inside = [any(np.linalg.norm(x - p) <= r for p, r in zip(real, radii, strict=True)) for x in fake]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_match_a_loop(k, monkeypatch):
    monkeypatch.setattr("evaluation.metrics.precision_recall.MAX_DISTANCES", 200)  # several blocks
    real, fake = random_features(60, 6, 7), random_features(45, 6, 8, shift=1.5)
    found = precision_recall(real, fake, k=k)
    assert 0 < found["precision"] < 1
    assert found == {"precision": slow_precision(real, fake, k), "recall": slow_precision(fake, real, k)}


def test_precision_recall_match_torch_fidelity():
    real, fake = random_features(300, 16, 9), random_features(250, 16, 10, shift=1.0)
    expected = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real),
        prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    found = precision_recall(real, fake)
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)


def test_precision_recall_symmetry_and_order():
    real, fake = random_features(80, 8, 11), random_features(70, 8, 12, shift=1.0)
    found, swapped = precision_recall(real, fake), precision_recall(fake, real)
    assert found["precision"] != found["recall"]
    assert (found["precision"], found["recall"]) == (swapped["recall"], swapped["precision"])
    assert precision_recall(real[::-1], fake[::-1]) == found


def test_a_collapsed_generator_has_high_precision_and_low_recall():
    real = random_features(200, 16, 13)
    rng = np.random.default_rng(0)
    collapsed = real[:1] + 0.01 * rng.normal(size=(200, 16)).astype(np.float32)
    found = precision_recall(real, collapsed)
    assert found["precision"] == 1.0
    assert found["recall"] <= 0.05


def test_identical_points_count_as_equal_far_from_the_origin():
    # All balls have radius 0, so only an exact distance of 0 counts as inside.
    points = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32) * 30 + 500
    repeated = np.repeat(points, 5, axis=0)
    assert precision_recall(repeated, repeated.copy()) == {"precision": 1.0, "recall": 1.0}
