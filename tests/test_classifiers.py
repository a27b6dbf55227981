"""Classifiers: published sizes, recipes, training and candidates."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from data.digits import load_digits_8
from data.spec import DataSpec, Samples
from evaluation.classifiers.recipe import Recipe, recipe_for
from evaluation.classifiers.training import (
    _average,
    _batches,
    _scheduler,
    candidate_epochs,
    train_classifier,
    with_noise,
)
from evaluation.registry import CLASSIFIERS, check_classifiers
from utils.config_files import CONFIG_FOLDER
from utils.errors import Unavailable, UserError
from utils.images import to_float
from utils.seeding import seeded

ONE_EPOCH = Recipe("adam", 1e-3, 0.0, decay_every=None, num_epochs=1, batch_size=4)


def spec_of(name: str, resolution: int, channels: int, num_classes: int = 10) -> DataSpec:
    """The toy set "toy" follows the standard protocol, a shipped set the one that its file names."""
    file = CONFIG_FOLDER / "data" / f"{name}.yaml"
    protocol = OmegaConf.load(file).protocol if file.exists() else "standard"
    class_names = tuple(map(str, range(num_classes)))
    return DataSpec(name, resolution, channels, num_classes, 100, class_names, protocol=protocol)


def noise(spec: DataSpec, num: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, *spec.image_shape), dtype=np.uint8)
    return Samples(images, np.arange(num, dtype=np.int64) % spec.num_classes)


def train(name: str, samples: Samples, spec: DataSpec, recipe: Recipe = ONE_EPOCH, seed: int = 0):
    chosen = np.arange(len(samples))
    return train_classifier(
        name, samples, chosen, spec=spec, recipe=recipe, device="cpu", seed=seed, batch_size=5
    )


@pytest.mark.parametrize(
    ("name", "data", "millions"),
    [
        ("resnet", "cifar10_32", 2.61),
        ("resnet", "eurosat_32", 1.73),
        ("wrn", "cifar10_32", 36.5),
        ("wrn", "eurosat_32", 8.95),
        ("resnext", "cifar10_32", 40.6),
        ("resnext", "eurosat_32", 34.4),
    ],
)
def test_published_parameter_counts(name, data, millions):
    with torch.device("meta"):
        network = CLASSIFIERS.resolve(name)(spec_of(data, 32, 3))
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.006 if millions < 10 else 0.06)


@pytest.mark.parametrize("resolution", [8, 28, 32])
@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_one_epoch_of_every_classifier(name, resolution):
    spec = spec_of("toy", resolution, 3 if resolution == 32 else 1, num_classes=7)
    samples = noise(spec, 6)
    trained = train(name, samples, spec)
    logits = trained.logits(0, samples.images)
    assert logits.shape == (6, 7)
    assert np.isfinite(logits).all()
    assert trained.epochs == [1]


@pytest.mark.parametrize("resolution", [4, 7])
@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_tiny_images_are_learned_with_a_last_batch_of_one(name, resolution):
    spec = spec_of("toy", resolution, 1, num_classes=3)
    samples = noise(spec, 9)  # of batches of 4
    assert np.isfinite(train(name, samples, spec).logits(0, samples.images)).all()
    with pytest.raises(Unavailable, match=f"at least 2 training images of {resolution} pixels, there is 1"):
        train(name, samples.take(np.arange(1)), spec)


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_one_image_of_eight_pixels_is_learned(name):
    spec = spec_of("toy", 8, 1, num_classes=3)
    samples = noise(spec, 1)
    assert np.isfinite(train(name, samples, spec).logits(0, samples.images)).all()


@pytest.mark.parametrize(
    ("num", "sizes"), [(1, [1]), (4, [4]), (5, [5]), (6, [4, 2]), (8, [4, 4]), (9, [4, 5])]
)
def test_every_epoch_has_every_image_once_and_none_alone(num, sizes):
    found = list(_batches(np.arange(10, 10 + num), ONE_EPOCH, np.random.default_rng(0)))
    assert [len(batch) for batch in found] == sizes
    assert sorted(np.concatenate(found)) == list(range(10, 10 + num))


def test_small_cnn_takes_large_images():
    spec = spec_of("toy", 128, 3)
    assert CLASSIFIERS.resolve("small_cnn")(spec)(torch.zeros(2, 3, 128, 128)).shape == (2, 10)


def test_quick_recipe_learns_digits():
    samples, test = load_digits_8()
    spec = spec_of("digits_8", 8, 1)
    trained = train("small_cnn", samples, spec, recipe_for("quick", spec, len(samples)))
    assert (trained.logits(-1, test.images).argmax(axis=1) == test.labels).mean() > 0.95


def test_a_class_without_samples_is_still_a_class():
    spec = spec_of("toy", 8, 1)
    samples = noise(spec, 40)
    samples = samples.take(np.flatnonzero(samples.labels < 9))
    assert train("small_cnn", samples, spec).logits(0, samples.images).shape == (36, 10)


@pytest.mark.parametrize("name", ["small_cnn", "wrn"])  # wrn has dropout
def test_training_repeats_and_leaves_the_global_generator_alone(name):
    spec = spec_of("toy", 8, 1)
    samples = noise(spec, 8)
    before = torch.random.get_rng_state()
    first, second, other = (train(name, samples, spec, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in first.states[0].items():
        assert torch.equal(value, second.states[0][key]), key
    assert not torch.equal(first.states[0][key_of_weights(first)], other.states[0][key_of_weights(other)])


def key_of_weights(trained) -> str:
    return next(key for key, value in trained.states[0].items() if value.ndim == 4)


def test_correct_agrees_with_the_logits_of_every_candidate():
    spec = spec_of("toy", 8, 1)
    samples = noise(spec, 12)
    recipe = Recipe("adam", 1e-2, 0.0, decay_every=None, num_epochs=3, batch_size=4)
    trained = train("small_cnn", samples, spec, recipe)
    votes = trained.correct(to_float(samples.images), torch.from_numpy(samples.labels))
    assert votes.shape == (12, 3)
    assert len({tuple(state[key_of_weights(trained)].flatten().tolist()) for state in trained.states}) == 3
    for candidate in range(3):
        expected = trained.logits(candidate, samples.images).argmax(axis=1) == samples.labels
        assert votes[:, candidate].tolist() == expected.astype(float).tolist()
    nothing = trained.correct(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
    assert nothing.shape == (0, 3)


@pytest.mark.parametrize(
    ("num_epochs", "expected"),
    [(1, [1]), (7, [1, 2, 3, 4, 5, 6, 7]), (200, list(range(20, 201, 20))), (50, list(range(5, 51, 5)))],
)
def test_candidate_epochs(num_epochs, expected):
    assert candidate_epochs(num_epochs) == expected


@pytest.mark.parametrize("num_epochs", range(11, 40))
def test_there_are_ten_different_candidates(num_epochs):
    epochs = candidate_epochs(num_epochs)
    assert len(set(epochs)) == 10
    assert epochs == sorted(epochs)
    assert epochs[-1] == num_epochs


def test_paper_recipes():
    cifar = recipe_for("paper", spec_of("cifar100_32", 32, 3), 55_000)
    assert (cifar.optimizer, cifar.learning_rate, cifar.weight_decay) == ("sgd", 0.1, 5e-4)
    assert (cifar.decay_every, cifar.num_epochs, cifar.batch_size, cifar.num_splits) == (60, 200, 126, 1)
    other = recipe_for("paper", spec_of("celeba_male_128", 128, 3), 55_000)
    assert (other.optimizer, other.learning_rate, other.weight_decay) == ("adam", 0.01, 0.0)
    assert (other.decay_every, other.num_epochs, other.batch_size, other.num_splits) == (20, 50, 256, 1)


def test_the_built_in_cifar_sets_alone_follow_the_cifar_protocol():
    """As the published benchmark has it, which these sets must stay comparable with."""
    files = (CONFIG_FOLDER / "data").glob("*.yaml")
    protocols = {path.stem: OmegaConf.load(path).protocol for path in files}
    assert len(protocols) == 11
    for name, protocol in protocols.items():
        assert protocol == ("cifar" if name in ("cifar10_32", "cifar100_32") else "standard"), name


def test_the_name_of_a_set_does_not_choose_its_classifiers():
    own = DataSpec("my_cifar_subset", 32, 3, 2, 100, ("a", "b"))
    assert recipe_for("paper", own, 100).optimizer == "adam"
    assert recipe_for("paper", dataclasses.replace(own, name="x", protocol="cifar"), 100).optimizer == "sgd"
    with torch.device("meta"):
        network = CLASSIFIERS.resolve("wrn")(own)
    assert sum(parameter.numel() for parameter in network.parameters()) < 1e7


def test_learning_rate_falls_by_a_fifth_every_so_many_epochs():
    recipe = recipe_for("paper", spec_of("mnist_28", 28, 1), 1000)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    scheduler = _scheduler(optimizer, recipe, steps_per_epoch=2)
    rates = []
    for _ in range(2 * recipe.num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    by_epoch = rates[::2]
    assert by_epoch[:20] == [0.01] * 20
    assert by_epoch[20:40] == pytest.approx([0.002] * 20)
    assert by_epoch[40:] == pytest.approx([0.0004] * 10)


def test_average_warms_up():
    averaged, network = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(averaged.weight)
    nn.init.ones_(network.weight)
    _average(averaged, network, 1)
    assert averaged.weight.item() == pytest.approx(9 / 11)
    _average(averaged, network, 10**7)
    assert averaged.weight.item() == pytest.approx(9 / 11 + 2 / 11 * 1e-4)


def test_splitting_a_batch_does_not_change_the_gradient(monkeypatch):
    spec = spec_of("toy", 8, 1)
    samples = noise(spec, 10)

    def linear(spec: DataSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, spec.num_classes))

    monkeypatch.setattr(CLASSIFIERS, "resolve", lambda name: linear)
    whole, split = (
        Recipe("sgd", 0.1, 0.0, decay_every=1, num_epochs=2, batch_size=5, num_splits=parts)
        for parts in (1, 3)
    )
    first, second = (train("small_cnn", samples, spec, recipe).states[-1] for recipe in (whole, split))
    for key in first:
        assert torch.allclose(first[key], second[key], atol=1e-6), key


def test_noise_on_inputs_has_a_deviation_of_its_own_for_each_image():
    with seeded(0, "noise"):
        deviations = with_noise(torch.zeros(2000, 1, 16, 16), 0.5).std(dim=(1, 2, 3))
    assert 0.48 < deviations.max() < 0.55
    assert deviations.median().item() == pytest.approx(0.125, abs=0.01)


def test_a_classifier_that_saw_noise_still_sees_shapes_under_noise():
    samples, test = load_digits_8()
    spec = spec_of("digits_8", 8, 1)
    rng = np.random.default_rng(0)
    noisy = np.clip(test.images + rng.normal(0, 90, test.images.shape), 0, 255).astype(np.uint8)
    quick = recipe_for("quick", spec, len(samples))
    right = [
        (train("small_cnn", samples, spec, recipe).logits(-1, noisy).argmax(1) == test.labels).mean()
        for recipe in (quick, dataclasses.replace(quick, input_noise=0.0))
    ]
    assert right[0] > right[1] + 0.03


def test_training_with_noise_repeats_itself():
    spec = spec_of("toy", 8, 1)
    recipe = dataclasses.replace(ONE_EPOCH, input_noise=0.5)
    first, again, without = (
        train("small_cnn", noise(spec, 12), spec, recipe).states[-1] for recipe in (recipe, recipe, ONE_EPOCH)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], without[key]) for key in first)


def test_divergence_is_named():
    spec = spec_of("toy", 8, 1)
    recipe = Recipe("sgd", 1e38, 1.0, decay_every=1, num_epochs=2, batch_size=4)
    with pytest.raises(Unavailable, match="small_cnn diverged"):
        train("small_cnn", noise(spec, 8), spec, recipe)


def test_unknown_and_repeated_classifiers():
    assert check_classifiers(["WRN", "resnet"]) == ["wrn", "resnet"]
    with pytest.raises(UserError, match="did you mean 'resnext'"):
        check_classifiers(["resnex"])
    with pytest.raises(UserError, match="listed twice"):
        check_classifiers(["wrn", "WRN"])


def test_names_are_checked_without_importing_torch():
    code = (
        "import sys; from evaluation.registry import check_classifiers, check_extractor, check_metrics;"
        "check_metrics(['accuracy', 'fid']); check_classifiers(['wrn']); check_extractor('inception');"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
