"""Estimated duration of an evaluation, for --dry_run: extrapolated from a few measured batches."""

from pathlib import Path

import numpy as np

from data.spec import DataSpec
from evaluation.ceiling import with_ceiling
from evaluation.registry import CLASSIFIERS, METRICS, check_extractor, check_metrics, need_classifiers
from utils.errors import Unavailable
from utils.sections import EvalConfig
from utils.timing import Cost, batch_rows, seconds_of

MEASURED_POINTS = 1024  # in the measured block of distances


def evaluation_costs(
    config: EvalConfig, spec: DataSpec, num_samples: int, num_test: int, weights_root: Path, device: str
) -> list[Cost]:
    """The costs of training classifiers on the samples and, for ceilings, on the real images; of the features of all
    images; and of distances between them. Extractors that are not available on this machine are left out."""
    metrics = [METRICS.resolve(name) for name in check_metrics(config.metrics)]
    needs = {need for metric in metrics for need in metric.needs}
    costs, ceilings = [], with_ceiling(config)
    for name, cost, seconds in _classifier_costs(config, spec, num_samples, num_test, device):
        costs.append(cost)
        costs += [_ceiling_cost(name, seconds, config, spec, num_test)] if name in ceilings else []
    real = spec.num_train * bool(needs & {"train_features", "train_neighbours"})
    real += num_test * bool(needs & {"train_features", "test_features", "test_logits"})
    extractors = {
        metric.extractor or check_extractor(config.extractor) for metric in metrics if metric.uses_extractor
    }
    for name in sorted(extractors):
        costs += _feature_cost(name, spec, real, num_samples, weights_root, device)
    if "train_neighbours" in needs:
        costs.append(_neighbour_cost(spec.num_train, num_samples + num_test, device))
    return costs


def classifier_costs(
    config: EvalConfig, spec: DataSpec, num_samples: int, num_test: int, device: str
) -> dict[str, Cost]:
    """The costs of training each classifier on the samples; {} if no metric needs classifiers."""
    found = _classifier_costs(config, spec, num_samples, num_test, device)
    return {name: cost for name, cost, _ in found}


def _classifier_costs(
    config: EvalConfig, spec: DataSpec, num_samples: int, num_test: int, device: str
) -> list[tuple[str, Cost, tuple[float, float]]]:
    """Per classifier its name, the cost, and the measured seconds per image."""
    if not need_classifiers(config.metrics):
        return []
    found = []
    for name in map(CLASSIFIERS.canonical, config.classifiers):
        seconds = _seconds_per_image(name, spec, device)
        found.append((name, _classifier_cost(name, seconds, config, spec, num_samples, num_test), seconds))
    return found


def _seconds_per_image(name: str, spec: DataSpec, device: str) -> tuple[float, float]:
    """Of training and of testing the classifier."""
    import torch

    network = CLASSIFIERS.resolve(name)(spec).to(device, memory_format=torch.channels_last)
    rows = max(2, batch_rows(spec.resolution))
    images = torch.zeros(rows, *spec.image_shape, device=device).contiguous(memory_format=torch.channels_last)
    training = seconds_of(lambda: network(images).sum().backward()) / rows
    with torch.no_grad():
        testing = seconds_of(lambda: network.eval()(images)) / rows
    return training, testing


def _classifier_cost(
    name: str,
    seconds: tuple[float, float],
    config: EvalConfig,
    spec: DataSpec,
    num_samples: int,
    num_test: int,
) -> Cost:
    """Of training on the samples, of testing every candidate on the held-out samples, and two on the test images."""
    from evaluation.classifiers.recipe import recipe_for
    from evaluation.classifiers.training import candidate_epochs
    from evaluation.selection import split_samples

    chosen, held_out = split_samples(num_samples, config.num_val)
    num_epochs = recipe_for(config.recipe, spec, len(chosen)).num_epochs
    num_tested = len(held_out) * len(candidate_epochs(num_epochs)) + 2 * num_test
    text = f"{num_epochs} epochs x {len(chosen):,} samples, {num_test:,} test images"
    total = num_epochs * len(chosen) * seconds[0] + num_tested * seconds[1]
    return Cost(f"classifier {name}", text, total)


def _ceiling_cost(
    name: str, seconds: tuple[float, float], config: EvalConfig, spec: DataSpec, num_test: int
) -> Cost:
    """Of training on all real training images, and of testing the last epoch."""
    from evaluation.classifiers.recipe import recipe_for

    num_epochs = recipe_for(config.recipe, spec, spec.num_train).num_epochs
    text = f"{num_epochs} epochs x {spec.num_train:,} real images, unless cached (eval.ceiling)"
    total = num_epochs * spec.num_train * seconds[0] + num_test * seconds[1]
    return Cost(f"ceiling {name}", text, total)


def _feature_cost(
    name: str, spec: DataSpec, num_real: int, num_samples: int, weights_root: Path, device: str
) -> list[Cost]:
    import torch

    from extractors import EXTRACTORS

    try:
        extractor = EXTRACTORS.resolve(name)(spec, weights_root, device)
    except Unavailable:  # --dry_run lists it as missing
        return []
    rows = batch_rows(spec.resolution)
    images = torch.zeros(rows, *spec.image_shape, dtype=torch.uint8, device=device)
    with torch.no_grad():
        seconds = seconds_of(lambda: extractor(images)) / rows
    text = f"{num_real:,} real images, unless cached, and {num_samples:,} samples"
    return [Cost(f"features {name}", text, (num_real + num_samples) * seconds)]


def _neighbour_cost(num_train: int, others: int, device: str) -> Cost:
    import torch

    from evaluation.neighbours import squared_distances

    points = torch.as_tensor(
        np.random.default_rng(0).random((MEASURED_POINTS, 256), np.float32), device=device
    )
    seconds = seconds_of(lambda: squared_distances(points, points).topk(5, dim=1, largest=False))
    pairs = num_train * (num_train / 2 + others)
    text = f"distances between {num_train:,} real images, and from them to {others:,} others"
    return Cost("neighbours", text, pairs / MEASURED_POINTS**2 * seconds)
