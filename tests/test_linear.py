"""DP-Linear: sensitivity of its releases, its features, its classifier as a file, resuming."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from data.spec import DataSpec, PublicData, Samples
from models.linear.classifier import LinearClassifier
from models.linear.features import FeatureConfig, FeatureMap
from models.linear.fit import LEAST_RIDGE
from models.released.classifier import ORIGIN, logits_of, read_classifier, write_classifier
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.private_data import PrivateData
from utils.errors import UserError

PIXELS = FeatureConfig("pixels", None, 0.5, 0.3)
FITS = ("class_means", "least_squares", "sgd")
SGD = ("train.fit=sgd", "train.batch_size=30", "train.n_epochs=4", "train.snapshot_freq=2", "train.lr=1.0")


def feature_map(spec: DataSpec, tmp_path, config: FeatureConfig = PIXELS) -> FeatureMap:
    return FeatureMap(config, spec, tmp_path, "cpu")


def digits() -> tuple[DataSpec, Samples, Samples]:
    """(spec, training part, test part) of the embedded digits."""
    from data.digits import load_digits_8

    train, test = load_digits_8()
    names = tuple(map(str, range(10)))
    return DataSpec("digits_8", 8, 1, 10, len(train), names), train, test


# -------------------------------------------------------------------------------------------------------- features


def test_features_have_the_norm_that_the_noise_is_scaled_for(spec, samples, tmp_path):
    blank = np.zeros((1, *samples.images.shape[1:]), np.uint8)
    images = torch.from_numpy(np.concatenate([samples.images, blank]))
    features = feature_map(spec, tmp_path)(images)
    norms = features.norm(dim=1)
    assert torch.allclose(norms[:-1], torch.full((60,), math.hypot(1, 0.3)))
    assert norms[-1] == pytest.approx(0.3)  # nothing but the constant


def test_float_images_have_the_features_of_their_pixels(spec, samples, tmp_path):
    images = torch.from_numpy(samples.images)
    features = feature_map(spec, tmp_path)
    assert torch.equal(features(images), features(images / 127.5 - 1))


def test_directions_come_from_public_images_alone(spec, public, tmp_path):
    features = feature_map(spec, tmp_path, FeatureConfig("pixels", 5, 1.0, 0.3))
    features.learn(public)
    assert features.num_features == 6
    pixels = public.samples.images.reshape(48, -1) / 255
    centred = pixels - pixels.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    projected = centred @ features.directions.double().numpy()
    # Whole whitening: every direction has the same second moment on the public images.
    assert np.allclose(projected.T @ projected / 48, np.eye(5), atol=1e-4)


def test_more_directions_than_features_are_refused(make_method):
    with pytest.raises(UserError, match=r"num_directions.*65.*64"):
        make_method("DP-Linear", "model.num_directions=65")


# -------------------------------------------------------------------------------------------------------- releases


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("fit", ["class_means", "least_squares"])
def test_the_worst_record_moves_the_sum_by_the_bound(fit, relation, make_method, samples, spec, monkeypatch):
    """White and black images are the most different ones; the noise is scaled for what one of them changes."""
    method = make_method("DP-Linear", f"train.fit={fit}")
    images, labels = samples.images.copy(), samples.labels.copy()
    images[0] = 255
    changed = images.copy()
    changed[0], other = 0, labels.copy()
    other[0] = (labels[0] + 1) % 3
    neighbour = Samples(changed, other)
    if relation == "add_or_remove_one":
        neighbour = Samples(images[1:], labels[1:])
    sums, bounds = [], []
    original = PrivateData.noisy_sum

    def record(self, name, fn, l2_bound, by_class=False):
        bounds.append(l2_bound)
        sums.append(original(self, name, fn, l2_bound, by_class))
        return sums[-1]

    monkeypatch.setattr(PrivateData, "noisy_sum", record)
    for records in (Samples(images, labels), neighbour):
        ledger = Ledger(Budget(math.inf, 1e-5), relation=relation)
        ledger.adopt(method.privacy_plan())
        method.train(PrivateData(records, spec, ledger))
    moved = float((sums[0] - sums[1]).double().norm())
    most = bounds[0] * (2 if relation == "replace_one" else 1)
    assert moved <= most * (1 + 1e-6)
    if relation == "add_or_remove_one":
        assert moved == pytest.approx(bounds[0], rel=1e-5)  # and the bound is not too large


@pytest.mark.parametrize("fit", FITS)
def test_every_fit_classifies_digits_without_noise(fit, make_private):
    from models.dp_linear import DPLinear
    from utils.runtime import Runtime

    spec, train, test = digits()
    config = small(fit)
    method = DPLinear(config, spec, Runtime())
    ledger = Ledger(Budget(math.inf, 1e-5))
    ledger.adopt(method.privacy_plan())
    method.train(PrivateData(train, spec, ledger))
    logits = logits_of(method.released_classifier(), test.images, "cpu")
    assert (logits.argmax(1) == test.labels).mean() > 0.88


def small(fit: str):
    from conftest import small_config

    return small_config("DP-Linear", (f"train.fit={fit}", "train.batch_size=400", "train.n_epochs=20"), "10")


def test_least_squares_without_noise_are_the_normal_equations(make_trial, samples):
    trial = make_trial("DP-Linear", "train.fit=least_squares", epsilon=math.inf)
    trial.run()
    fit = trial.synthesizer.linear
    x = fit.features(torch.from_numpy(samples.images)).double()
    y = torch.nn.functional.one_hot(torch.from_numpy(samples.labels), 3).double()
    ridge = LEAST_RIDGE * 60 * torch.eye(x.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T
    assert torch.allclose(fit.layer.weight.double(), expected, rtol=0.05, atol=0.05)


def test_less_noise_than_nothing_is_known_about_rare_classes(make_trial):
    """A class whose noisy number is negative still gets finite weights."""
    trial = make_trial("DP-Linear", "train.fit=class_means", epsilon=0.01)
    trial.run()
    assert torch.isfinite(trial.synthesizer.linear.layer.weight).all()


# ------------------------------------------------------------------------------------------------- the classifier


def test_the_file_gives_the_same_classifier(make_trial, samples, spec, tmp_path):
    trial = make_trial("DP-Linear", "model.num_directions=5", "public_data.name=glyphs")
    trial.run()
    classifier, path = trial.synthesizer.released_classifier(), tmp_path / "classifier.pth"
    write_classifier(path, classifier, spec, dict.fromkeys(ORIGIN) | {"method": "DP-Linear"})
    read = read_classifier(path, tmp_path, "cpu")
    assert isinstance(read.classifier, LinearClassifier)
    assert (read.class_names, read.resolution, read.channels) == (spec.class_names, 8, 1)
    assert read.origin["method"] == "DP-Linear"
    images = samples.images
    assert np.array_equal(logits_of(read.classifier, images, "cpu"), logits_of(classifier, images, "cpu"))


def test_the_file_names_the_extractor_that_auto_chose(make_method):
    settings = make_method("DP-Linear", "model.features=auto").released_classifier().settings()
    assert settings["features"] in ("inception", "random_conv")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classifier": 99}, "version"),
        ({"kind": "tree"}, "kind"),
        ({"class_names": None}, "class_names"),
        ({"settings": {}}, "settings"),
        ({"class_names": [0, 1, 2]}, "class_names"),
        ({"origin": {}}, "origin"),
        ({"resolution": -3}, "resolution"),
        ({"channels": 7}, "channels"),
        ({"state": "weights"}, "state"),
        ({"state": {"layer.weight": torch.full((3, 65), torch.nan)}}, "NaN"),
        ({"resolution": 16}, "damaged"),
        (
            {"settings": {"features": "pixels", "num_directions": 3, "whitening": 0.5, "constant": 0.3}},
            "damaged",
        ),
    ],
)
def test_a_damaged_file_is_one_line(change, named, make_trial, spec, tmp_path):
    trial = make_trial("DP-Linear")
    trial.run()
    path = tmp_path / "classifier.pth"
    write_classifier(path, trial.synthesizer.released_classifier(), spec, dict.fromkeys(ORIGIN))
    content = torch.load(path, weights_only=True)
    torch.save({**content, **change}, path)
    with pytest.raises(UserError, match=named):
        read_classifier(path, tmp_path, "cpu")


def test_the_classifier_treats_every_image_by_itself(make_trial, samples):
    trial = make_trial("DP-Linear")
    trial.run()
    classifier = trial.synthesizer.released_classifier()
    assert isinstance(classifier, nn.Module) and not classifier.training
    together = logits_of(classifier, samples.images, "cpu")
    alone = np.concatenate([logits_of(classifier, samples.images[k : k + 1], "cpu") for k in range(60)])
    assert np.allclose(together, alone, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- images


def test_class_means_are_images_only_if_features_are_pixels(make_method):
    assert make_method("DP-Linear").makes_images
    assert not make_method("DP-Linear", *SGD).makes_images
    assert not make_method("DP-Linear", "model.features=random_conv").makes_images
    assert not make_method("DP-Linear", "model.num_directions=5", "public_data.name=glyphs").makes_images


def test_the_images_are_the_class_means(make_trial, samples):
    trial = make_trial("DP-Linear", epsilon=math.inf)
    trial.run()
    drawn = trial.synthesizer.generate(3)
    pixels = samples.images.reshape(60, -1) / 255
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    means = np.stack([unit[samples.labels == label].mean(0) for label in range(3)])
    expected = 255 * means / means.max(1, keepdims=True)
    assert np.abs(drawn.images.reshape(3, -1) - expected).max() <= 1


# ---------------------------------------------------------------------------------------------------------- resume


def test_sgd_resumes_at_its_booked_step(make_trial):
    whole = make_trial("DP-Linear", *SGD, noise_seed=1)
    whole.run()
    stopped = make_trial("DP-Linear", *SGD, noise_seed=1)
    states = []

    def stop(stage: str) -> None:
        states.append((stage, stopped.synthesizer.state_dict(), stopped.private.ledger.executed("linear")))
        raise KeyboardInterrupt

    stopped.synthesizer.runtime.snapshot = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    stage, state, executed = states[0]
    assert (stage, executed) == ("train", 2)
    resumed = make_trial("DP-Linear", *SGD, noise_seed=1)
    resumed.synthesizer.load_state_dict(state)
    resumed.private.ledger.book("linear", executed)
    resumed.run()
    assert torch.allclose(
        resumed.synthesizer.linear.layer.weight, whole.synthesizer.linear.layer.weight, atol=1e-6
    )


@pytest.mark.parametrize("fit", FITS)
def test_the_result_of_a_query_is_kept_at_once(fit, make_trial):
    trial = make_trial("DP-Linear", *SGD, f"train.fit={fit}")
    kept = []
    trial.synthesizer.runtime.snapshot = lambda stage: kept.append(trial.private.ledger.executed("linear"))
    trial.run()
    assert kept[-1] == trial.private.ledger.planned("linear").num_steps


def test_public_directions_survive_a_restart(make_trial, public):
    settings = ("model.num_directions=5", "public_data.name=glyphs")
    trial = make_trial("DP-Linear", *settings)
    trial.synthesizer.pretrain(PublicData("other", public.samples, public.class_names), None)
    other = make_trial("DP-Linear", *settings)
    other.synthesizer.load_state_dict(trial.synthesizer.state_dict())
    assert torch.equal(
        other.synthesizer.linear.features.directions, trial.synthesizer.linear.features.directions
    )
