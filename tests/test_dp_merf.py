"""DP-MERF: its features, its one release, and what the generator is fitted to."""

import math

import numpy as np
import pytest
import torch

from models.features.random_fourier import RandomFourierFeatures
from opacus_ext.accounting import Release
from utils.errors import UserError


def features(num_features=4000, bandwidth=2.0, dim=3, seed=0) -> RandomFourierFeatures:
    return RandomFourierFeatures(dim, num_features, bandwidth, torch.Generator().manual_seed(seed))


def test_features_have_norm_one_whatever_the_input():
    """That is the sensitivity of the release."""
    inputs = torch.cat([torch.randn(20, 3) * 100, torch.zeros(1, 3), torch.full((1, 3), 1e6)])
    torch.testing.assert_close(features()(inputs).norm(dim=1), torch.ones(22), rtol=1e-5, atol=1e-5)


def test_features_approximate_the_gaussian_kernel():
    x, y = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(30, 3)
    phi = features(40_000)
    kernel = (phi(x) * phi(y)).sum(1)
    torch.testing.assert_close(kernel, torch.exp(-(x**2).sum(1) / 4.0), rtol=0, atol=0.03)


def test_the_plan_is_one_release_over_all_records(make_method):
    assert make_method("DP-MERF").privacy_plan() == [Release("mean embedding", None)]


def embedding_by_hand(method, samples) -> torch.Tensor:
    pixels = torch.from_numpy(samples.images).float().flatten(1) / 255
    phi = method.embedding.phi(pixels)
    return torch.stack([phi[torch.from_numpy(samples.labels) == label].sum(0) / 60 for label in range(3)])


def test_without_noise_the_embedding_is_that_of_the_data(make_trial, samples):
    trial = make_trial("DP-MERF", epsilon=math.inf)
    trial.run()
    found = trial.synthesizer.noisy_embedding
    torch.testing.assert_close(found, embedding_by_hand(trial.synthesizer, samples), rtol=1e-4, atol=1e-6)


def test_the_divisor_is_the_public_number_of_records(make_trial, samples):
    """Leaving one record out moves the embedding by 1/N: no count, no mean per class."""
    kept = samples.take(np.arange(59))
    embeddings = []
    for records in (samples, kept):
        trial = make_trial("DP-MERF", epsilon=math.inf, records=records)
        trial.run()
        embeddings.append(trial.synthesizer.noisy_embedding)
    moved = embeddings[0] - embeddings[1]
    assert moved.norm().item() == pytest.approx(1 / 60, rel=1e-4)
    assert (moved.norm(dim=1) > 1e-6).tolist() == [False, False, True]


def test_a_class_without_records_is_noise_like_any_other(make_trial, samples):
    records = samples.take(np.flatnonzero(samples.labels != 1))
    trial = make_trial("DP-MERF", "model.d_rff=2000", epsilon=1, noise_seed=3, records=records)
    trial.run()
    row = trial.synthesizer.noisy_embedding[1] * 60
    multiplier = trial.private.ledger.planned("mean embedding").noise_multiplier
    assert row.std().item() == pytest.approx(multiplier, rel=0.1)


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
        images = torch.from_numpy(samples.images).float().flatten(1) / 255
        phi = method.embedding.phi(images)
        mean = torch.stack([phi[samples.labels == label].sum(0) / 300 for label in range(3)])
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


def test_public_pretraining_needs_no_private_data(make_method, public):
    method = make_method("DP-MERF", "public_data.name=glyphs", "pretrain.epochs=1", "pretrain.batch_size=16")
    before = method.merf.generator.first.bias.detach().clone()
    method.pretrain(public, None)
    assert not torch.equal(before, method.merf.generator.first.bias)
    assert method.merf.generator.embedding.num_embeddings == 6
    assert method.generate(5).labels.tolist() == [0, 1, 2, 0, 1]  # private classes only


@pytest.mark.parametrize("wrong", ["model.d_rff=5", "model.d_rff=0", "model.rff_sigma=0"])
def test_settings_refuse_nonsense(make_method, wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0].removeprefix("model.")):
        make_method("DP-MERF", wrong)
