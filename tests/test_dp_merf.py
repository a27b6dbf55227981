"""DP-MERF: its features, its one release, and what the generator is fitted to."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from data.spec import Samples
from models.embedding.mean_embedding import EmbeddingGenerator, Schedule
from models.embedding.random_fourier import RandomFourierFeatures
from models.nn.generator import GeneratorConfig
from opacus_ext.accounting import Release
from pipeline.checkpoints import Checkpoints
from utils.errors import UserError
from utils.runtime import Runtime

MASS = 0.2  # of the constant feature


def features(num_features=4000, bandwidths=(2.0,), dim=3, seed=0) -> RandomFourierFeatures:
    return RandomFourierFeatures(dim, num_features, list(bandwidths), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bandwidths", [[2.0], [0.1, 3.0, 90.0, 1.0]])
def test_features_have_norm_one_whatever_the_input(bandwidths):
    """That is the sensitivity of the release."""
    inputs = torch.cat([torch.randn(20, 3) * 100, torch.zeros(1, 3), torch.full((1, 3), 1e6)])
    norms = features(bandwidths=bandwidths)(inputs).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(22), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bandwidths", [[2.0], [0.5, 4.0]])
def test_features_approximate_the_mean_of_the_gaussian_kernels(bandwidths):
    """4 standard errors of a mean of 20,000 cosines, whose variance is at most 1/2."""
    x, y = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(30, 3)
    phi = features(40_000, bandwidths)
    kernel = (phi(x) * phi(y)).sum(1)
    expected = torch.stack([torch.exp(-(x**2).sum(1) / (2 * s)) for s in bandwidths]).mean(0)
    torch.testing.assert_close(kernel, expected, rtol=0, atol=4 * (0.5 / 20_000) ** 0.5)


def test_the_plan_is_one_release_over_all_records(make_method):
    assert make_method("DP-MERF").privacy_plan() == [Release("mean embedding", None)]


def embedding_by_hand(method, samples) -> torch.Tensor:
    pixels = torch.from_numpy(samples.images).float().flatten(1) / 255
    phi = torch.nn.functional.pad(method.embedding.phi(pixels), (0, 1), value=MASS)
    return torch.stack([phi[torch.from_numpy(samples.labels) == label].sum(0) / 60 for label in range(3)])


def test_without_noise_the_embedding_is_that_of_the_data(make_trial, samples):
    trial = make_trial("DP-MERF", epsilon=math.inf)
    trial.run()
    found = trial.synthesizer.noisy_embedding
    torch.testing.assert_close(found, embedding_by_hand(trial.synthesizer, samples), rtol=1e-4, atol=1e-6)


def test_the_divisor_is_the_public_number_of_records(make_trial, samples):
    """Leaving one record out moves the embedding by its norm over N: no count, no mean per class."""
    kept = samples.take(np.arange(59))
    embeddings = []
    for records in (samples, kept):
        trial = make_trial("DP-MERF", epsilon=math.inf, records=records)
        trial.run()
        embeddings.append(trial.synthesizer.noisy_embedding)
    moved = embeddings[0] - embeddings[1]
    assert moved.norm().item() == pytest.approx(math.hypot(1, MASS) / 60, rel=1e-4)
    assert (moved.norm(dim=1) > 1e-6).tolist() == [False, False, True]


def test_a_class_without_records_is_noise_like_any_other(make_trial, samples):
    records = samples.take(np.flatnonzero(samples.labels != 1))
    trial = make_trial("DP-MERF", "model.d_rff=2000", epsilon=1, noise_seed=3, records=records)
    trial.run()
    row = trial.synthesizer.noisy_embedding[1] * 60
    multiplier = trial.private.ledger.planned("mean embedding").noise_multiplier
    assert row.std().item() == pytest.approx(multiplier * math.hypot(1, MASS), rel=0.1)
    assert torch.isfinite(row).all() and np.isfinite(trial.synthesizer.generate(3).images).all()


# ------------------------------------------------------------------------------------------ shares of the classes


@pytest.mark.parametrize("shares", [[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]])
def test_the_release_gives_the_class_shares(shares, make_trial, samples):
    labels = np.repeat(np.arange(3), (60 * np.array(shares)).round().astype(int))
    trial = make_trial("DP-MERF", epsilon=math.inf, records=Samples(samples.images, labels))
    trial.run()
    method = trial.synthesizer
    found = method.embedding.class_shares(method.noisy_embedding)
    torch.testing.assert_close(found, torch.tensor(shares), rtol=0, atol=0.01)
    assert found.min() > 0 and found.sum().item() == pytest.approx(1)


def test_shares_under_noise_are_positive(make_method):
    embedding = make_method("DP-MERF").embedding
    noisy = torch.randn(3, 21, generator=torch.Generator().manual_seed(0))
    noisy[1, -1] = -0.4
    shares = embedding.class_shares(noisy)
    assert (shares > 0).all() and shares.sum().item() == pytest.approx(1)


class MeanPixel:
    """An embedding of the mean pixel alone, as a point of a circle, and a constant feature: what a generator that fits
    it draws is plain."""

    def of(self, pixel):
        return torch.stack([pixel.cos(), pixel.sin(), torch.ones_like(pixel)], dim=1)

    def mean(self, images, labels, num_labels):
        features = self.of(2 * images.flatten(1).mean(1))
        return torch.zeros(num_labels, 3).index_add(0, labels, features) / len(images)

    def class_shares(self, mean):
        return mean[:, 2]


def test_small_classes_are_fitted_at_their_own_scale():
    """Classes of one mean pixel each and very different sizes. If sizes were ignored, images of the small class would
    be spread, so as to match a short mean."""
    shares, pixels = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, -0.5, 0.2])
    embedding = MeanPixel()
    fitted = EmbeddingGenerator(GeneratorConfig(6, 4, 4, False, []), embedding, 8, 1, 3, Runtime())
    fitted.fit("train", shares[:, None] * embedding.of(2 * pixels), Schedule(120, 24, 0.02, 0.2, 80))
    labels = np.arange(300) % 3
    drawn = torch.from_numpy(fitted.draw(labels, 300, "test").mean((1, 2, 3)) / 127.5 - 1)
    for label in range(3):
        own = drawn[labels == label]
        assert own.mean().item() == pytest.approx(pixels[label].item(), abs=0.15)
        assert (
            embedding.of(2 * own).mean(0)[:2].norm() > 0.75
        )  # 1: all alike; a short target would spread them


# ------------------------------------------------------------------------------------------ the fit


def test_a_step_descends_an_unbiased_estimate(make_method, monkeypatch):
    """Of |target_k - share_k E phi|^2: products of different images only, and as many of each label as of any other."""
    fitted, target = make_method("DP-MERF").fitted, torch.randn(3, 5)
    shares = torch.tensor([0.5, 0.3, 0.2])
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = {}

    def mean(images, labels, num_labels):
        seen["labels"] = labels
        phi = torch.nn.functional.normalize(vectors, dim=1) + 0 * images.sum()
        return torch.zeros(num_labels, 5).index_add(0, labels, phi) / 9

    def generate(noise, labels):
        seen["classes"] = labels
        return torch.zeros(9, 1, 8, 8, requires_grad=True)

    monkeypatch.setattr(fitted.embedding, "mean", mean)
    monkeypatch.setattr(fitted, "generator", mock_generator(generate, fitted.generator))
    fitted._take_step(target, shares, Schedule(1, 9, 0.1, 1.0, 1))
    assert torch.bincount(seen["labels"]).tolist() == [5, 4] and len(seen["classes"].unique()) == 2
    phi = torch.nn.functional.normalize(vectors, dim=1)
    loss = 0.0
    for label in seen["classes"].unique():
        own = phi[seen["classes"] == label]
        products = own @ own.T
        pairs = (products.sum() - products.trace()) / (len(own) * (len(own) - 1))
        loss = loss + shares[label] ** 2 * pairs - 2 * shares[label] * (target[label] @ own.mean(0))
    (expected,) = torch.autograd.grad(loss, vectors)
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-4, atol=1e-6)


def mock_generator(forward, original):
    """The generator with another forward pass."""
    return type("Mock", (), {"__call__": lambda _, *given: forward(*given), "train": lambda _: None,
                             "z_dim": original.z_dim})()  # fmt: skip


def test_fitting_brings_the_generator_closer(make_trial):
    """The loss is |target - mean embedding of generated images|^2; a longer fit must lower it."""

    def distance(epochs):
        settings = (
            f"train.epochs={epochs}",
            "model.d_rff=200",
            "model.Generator.g_conv_dim=8",
            "train.batch_size=30",
        )
        trial = make_trial("DP-MERF", *settings, epsilon=math.inf)
        trial.run()
        method = trial.synthesizer
        samples = method.generate(300)
        images = torch.from_numpy(samples.images).float() / 127.5 - 1
        mean = method.embedding.mean(images, torch.from_numpy(samples.labels), 3)
        return (mean - method.noisy_embedding).norm().item()

    assert distance(40) < 0.8 * distance(0)


def test_fitting_reads_the_noisy_embedding_alone(make_trial):
    """Two data sets with the same released embedding give the same generator: the rest is post-processing."""
    trial = make_trial("DP-MERF", epsilon=1)
    trial.run()
    other = make_trial("DP-MERF", epsilon=1)
    other.synthesizer.noisy_embedding = trial.synthesizer.noisy_embedding
    other.synthesizer.train(None)
    one, two = trial.synthesizer.generate(6), other.synthesizer.generate(6)
    assert np.array_equal(one.images, two.images)


def test_a_fit_killed_on_the_way_continues_as_if_nothing_happened(make_trial, tmp_path):
    settings = ("train.epochs=3", "train.lr_decay=0.5")
    whole = make_trial("DP-MERF", *settings, noise_seed=5)
    whole.run()

    def resumable():
        trial = make_trial("DP-MERF", *settings, noise_seed=5, runtime=Runtime(folder=tmp_path))
        kept = Checkpoints(tmp_path, "DP-MERF", trial.synthesizer, trial.private.ledger)
        trial.synthesizer.runtime.snapshot = lambda stage: kept.save(stage, "snapshot")
        return trial, kept

    trial, _ = resumable()
    take_step, taken = trial.synthesizer.fitted._take_step, []

    def killed(*arguments):
        if len(taken) == 14:  # the twelfth step ended the second epoch
            raise KeyboardInterrupt
        taken.append(take_step(*arguments))

    trial.synthesizer.fitted._take_step = killed
    with pytest.raises(KeyboardInterrupt):
        trial.run()
    trial, kept = resumable()
    kept.restore()
    assert trial.synthesizer.fitted.step == 12
    trial.synthesizer.train(trial.private)
    one, other = trial.synthesizer.generate(6), whole.synthesizer.generate(6)
    assert np.array_equal(one.images, other.images)


def test_many_short_epochs_leave_few_snapshots(make_trial):
    trial = make_trial("DP-MERF", "train.epochs=50")  # of 6 steps
    left = []
    trial.synthesizer.runtime.snapshot = lambda stage: left.append(trial.synthesizer.fitted.step)
    trial.run()
    assert left == [0, *range(18, 300, 18)]


@pytest.mark.parametrize(("epochs", "reported"), [(3, True), (50, False), (0, False)])
def test_a_fit_of_few_steps_is_reported(epochs, reported, make_trial, caplog):
    with caplog.at_level("INFO"):
        make_trial("DP-MERF", f"train.epochs={epochs}").run()
    assert ("only 18" in caplog.text) == reported


# ------------------------------------------------------------------------------------------ public pretraining


def test_public_pretraining_needs_no_private_data(make_method, public):
    method = make_method("DP-MERF", "public_data.name=glyphs", "pretrain.epochs=1", "pretrain.batch_size=16")
    before = method.fitted.generator.first.bias.detach().clone()
    method.pretrain(public, None)
    assert not torch.equal(before, method.fitted.generator.first.bias)
    assert method.fitted.generator.embedding.num_embeddings == 6
    assert method.generate(5).labels.tolist() == [0, 1, 2, 0, 1]  # private classes only


@pytest.mark.parametrize("cond", [True, False])
def test_pretraining_with_and_without_public_labels(cond, make_method, public):
    """Without them every label learns from all images, and the target has one row."""
    settings = ["public_data.name=glyphs", "pretrain.epochs=2", "pretrain.batch_size=24"]
    method = make_method("DP-MERF", *settings, f"pretrain.cond={cond}")
    target = method.fitted.public_mean(public, cond, flip=False)
    assert target.shape == (6 if cond else 1, 21)
    assert target[:, -1].sum().item() == pytest.approx(MASS, rel=1e-5)
    before = method.fitted.generator.embedding.weight.detach().clone()
    method.pretrain(public, None)
    assert (method.fitted.generator.embedding.weight != before).any(dim=1).all()


def test_mirrored_public_images_count_where_the_public_set_allows_it(make_method, public):
    fitted = make_method("DP-MERF", "public_data.name=glyphs").fitted
    mirrored = dataclasses.replace(public.samples, images=public.samples.images[..., ::-1].copy())
    one, other = (
        fitted.public_mean(dataclasses.replace(public, samples=samples), True, flip=False)
        for samples in (public.samples, mirrored)
    )
    assert torch.allclose(fitted.public_mean(public, True, flip=True), (one + other) / 2, atol=1e-6)
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("flip", [True, False])
def test_the_public_set_decides_whether_images_are_mirrored(flip, make_method, public, monkeypatch):
    method, seen = make_method("DP-MERF", "public_data.name=glyphs", f"public_data.flip={flip}"), []
    mean = type(method.fitted).public_mean
    monkeypatch.setattr(
        type(method.fitted), "public_mean", lambda self, *rest: seen.append(rest[2]) or mean(self, *rest)
    )
    method.pretrain(public, None)
    assert seen == [flip]


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "wrong",
    ["model.d_rff=5", "model.d_rff=0", "model.rff_sigma=0", "model.class_mass=0", "train.batch_size=1"],
)
def test_bad_settings_are_refused(make_method, wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0].split(".")[1]):
        make_method("DP-MERF", wrong)
