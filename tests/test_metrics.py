"""Fidelity and memorisation metrics against closed forms, slow loops and torch-fidelity on the same features."""

import inspect
import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from data.spec import Samples
from evaluation.metrics.accuracy import accuracy, confusion_matrix
from evaluation.metrics.auroc import area, auroc
from evaluation.metrics.authenticity import authpct
from evaluation.metrics.balanced_accuracy import balanced_accuracy
from evaluation.metrics.calibration import ece
from evaluation.metrics.cmmd import cmmd
from evaluation.metrics.density_coverage import density_coverage
from evaluation.metrics.fd_dinov2 import fd_dinov2
from evaluation.metrics.fid import fid, frechet_distance
from evaluation.metrics.fld import Mixture, fld, settled
from evaluation.metrics.inception_score import inception_score
from evaluation.metrics.kid import kid
from evaluation.metrics.mind import mind
from evaluation.metrics.neighbour_ratio import nn_ratio
from evaluation.metrics.precision_recall import precision_recall
from evaluation.neighbours import CentredPoints, centre_of, nearest, nearest_others
from evaluation.report import accuracy_interval
from evaluation.selection import Choice, ClassifierResult


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


@pytest.mark.parametrize("num", [400, 40])
def test_frechet_distance_matches_clean_fid(num):
    clean_fid = pytest.importorskip("cleanfid.fid")
    if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
        pytest.skip("clean-fid calls sqrtm with an argument that this SciPy no longer has")
    real, fake = random_features(num, 64, 3), random_features(num, 64, 4, shift=0.1)
    moments = [part for x in (real, fake) for part in (x.mean(0, dtype=np.float64), np.cov(x, rowvar=False))]
    assert frechet_distance(real, fake) == pytest.approx(clean_fid.frechet_distance(*moments), rel=1e-3)


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
def test_fid_reports_fewer_images_than_features(num, below):
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
    monkeypatch.setattr("evaluation.neighbours.MAX_DISTANCES", 200)  # several blocks
    real, fake = random_features(60, 6, 7), random_features(45, 6, 8, shift=1.5)
    found = precision_recall(real, fake, k=k)
    assert 0 < found["precision"] < 1
    assert found["precision"] == found["precision_k4"] == slow_precision(real, fake, k)
    assert found["recall"] == found["recall_k4"] == slow_precision(fake, real, k)


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
    assert (found["precision_k4"], found["recall_k4"]) == (swapped["recall_k4"], swapped["precision_k4"])
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
    found = precision_recall(repeated, repeated.copy())
    # The published variant leaves the border out, so balls of radius 0 hold nothing.
    assert found == {"precision": 1.0, "recall": 1.0, "precision_k4": 0.0, "recall_k4": 0.0}


def test_known_neighbours_change_nothing():
    real, fake = random_features(80, 8, 11), random_features(70, 8, 12, shift=1.0)
    known = nearest_others(CentredPoints(real, centre_of(real), "cpu"), 5, "neighbours")
    for metric in (precision_recall, density_coverage, authpct):
        assert metric(real, fake, "cpu", known) == metric(real, fake)


def test_nearest_points_are_found_across_blocks(monkeypatch):
    points, others = (random_features(num, 6, seed) for num, seed in ((50, 1), (37, 2)))
    distances = np.linalg.norm(points[:, None].astype(np.float64) - others, axis=2)
    monkeypatch.setattr("evaluation.neighbours.MAX_DISTANCES", 100)
    centre = centre_of(others)
    squared, indices = nearest(points, CentredPoints(others, centre, "cpu"), centre, "nearest")
    assert indices.tolist() == distances.argmin(axis=1).tolist()
    assert squared.sqrt().tolist() == pytest.approx(distances.min(axis=1).tolist(), rel=1e-4)
    own = np.linalg.norm(points[:, None].astype(np.float64) - points, axis=2)
    found = nearest_others(CentredPoints(points, centre, "cpu"), 5, "others").sqrt()
    assert found.numpy() == pytest.approx(np.sort(own, axis=1)[:, 1:6], rel=1e-4)


# ------------------------------------------------------------------------------------------------- KID, CMMD


def test_kid_of_whole_sets_matches_torch_fidelity():
    real, fake = random_features(200, 32, 1), random_features(200, 32, 2, shift=0.5)
    expected = kid_features_to_metric(
        torch.from_numpy(fake.astype(np.float64)), torch.from_numpy(real.astype(np.float64)),
        kid_subsets=1, kid_subset_size=200, verbose=False,
    )["kernel_inception_distance_mean"]  # fmt: skip
    found = kid(real, fake)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.info == {"subset_size": 200}  # every subset is the whole set: no deviation is known
    assert "std" in kid(real, fake[:100]).info


def test_kid_over_subsets_matches_torch_fidelity_up_to_the_draw():
    real, fake = random_features(500, 32, 1), random_features(400, 32, 2, shift=0.5)
    expected = kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=400, kid_subset_size=100, verbose=False
    )  # fmt: skip
    found = kid(real, fake, num_subsets=400, subset_size=100)
    mean, std = (expected[f"kernel_inception_distance_{kind}"] for kind in ("mean", "std"))
    assert found.value == pytest.approx(mean, abs=5 * std / math.sqrt(400))
    assert found.info["std"] == pytest.approx(std, rel=0.25)


def test_mind_of_a_shift_is_three_times_its_square():
    rng = np.random.default_rng(0)
    real, shift = random_features(200, 16, 1), rng.normal(size=16).astype(np.float32)
    found = mind(real, real + shift)
    assert found.value == pytest.approx(3 * shift @ shift, abs=4 * found.info["std_error"])
    assert found.info["std_error"] < 0.1 * found.value
    assert mind(real, real.copy()).value == 0.0


def test_mind_is_the_mean_over_directions_of_scipys_distance_of_lines():
    """In one dimension every direction is the same up to sign; the distance is 2-Wasserstein, squared."""
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(50, 1)).astype(np.float32), rng.normal(2, 3, (50, 1)).astype(np.float32)
    pairs = scipy.optimize.linear_sum_assignment(np.square(real - fake.T))
    expected = np.square(real - fake.T)[pairs].mean()
    assert mind(real, fake).value == pytest.approx(3 * expected, rel=1e-5)


def test_mind_of_sets_of_different_size_ignores_order():
    real, fake = random_features(120, 8, 1), random_features(80, 8, 2, shift=0.5)
    found = mind(real, fake)
    assert found.info["num_used"] == 80
    assert mind(real[::-1], fake[np.random.default_rng(0).permutation(80)]).value == found.value


def test_mind_of_equal_sizes_has_the_error_of_its_directions_alone():
    real, fake = random_features(80, 8, 1), random_features(80, 8, 2, shift=0.5)
    values = [value_of_mind(real, fake, seed) for seed in range(200)]
    assert mind(real, fake, num_projections=30).info["std_error"] == pytest.approx(np.std(values), rel=0.3)


@pytest.mark.parametrize(("num_real", "num_fake"), [(400, 80), (80, 400), (90, 80)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_of_mind_is_its_spread_over_subsets_and_directions(num_real, num_fake, shift):
    real, fake = random_features(num_real, 8, 1), random_features(num_fake, 8, 2, shift=shift)
    values = [value_of_mind(real, fake, seed) for seed in range(200)]
    found = mind(real, fake, num_projections=30)
    assert found.info["std_error"] == pytest.approx(np.std(values), rel=0.35)
    assert found.value == pytest.approx(np.mean(values), abs=4 * found.info["std_error"])


def value_of_mind(real: np.ndarray, fake: np.ndarray, seed: int) -> float:
    """Its formula, with a random subset of the larger set and 30 random directions."""
    rng, count = np.random.default_rng(seed), min(len(real), len(fake))
    directions = rng.normal(size=(30, real.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    sets = [directions @ points[rng.choice(len(points), count, replace=False)].T for points in (real, fake)]
    return 3 * real.shape[1] * float(np.square(np.sort(sets[0]) - np.sort(sets[1])).mean())


def test_kid_is_unbiased_and_ignores_order():
    values = [kid(random_features(60, 8, seed), random_features(60, 8, seed + 100), num_subsets=1).value
              for seed in range(40)]  # fmt: skip
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(40)
    assert min(values) < 0 < max(values)
    real, fake = random_features(90, 8, 1), random_features(70, 8, 2)
    order = np.random.default_rng(0).permutation(70)
    assert kid(real[::-1], fake[order], subset_size=30) == kid(real, fake, subset_size=30)


def slow_mmd(real: np.ndarray, fake: np.ndarray, kernel) -> float:
    """The unbiased estimate, one pair at a time."""

    def mean(pairs) -> float:
        return float(np.mean([kernel(x, y) for x, y in pairs]))

    within = [
        [(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
        for points in (real, fake)
    ]
    return sum(mean(pairs) for pairs in within) - 2 * mean([(x, y) for x in real for y in fake])


def test_cmmd_matches_a_loop(monkeypatch):
    monkeypatch.setattr("evaluation.neighbours.MAX_DISTANCES", 50)
    real, fake = random_features(20, 6, 1), random_features(15, 6, 2, shift=1.0)
    unit = [points / np.linalg.norm(points, axis=1, keepdims=True) for points in (real, fake)]
    expected = 1000 * slow_mmd(*unit, lambda x, y: math.exp(-np.sum((x - y) ** 2) / 200))
    assert cmmd(real, fake) == pytest.approx(expected, rel=1e-5)
    assert cmmd(3 * real, 0.1 * fake) == pytest.approx(expected, rel=1e-5)  # lengths do not count


def test_fd_dinov2_is_the_frechet_distance():
    real, fake = random_features(50, 6, 1), random_features(40, 6, 2)
    assert fd_dinov2(real, fake).value == frechet_distance(real, fake)


# ------------------------------------------------------------------------------------------------- density, coverage


def test_density_and_coverage_of_a_hand_computed_case():
    real = np.array([[0.0], [1.0], [3.0]])  # with k = 1 the balls are [-1, 1], [0, 2] and [1, 5]
    fake = np.array([[0.5], [1.5], [10.0], [-0.25]])  # in 2, 2, 0 and 1 of them
    assert density_coverage(real, fake, k=1) == {"density": 5 / 4, "coverage": 1.0}
    assert density_coverage(real, fake[2:], k=1) == {"density": 1 / 2, "coverage": pytest.approx(1 / 3)}


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_match_a_loop(k, monkeypatch):
    monkeypatch.setattr("evaluation.neighbours.MAX_DISTANCES", 200)
    real, fake = random_features(60, 6, 7), random_features(45, 6, 8, shift=1.5)
    radii = [
        sorted(np.linalg.norm(p - q) for j, q in enumerate(real) if j != i)[k - 1] for i, p in enumerate(real)
    ]
    inside = np.array([[np.linalg.norm(x - p) <= r for p, r in zip(real, radii, strict=True)] for x in fake])
    found = density_coverage(real, fake, k=k)
    assert found == {"density": pytest.approx(inside.sum() / (k * 45)), "coverage": inside.any(axis=0).mean()}
    assert density_coverage(real[::-1], fake[::-1], k=k) == pytest.approx(found)


@pytest.mark.parametrize("grid", [False, True], ids=["no ties", "ties"])
def test_only_ties_distinguish_density_coverage_precision_and_recall_from_prdc(grid):
    """The formulas of the package prdc: other points alone count as neighbours, and a ball is open."""
    real, fake = random_features(60, 3, 7), random_features(45, 3, 8, shift=0.5)
    if grid:  # many equal distances
        real, fake = np.round(real), np.round(fake)
    radii = {
        (name, k): np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, k]
        for name, points in (("real", real), ("fake", fake))
        for k in (3, 5)
    }
    distances = np.linalg.norm(real[:, None] - fake, axis=2)
    expected = {
        "density": (distances < radii["real", 5][:, None]).sum(axis=0).mean() / 5,
        "coverage": (distances.min(axis=1) < radii["real", 5]).mean(),
        "precision": (distances < radii["real", 3][:, None]).any(axis=0).mean(),
        "recall": (distances < radii["fake", 3]).any(axis=1).mean(),
    }
    found = density_coverage(real, fake) | precision_recall(real, fake)
    for name, value in expected.items():
        if grid:
            assert found[name] > value, name
        else:
            assert found[name] == pytest.approx(value), name


def test_density_is_one_on_equal_distributions_and_one_outlier_does_not_move_it():
    real, fake = random_features(800, 4, 1), random_features(800, 4, 2)
    found = density_coverage(real, fake)
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] > 0.9
    outlier = np.concatenate([real, real[:1] + 1e3])
    assert density_coverage(outlier, fake)["density"] < 1.5 * found["density"]


# ------------------------------------------------------------------------------------------------- FLD, memorisation


def slow_nll(mixture: Mixture, points: np.ndarray) -> float:
    """Per feature, from the density of the centres written out."""
    dim = points.shape[1]
    variances, centres = mixture.log_variances.exp().double().numpy(), mixture.centres.double().numpy()
    total = 0.0
    for point in points.astype(np.float64):
        squared = ((point - centres) ** 2).sum(axis=1)
        total -= np.log(np.mean(np.exp(-squared / (2 * variances)) / (2 * math.pi * variances) ** (dim / 2)))
    return total / len(points) / dim


def slow_fit(centres, points, num_epochs: int) -> tuple[torch.Tensor, list[float]]:
    """Log-variances of the centres, and the losses, of a fit by automatic differentiation as the authors define it:
    beside the centres there is a background of weight 1 at the mean, whose distances count 0.9 times."""
    dim, num = points.shape[1], len(centres)
    squared = torch.cdist(points, centres) ** 2
    to_mean = 0.81 * ((points - points.mean(dim=0)) ** 2).sum(dim=1, keepdim=True)
    own = ((squared.min(dim=0).values + 1e-3) / dim).log().requires_grad_()
    wide = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([own, wide], lr=0.5)
    losses = []
    for _ in range(num_epochs):
        weights = torch.tensor([math.log(1 / num)] * num + [0.0])
        log_variances, distances = torch.cat([own, wide]), torch.cat([squared, to_mean], dim=1)
        logs = (
            weights - distances / log_variances.exp() / 2 - dim / 2 * (log_variances + math.log(2 * math.pi))
        )
        loss = -logs.logsumexp(dim=1).mean() / dim
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return own.detach(), losses


def test_likelihood_of_the_mixture_is_that_of_its_density(monkeypatch):
    centres, points, others = (torch.from_numpy(random_features(n, 3, n)) for n in (12, 40, 25))
    mixture = Mixture(centres, points)
    assert mixture.nll(others) == pytest.approx(slow_nll(mixture, others.numpy()), rel=1e-5)
    monkeypatch.setattr("evaluation.metrics.fld.MAX_DISTANCES", 30)  # rows in several parts
    assert mixture.nll(others) == pytest.approx(slow_nll(mixture, others.numpy()), rel=1e-5)
    assert Mixture(centres, points).nll(points) == pytest.approx(mixture.nll(points), rel=1e-4)


@pytest.mark.parametrize("num_epochs", [1, 20])
def test_the_mixture_is_fitted_as_automatic_differentiation_does(monkeypatch, num_epochs):
    monkeypatch.setattr("evaluation.metrics.fld.MAX_EPOCHS", num_epochs)
    monkeypatch.setattr("evaluation.metrics.fld.settled", lambda losses: False)
    centres, points = (torch.from_numpy(random_features(n, 3, n)) for n in (12, 40))
    expected, _ = slow_fit(centres, points, num_epochs)
    assert torch.allclose(Mixture(centres, points).log_variances, expected, rtol=1e-2, atol=1e-2)


def test_the_fit_continues_when_the_loss_rises_and_stops_when_it_is_constant(monkeypatch):
    assert not settled([5.0, 5.0, 5.0, 5.0, 5.0, 5.0])  # six epochs are too few
    assert settled([9.0, 8.0, 5.0, 5.0, 5.0, 5.0004, 5.0])
    assert not settled([9.0, 8.0, 5.0006, 5.0, 5.0, 5.0, 5.0])
    assert not settled([9.0, 8.0, 7.0, 6.0, 5.0, 6.0, 7.0])
    centres, points = (torch.from_numpy(random_features(n, 3, n)) for n in (12, 40))
    _, losses = slow_fit(centres, points, 50)
    assert any(later > loss for loss, later in itertools.pairwise(losses[:10]))  # Adam overshoots
    seen = []
    monkeypatch.setattr(
        "evaluation.metrics.fld.settled", lambda found: seen.append(found[-1]) or settled(found)
    )
    Mixture(centres, points)
    assert 7 <= len(seen) < 50 and seen == pytest.approx(losses[: len(seen)], abs=1e-3)


def test_the_baseline_has_as_many_centres_as_there_are_samples(generators):
    train, test = generators["train"], generators["test"]
    found = {num: fld(train, test, generators["fresh"][:num]) for num in (20, 200, 400)}
    centres = {num: values["fld"].info["num_baseline_centres"] for num, values in found.items()}
    assert centres == {20: 20, 200: 200, 400: 200}  # at most half of the training images
    # 20 good samples are as good as 20 training images.
    assert abs(found[20]["fld"].value) < 10


def test_fld_is_finite_where_samples_coincide_and_are_far_off(generators):
    train, test = generators["train"], generators["test"]
    for fake in (np.repeat(train[:1], 50, axis=0), np.full((50, 6), 1e4, np.float32)):
        found = fld(train, test, fake)
        assert all(np.isfinite(value.value) for value in found.values())
        assert found["fld"].value > 10


@pytest.fixture(scope="module")
def generators() -> dict[str, np.ndarray]:
    """Features of training and test images, and of generators of four kinds."""
    train, test, fresh = (random_features(n, 6, seed) for n, seed in ((400, 1), (200, 2), (400, 3)))
    rng = np.random.default_rng(0)
    copies = train + 1e-3 * rng.normal(size=train.shape).astype(np.float32)
    collapsed = fresh[:1] + 0.1 * rng.normal(size=fresh.shape).astype(np.float32)
    return {"train": train, "test": test, "fresh": fresh, "copies": copies, "collapsed": collapsed,
            "lacking": fresh[fresh[:, 0] > 0]}  # fmt: skip


def test_fld_distinguishes_copies_collapse_and_a_missing_part_from_fresh_draws(generators):
    train, test = generators["train"], generators["test"]
    found = {name: {key: value.value for key, value in fld(train, test, generators[name]).items()}
             for name in ("fresh", "copies", "collapsed", "lacking")}  # fmt: skip
    assert all(found[name]["fld"] > found["fresh"]["fld"] + 1 for name in ("copies", "collapsed", "lacking"))
    assert abs(found["fresh"]["fld"]) < 5  # as good as the baseline of training images
    # Only on the training images do copies look good, which is what the published variant measures.
    assert found["copies"]["fld_train"] < found["fresh"]["fld_train"]
    assert found["copies"]["fld_gap"] < -10 < found["fresh"]["fld_gap"] < 10
    for values in found.values():
        assert values["fld_gap"] == pytest.approx(values["fld_train"] - values["fld"])


def test_fld_ignores_order_and_scale(generators):
    train, test, fake = (generators[name] for name in ("train", "test", "fresh"))
    found = fld(train, test, fake)
    shuffled = fld(train[::-1], test[::-1], fake[::-1])
    scaled = fld(*(10 * points + 3 for points in (train, test, fake)))
    for name, value in found.items():
        assert shuffled[name].value == pytest.approx(value.value, rel=1e-3)
        assert scaled[name].value == pytest.approx(value.value, rel=1e-2, abs=0.02)


def test_authpct_of_a_hand_computed_case_and_of_copies(generators):
    real = np.array([[0.0], [1.0], [4.0]])  # nearest others at 1, 1, 3
    fake = np.array([[0.2], [6.5], [8.0], [-1.0]])  # nearest 0, 4, 4, 0 at 0.2, 2.5, 4, 1
    assert authpct(real, fake) == 25.0  # 8.0 alone; at equal distance a point is no more authentic
    assert authpct(generators["train"], generators["copies"]) == 0.0
    assert authpct(generators["train"], generators["fresh"]) == pytest.approx(50, abs=8)
    assert authpct(generators["train"][::-1], generators["fresh"][::-1]) == pytest.approx(
        authpct(generators["train"], generators["fresh"])
    )


def test_ratio_of_distances_to_training_and_unseen_points(generators):
    train, test = generators["train"], generators["test"]
    fresh, copies = (nn_ratio(train, test, generators[name]) for name in ("fresh", "copies"))
    assert fresh.value == pytest.approx(1, abs=0.08)
    assert copies.value < 0.7
    assert fresh.info == {"reference_size": 200, "train_blocks": 2, "n_holdout": 200}
    assert nn_ratio(train[::-1], test[::-1], generators["copies"][::-1]).value == pytest.approx(copies.value)
    # A line: distances to the one training block 1 and 2, to the test points 2 and 1.5.
    real, unseen, fake = (np.array(points)[:, None] for points in ([0.0, 10.0], [3.0, 9.5], [1.0, 8.0]))
    assert nn_ratio(real, unseen, fake).value == pytest.approx(1.5 / 1.75)


@pytest.mark.parametrize("metric", ["fid", "kid", "mind", "recall", "coverage"])
def test_a_missing_class_worsens_the_metric(generators, metric):
    def value(fake: np.ndarray) -> float:
        real = generators["train"]
        found = {"fid": lambda: fid(real, fake).value, "kid": lambda: kid(real, fake, num_subsets=10).value,
                 "mind": lambda: mind(real, fake).value,
                 "recall": lambda: precision_recall(real, fake)["recall"],
                 "coverage": lambda: density_coverage(real, fake)["coverage"]}  # fmt: skip
        return found[metric]()

    whole, lacking = value(generators["fresh"]), value(generators["lacking"])
    assert lacking > 1.5 * whole if metric in ("fid", "kid", "mind") else lacking < 0.9 * whole


# ------------------------------------------------------------------------------------------------- classifiers


def test_calibration_error_of_hand_computed_cases():
    even = np.zeros((4, 2))  # confidence 0.5, always class 0
    assert ece(even, np.array([0, 0, 1, 1])) == pytest.approx(0.0)
    assert ece(even, np.array([0, 0, 0, 0])) == pytest.approx(0.5)
    sure = np.array([[100.0, 0.0]] * 4)
    assert ece(sure, np.array([0, 1, 1, 1])) == pytest.approx(0.75)
    # Gaps of different bins do not cancel: 0.5 too little in one half, 1 too much in the other.
    assert ece(np.concatenate([even, sure]), np.array([0] * 4 + [1] * 4)) == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["unsure", "sure"])
def test_metrics_of_classifiers_match_scikit_learn(num_classes, scale):
    rng = np.random.default_rng(num_classes)
    shares = rng.dirichlet(np.ones(num_classes))
    labels = np.concatenate([np.arange(num_classes), rng.choice(num_classes, 300, p=shares)])
    logits = rng.normal(size=(len(labels), num_classes)).round(1)  # with ties
    logits[np.arange(len(labels)), labels] += 0.7
    logits = (scale * logits).astype(np.float32)
    choice = Choice(1, logits)
    judged = [ClassifierResult("a", 10, 1, {"last_epoch": choice})]
    blank = np.zeros((len(labels), 1, 2, 2), np.uint8)
    test, spec = Samples(blank, labels.astype(np.int64)), SimpleNamespace(num_classes=num_classes)
    predicted, constant = logits.argmax(axis=1), np.full(len(labels), np.bincount(labels).argmax())
    found = accuracy(judged, test, spec)["accuracy/a/last_epoch"]
    assert found.value == pytest.approx(100 * sklearn.metrics.accuracy_score(labels, predicted))
    level = found.info["majority_class"]
    assert level == pytest.approx(100 * sklearn.metrics.accuracy_score(labels, constant))
    found = balanced_accuracy(judged, test, spec)["balanced_accuracy/a/last_epoch"]
    assert found.value == pytest.approx(100 * sklearn.metrics.balanced_accuracy_score(labels, predicted))
    level = found.info["majority_class"]
    assert level == pytest.approx(100 * sklearn.metrics.balanced_accuracy_score(labels, constant))
    found = auroc(judged, test)["auroc/mean/last_epoch"]
    if num_classes == 2:
        odds = logits[:, 1].astype(np.float64) - logits[:, 0]
        assert found.value == pytest.approx(sklearn.metrics.roc_auc_score(labels, odds))
    elif scale == 1.0:  # the probabilities of sure answers are rounded to 0 and 1
        chances = scipy.special.softmax(logits.astype(np.float64), axis=1)
        expected = sklearn.metrics.roc_auc_score(labels, chances, multi_class="ovr", average="macro")
        assert found.value == pytest.approx(expected, abs=1e-3)  # rounding decides some ties
    assert found.info["majority_class"] == 0.5


def test_a_class_without_test_images_counts_for_neither_balanced_accuracy_nor_auroc():
    labels = np.array([0, 0, 0, 2, 2])
    logits = np.array([[3.0, 0, 0], [3, 0, 0], [0, 0, 3], [0, 3, 0], [0, 0, 3]], np.float32)
    judged = [ClassifierResult("a", 10, 1, {"last_epoch": Choice(1, logits)})]
    test = Samples(np.zeros((5, 1, 2, 2), np.uint8), labels)
    found = balanced_accuracy(judged, test, SimpleNamespace(num_classes=3))["balanced_accuracy/a/last_epoch"]
    assert found.value == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert found.info["majority_class"] == 50.0
    by_pairs = [area_by_pairs(logits, labels, label) for label in (0, 2)]
    assert area(logits, labels) == pytest.approx(np.mean(by_pairs))


def area_by_pairs(logits: np.ndarray, labels: np.ndarray, label: int) -> float:
    """The share of pairs of an image of the class and another one that are in the right order; half of ties."""
    scores = scipy.special.softmax(logits.astype(np.float64), axis=1)[:, label]
    differences = scores[labels == label][:, None] - scores[labels != label]
    return float(np.mean(np.where(np.isclose(differences, 0), 0.5, differences > 0)))


def test_confusion_matrix_has_true_classes_in_rows():
    found = confusion_matrix(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 2]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(("count", "share"), [(10, 0.99), (20, 0.5), (200, 0.75), (200, 0.995)])
def test_the_interval_covers_the_true_accuracy(count, share):
    chances = scipy.stats.binom.pmf(np.arange(count + 1), count, share)
    intervals = [accuracy_interval(right, count) for right in range(count + 1)]
    covered = [low <= 100 * share <= high for low, high in intervals]
    assert chances @ covered >= 0.95


def test_the_interval_of_a_perfect_accuracy_has_a_length():
    low, high = accuracy_interval(10, 10)
    assert (low, high) == (pytest.approx(100 * 0.025**0.1), 100.0)
    assert accuracy_interval(0, 10) == pytest.approx([0.0, 100 - low])
    assert accuracy_interval(150, 200) == pytest.approx([68.4, 80.8], abs=0.1)


MEMORY = """
import resource, sys
import numpy as np, torch
torch.set_num_threads(1)
from evaluation.metrics.precision_recall import precision_recall
points = np.random.default_rng(0).normal(size=(2, 16000, 8)).astype(np.float32)
precision_recall(points[0, :200], points[1, :200])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
precision_recall(*points)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (2**20 if sys.platform == "darwin" else 2**10))
"""


def test_memory_does_not_grow_with_the_product_of_the_sizes():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 300  # MiB; all distances would be 977, and there are three such matrices
