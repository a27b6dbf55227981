"""DP-Kernel: the mixture of kernels, its one release with its sensitivity, and a fit that reads nothing else."""

import math

import numpy as np
import pytest
import torch

from models import METHODS
from models.embedding.mean_embedding import EmbeddingGenerator
from models.nn.generator import Generator
from opacus_ext.accounting import Release
from opacus_ext.records import RecordAccess
from utils.config import load_config
from utils.errors import UserError

MASS = 0.2  # of the constant feature
NORM = math.hypot(1, MASS)  # of the features of any image


def images_of(samples) -> torch.Tensor:
    return torch.from_numpy(samples.images).float() / 127.5 - 1


def test_features_approximate_the_mean_of_the_published_kernels(make_method, samples):
    """exp(-|x - y|^2 / (2 s^2)) on pixels in [-1, 1]; 4 standard errors of a mean of 20,000 cosines."""
    method = make_method("DP-Kernel", "model.sigma_list=[1.0,2.0,4.0,8.0]", "model.d_rff=40000")
    images = images_of(samples)[:12] / 3
    features = method.embedding.features(images)
    squares = torch.cdist(images.flatten(1), images.flatten(1)).square()
    kernels = torch.stack([torch.exp(-squares / (2 * s**2)) for s in (1, 2, 4, 8)]).mean(0)
    torch.testing.assert_close(
        features @ features.T, kernels + MASS**2, rtol=0, atol=4 * (0.5 / 20_000) ** 0.5
    )


def test_the_plan_is_one_release_over_all_records(make_method):
    """Whatever the number of steps: they are post-processing."""
    for steps in (1, 200_002):
        assert make_method("DP-Kernel", f"train.max_iter={steps}").privacy_plan() == [
            Release("mean embedding", None)
        ]


@pytest.mark.parametrize("bandwidths", [[4.0], [0.5, 1.0, 2.0, 4.0, 8.0]])
def test_the_sensitivity_is_the_bound_whatever_the_number_of_kernels(bandwidths, make_trial, samples):
    """Leaving a record out moves the sum by exactly the bound that the noise is scaled to; 1 / N is the divisor."""
    embeddings, bounds = [], []
    for records in (samples, samples.take(np.arange(59))):
        settings = (f"model.sigma_list={bandwidths}".replace(" ", ""), "model.d_rff=40", "train.max_iter=0")
        trial = make_trial("DP-Kernel", *settings, epsilon=math.inf, records=records)
        noisy_sum = trial.private.noisy_sum

        def recording(name, fn, l2_bound, by_class=False, inner=noisy_sum):
            bounds.append(l2_bound)
            return inner(name, fn, l2_bound, by_class)

        trial.private.noisy_sum = recording
        trial.run()
        embeddings.append(trial.synthesizer.noisy_embedding)
    moved = embeddings[0] - embeddings[1]
    assert bounds == pytest.approx([NORM, NORM])
    assert moved.norm().item() == pytest.approx(NORM / 60, rel=1e-4)
    assert (moved.norm(dim=1) > 1e-6).tolist() == [False, False, True]


def test_clipping_leaves_the_features_as_they_are(make_trial, samples):
    """A bound below their norm would shrink them without a word."""
    trial = make_trial("DP-Kernel", "train.max_iter=0", epsilon=math.inf)
    trial.run()
    method = trial.synthesizer
    expected = method.embedding.mean(images_of(samples), torch.from_numpy(samples.labels), 3)
    torch.testing.assert_close(method.noisy_embedding, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1, 10])
def test_every_number_of_the_release_has_the_planned_noise(epsilon, make_trial):
    """Noise there, once, and of the planned size; 2,000 features in three classes give its spread to 3 %."""
    settings = ("model.d_rff=2000", "train.max_iter=0")
    trial = make_trial("DP-Kernel", *settings, epsilon=epsilon, noise_seed=3)
    clean = make_trial("DP-Kernel", *settings, epsilon=math.inf)
    trial.run()
    clean.run()
    noise = (trial.synthesizer.noisy_embedding - clean.synthesizer.noisy_embedding) * 60
    multiplier = trial.private.ledger.planned("mean embedding").noise_multiplier
    for row in noise:
        assert row.std().item() == pytest.approx(multiplier * NORM, rel=0.07)
    assert noise.std().item() == pytest.approx(multiplier * NORM, rel=0.04)


def test_a_release_that_fails_ends_the_run(make_trial, monkeypatch):
    """The published code goes on without noise."""

    def failing(*_):
        raise RuntimeError("no noise")

    monkeypatch.setattr("opacus_ext.noise.GridNoise.add_to", failing)
    trial = make_trial("DP-Kernel")
    with pytest.raises(RuntimeError, match="no noise"):
        trial.run()
    assert trial.synthesizer.noisy_embedding is None


def test_fitting_reads_the_noisy_embedding_alone(make_trial, monkeypatch):
    """The rest is post-processing: without private data at hand, and the same whatever the data were."""
    trial = make_trial("DP-Kernel", epsilon=1)
    trial.run()
    other = make_trial("DP-Kernel", epsilon=1)
    other.synthesizer.noisy_embedding = trial.synthesizer.noisy_embedding
    monkeypatch.setattr(RecordAccess, "take", lambda *_: pytest.fail("private records were read"))
    other.synthesizer.train(None)
    one, two = trial.synthesizer.generate(6), other.synthesizer.generate(6)
    assert np.array_equal(one.images, two.images)


def test_labels_of_generated_images_are_public(make_trial, samples, monkeypatch):
    """They are the same for any private labels."""
    seen = {}
    images_of_labels = EmbeddingGenerator._images

    def recording(self, noise, labels):
        seen.setdefault(recording.run, []).append(labels.tolist())
        return images_of_labels(self, noise, labels)

    monkeypatch.setattr(EmbeddingGenerator, "_images", recording)
    for recording.run, order in enumerate((np.arange(60), np.arange(0, 60, 3))):
        make_trial("DP-Kernel", epsilon=1, records=samples.take(order)).run()
    assert seen[0] == seen[1] and len(seen[0]) >= 6


def test_public_pretraining_needs_no_private_data(make_method, public):
    method = make_method("DP-Kernel", "public_data.name=glyphs", "pretrain.batch_size=16")
    before = method.fitted.generator.first.bias.detach().clone()
    method.pretrain(public, None)
    assert not torch.equal(before, method.fitted.generator.first.bias)
    assert method.generate(5).labels.tolist() == [0, 1, 2, 0, 1]  # private classes only


SIZES = {
    "mnist_28": 1_422_506,
    "fmnist_28": 1_422_506,
    "cifar10_32": 3_838_884,
    "celeba_male_64": 4_022_180,
    "celeba_male_128": 4_759_460,
}


@pytest.mark.parametrize("data", SIZES)
def test_published_settings_reach_the_published_sizes(data):
    config = load_config(["--method", "DP-Kernel", "--data_name", data], METHODS).method_config
    size, channels = (int(data.split("_")[-1]), 1 if "mnist" in data else 3)
    with torch.device("meta"):
        network = Generator(config.model.Generator, size, channels, 2 if "celeba" in data else 10)
    assert sum(p.numel() for p in network.parameters()) == SIZES[data]
    assert config.model.sigma_list == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ("model.sigma_list=[]", "sigma_list"),
        ("model.sigma_list=[1.0,-2.0]", "sigma_list"),
        ("model.d_rff=22", "d_rff"),
        ("train.batch_size=1", "batch_size"),
        ("train.vis_step=0", "vis_step"),
        ("train.max_iter=-1", "max_iter"),
        ("pretrain.n_epochs=-1", "n_epochs"),
    ],
)
def test_bad_settings_are_refused(wrong, key, make_method):
    with pytest.raises(UserError, match=key):
        make_method("DP-Kernel", wrong)
