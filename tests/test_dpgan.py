"""DPGAN: its sizes, its loss of pairs, and that the generator learns from the discriminator alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from influence import record_influence
from test_contract import Killed, assert_same_samples, kill_at_booking, resumed_run, tensors

from models import METHODS, dpgan
from models.dpgan import PairedLoss
from models.nn.discriminator import Discriminator
from models.nn.generator import Generator
from opacus_ext import dpsgd
from opacus_ext.noise import NoiseSource
from utils.config import load_config
from utils.draws import Draws
from utils.errors import UserError
from utils.runtime import Runtime


@pytest.mark.parametrize(
    ("data", "labels", "generator", "discriminator"),
    [
        ("mnist_28", 10, 6_645_250, 1_184_163),
        ("cifar10_32", 10, 3_838_884, 1_649_127),
        ("cifar10_32", 1000, 3_965_604, 1_807_527),
        ("eurosat_32", 10, 9_362_436, 1_649_127),
        ("celeba_male_64", 2, 4_022_180, 1_700_007),
        ("celeba_male_128", 2, 4_759_460, 1_700_007),
    ],
)
def test_published_settings_reach_the_published_sizes(data, labels, generator, discriminator):
    config = load_config(["--method", "DPGAN", "--data_name", data], METHODS)
    model, section = config.method_config.model, config.sensitive_data
    shape = (section.resolution, section.num_channels, labels)
    with torch.device("meta"):
        networks = Generator(model.Generator, *shape), Discriminator(*shape, model.Discriminator.d_conv_dim)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [generator, discriminator]


# ------------------------------------------------------------------------------------------ the loss


@pytest.fixture
def method(make_method):
    return make_method("DPGAN")


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(0)
    return torch.rand(4, 1, 8, 8, generator=rng) * 2 - 1, torch.tensor([0, 1, 2, 0])


def draws(count=4, key=b"a") -> Draws:
    return Draws(key.ljust(32), 0, count)


def paired_loss(method) -> PairedLoss:
    return PairedLoss(method.generator, 3, Runtime().autocast)


def test_the_loss_is_the_hinge_of_an_image_and_of_a_fake_of_its_own(method, batch):
    images, labels = batch
    found = paired_loss(method)(method.discriminator, images, labels, draws())
    rng = draws()
    noise, fake_labels = rng.normal(6), (rng.uniform() * 3).long()
    fakes = method.generator.eval()(noise, fake_labels)
    real, fake = method.discriminator(images, labels), method.discriminator(fakes, fake_labels)
    torch.testing.assert_close(found, F.relu(1 - real) + F.relu(1 + fake), rtol=1e-5, atol=1e-5)
    assert not found.isclose(F.relu(1 - real), atol=1e-3).any()


def test_labels_of_fakes_are_uniform(method):
    labels = dpgan._inputs(method.generator, 3, draws(6000))[1]
    assert torch.bincount(labels, minlength=3).tolist() == pytest.approx([2000] * 3, abs=150)


def test_private_training_leaves_the_generator_as_it_is_but_for_its_own_steps(method, batch):
    """Its BatchNorm would keep statistics, and its weights gradients, of a private batch's partners."""
    method.generator.train()
    before = {name: value.clone() for name, value in method.generator.state_dict().items()}
    loss = paired_loss(method)(method.discriminator, *batch, draws())
    loss.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in method.generator.state_dict().items())
    assert all(parameter.grad is None for parameter in method.generator.parameters())


# ------------------------------------------------------------------------------------------ private training


def test_a_pair_moves_the_clipped_sum_by_at_most_one_bound(make_trial, monkeypatch):
    original, found = dpsgd.clipped_sum, []

    def checked(network, loss, images, labels, bound, rng, **options):
        found.append(record_influence(network, loss, images[:4], labels[:4], bound, rng[:4]))
        return original(network, loss, images, labels, bound, rng, **options)

    monkeypatch.setattr(dpsgd, "clipped_sum", checked)
    trial = make_trial("DPGAN", "train.n_epochs=1")
    trial.run()
    assert found and 0.9 < max(found) <= 1 + 1e-4


def test_every_step_is_noised_once_with_the_planned_noise(make_trial, monkeypatch):
    drawn, gaussian = [], NoiseSource.gaussian

    def watched(self, size, std, *address):
        drawn.append((size, std))
        return gaussian(self, size, std, *address)

    monkeypatch.setattr(NoiseSource, "gaussian", watched)
    trial = make_trial("DPGAN", epsilon=1)
    trial.run()
    multiplier = trial.private.ledger.planned("dp-sgd").noise_multiplier
    size = trial.synthesizer.parameter_counts()["discriminator"]
    assert multiplier > 1
    assert drawn == [(size, pytest.approx(multiplier * 1e-3))] * 4


def test_the_generator_learns_from_the_discriminator_alone(make_trial, samples, monkeypatch):
    """With steps that leave the discriminator alone, other private images give the same generator."""

    def without_private_images(name, private, *_):
        while private.ledger.executed(name) < private.ledger.planned(name).num_steps:
            private.ledger.book(name)
            yield

    monkeypatch.setattr(dpgan, "dpsgd_steps", without_private_images)
    generators = []
    for records in (samples, samples.take(np.arange(30))):
        trial = make_trial("DPGAN", epsilon=math.inf, records=records)
        start = trial.synthesizer.generate(6)
        trial.run()
        assert not np.array_equal(start.images, trial.synthesizer.generate(6).images)
        generators.append(trial.synthesizer.state_dict()["generator"])
    assert all(torch.equal(generators[0][name], value) for name, value in generators[1].items())


@pytest.mark.parametrize(("d_updates", "expected"), [(1, 4), (2, 2), (3, 1)])
def test_discriminator_steps_per_generator_step(d_updates, expected, make_trial):
    trial = make_trial("DPGAN", f"train.d_updates={d_updates}", epsilon=math.inf)
    trial.run()
    assert trial.synthesizer.ema.num_updates == expected


def test_the_randomness_of_fakes_in_private_training_is_secret(make_trial, monkeypatch):
    seen, inputs = [], dpgan._inputs

    def watched(generator, num_labels, rng):
        noise, labels = inputs(generator, num_labels, rng)
        seen.append(noise)
        return noise, labels

    monkeypatch.setattr(dpgan, "_inputs", watched)
    runs = []
    for _ in range(2):
        seen.clear()
        make_trial("DPGAN", "train.d_updates=9", epsilon=math.inf).run()
        runs.append([noise for noise in seen if len(noise) > 3])  # but for the check on public images
    assert len(runs[0]) == len(runs[1]) > 0
    assert not any(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_killed_run_continues_as_if_nothing_had_happened(make_trial, tmp_path, monkeypatch):
    whole = make_trial("DPGAN", epsilon=10, noise_seed=5)
    whole.run()
    with monkeypatch.context() as patch:
        kill_at_booking(patch, "dp-sgd", 3)
        with pytest.raises(Killed):
            resumed_run(make_trial, tmp_path, "DPGAN")
    trial, restored = resumed_run(make_trial, tmp_path, "DPGAN")
    assert restored == "train (snapshot)"
    one, other = (tensors(run.synthesizer.state_dict()) for run in (whole, trial))
    assert one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)
    assert_same_samples(whole.synthesizer.generate(7), trial.synthesizer.generate(7))


# ------------------------------------------------------------------------------------------ public data

PUBLIC = ("public_data.name=glyphs", "pretrain.n_epochs=2", "pretrain.batch_size=16", "pretrain.d_updates=2")


@pytest.mark.parametrize("cond", ["true", "false"])
def test_public_pretraining_needs_no_private_data(cond, make_method, public):
    method = make_method("DPGAN", *PUBLIC, f"pretrain.cond={cond}")
    before = method.generator.first.bias.detach().clone()
    method.pretrain(public, None)
    assert not torch.equal(before, method.generator.first.bias)
    assert method.ema.num_updates == 3
    assert method.generator.embedding.num_embeddings == 6
    rows = method.optimizers["d_optimizer"].state[method.discriminator.head.embedding.weight]["exp_avg"]
    trained = rows.abs().sum(1) > 0
    assert trained[1:].any() == (cond == "true") and trained[0]


def test_private_training_starts_from_the_averaged_generator(make_trial):
    trial = make_trial("DPGAN", *PUBLIC, "train.n_epochs=0", "model.ema_rate=0.9")
    trial.synthesizer.pretrain(trial.public, trial.private)
    average = {name: weight.clone() for name, weight in trial.synthesizer.ema.weights.items()}
    trial.synthesizer.train(trial.private)
    weights = dict(trial.synthesizer.generator.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in average.items())


def test_central_images_are_planned_and_pretrained_on(make_trial):
    settings = [
        "public_data.name=central_mean",
        "public_data.central.sample_num=2",
        "public_data.central.sigma=50.0",
    ]
    sizes = ["public_data.central.batch_size=60", "pretrain.n_epochs=2", "pretrain.batch_size=3"]
    trial = make_trial("DPGAN", *settings, *sizes)
    assert [release.name for release in trial.private.ledger.releases()] == ["central images", "dp-sgd"]
    trial.run()
    assert trial.private.ledger.complete


@pytest.mark.parametrize(
    "wrong",
    [
        "model.Generator.z_dim=7",
        "model.Discriminator.d_conv_dim=0",
        "train.d_updates=0",
        "train.g_part_size=0",
        "train.optim.optimizer=SGD",
        "train.optim.params.g_lr=0",
        "pretrain.batch_size=0",
        "model.ema_rate=1.0",
    ],
)
def test_bad_settings_are_refused(wrong, make_method):
    with pytest.raises(UserError, match=wrong.partition("=")[0]):
        make_method("DPGAN", wrong)
