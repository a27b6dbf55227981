"""DP-NTK: its features against autograd, its one release, and what the generator is fitted to."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from models import METHODS
from models.dp_ntk import DPNTK, StepFitConfig
from models.embedding.mean_embedding import EmbeddingGenerator
from models.embedding.ntk import NTKConfig, NTKEmbedding, NTKFeatures
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from pipeline.checkpoints import Checkpoints
from pipeline.compose import compose
from utils.config import load_config
from utils.errors import UserError
from utils.images import to_float
from utils.runtime import Runtime

NETWORKS = [(4, [7], 3), (4, [7], 1), (5, [4, 6], 3), (49, [30], 10), (48, [8, 20], 10)]


def features_of(dim: int, widths: list[int], num_outputs: int) -> NTKFeatures:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NTKFeatures(dim, widths, num_outputs).double()


def as_network(features: NTKFeatures) -> nn.Sequential:
    """The network whose gradients the features are, layer by layer as the paper has it."""
    first, *more = features.hidden
    norm = nn.LayerNorm(features.output.in_features, elementwise_affine=False)
    return nn.Sequential(first, nn.ReLU(), *more, norm, features.output)


def gradients(features: NTKFeatures, x: torch.Tensor, create_graph=False) -> torch.Tensor:
    """(B, P): autograd's gradients of the summed outputs, image by image, divided by their norms."""
    network = as_network(features).requires_grad_(True)
    rows = [
        torch.autograd.grad(network(image[None]).sum(), list(network.parameters()), create_graph=create_graph)
        for image in x
    ]
    flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    features.requires_grad_(False)
    return flat / flat.norm(dim=1, keepdim=True)


def written_out(products) -> torch.Tensor:
    return products.sums(torch.arange(len(products.blocks[0][0])), len(products.blocks[0][0]))


def rows_in_full(features: NTKFeatures, compact: torch.Tensor) -> torch.Tensor:
    """The compact vectors in the order of the network's parameters, rows of the last layer repeated."""
    out = features.output
    last, rest = compact.split([out.in_features + 1, compact.shape[1] - out.in_features - 1], dim=1)
    last = last[:, None].expand(-1, out.out_features, -1) / out.out_features**0.5
    blocks = [last]
    for layer in reversed(features.hidden):
        size = layer.out_features * (layer.in_features + 1)
        blocks.append(rest[:, :size].reshape(len(rest), layer.out_features, -1))
        rest = rest[:, size:]
    pairs = [(block[:, :, :-1].flatten(1), block[:, :, -1]) for block in reversed(blocks)]
    return torch.cat([part for pair in pairs for part in pair], dim=1)


# ------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize(("dim", "widths", "num_outputs"), NETWORKS)
def test_features_equal_autograd(dim, widths, num_outputs):
    """Also for a black image, and for one at which no hidden unit is active."""
    features = features_of(dim, widths, num_outputs)
    x = torch.rand(6, dim, generator=torch.Generator().manual_seed(1)).double()
    x[0], x[1] = 0.0, -1e3 * features.hidden[0].weight.sum(0)
    compact = written_out(features(x))
    torch.testing.assert_close(rows_in_full(features, compact), gradients(features, x), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("dim", "widths", "num_outputs"), NETWORKS[2:])
def test_float32_features_equal_autograd(dim, widths, num_outputs):
    features = features_of(dim, widths, num_outputs)
    x = torch.rand(5, dim)
    exact = gradients(features, x.double())
    found = rows_in_full(features, written_out(features.float()(x)))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "widths", "num_outputs"), NETWORKS)
def test_rows_stored_once_keep_the_kernel(dim, widths, num_outputs):
    features = features_of(dim, widths, num_outputs)
    x = torch.rand(5, dim).double()
    compact, full = written_out(features(x)), gradients(features, x)
    assert compact.shape[1] == features(x).num_features < full.shape[1] or num_outputs == 1
    torch.testing.assert_close(compact @ compact.T, full @ full.T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(compact.norm(dim=1), torch.ones(5).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("dim", "widths", "num_outputs"), NETWORKS)
def test_images_get_the_gradient_that_autograd_of_autograd_gives(dim, widths, num_outputs):
    """That is what the generator learns by."""
    features = features_of(dim, widths, num_outputs)
    x = torch.rand(3, dim, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    kernel = written_out(features(x))
    (found,) = torch.autograd.grad((kernel @ kernel.T)[0].sum(), x)
    full = gradients(features, x, create_graph=True)
    (expected,) = torch.autograd.grad((full @ full.T)[0].sum(), x)
    assert found.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def embedding_of(input_constant=0.0, seed=0, width=6, image_size=4) -> NTKEmbedding:
    config = NTKConfig("fc_1l", width, None, input_constant, 0.3)
    return NTKEmbedding(config, image_size, 1, 3, Runtime(seed=seed))


def test_pixels_are_seen_in_zero_to_one():
    embedding = embedding_of()
    images = torch.rand(2, 1, 4, 4)
    found = written_out(embedding.features(2 * images - 1))
    torch.testing.assert_close(found[:, :-1], written_out(embedding.phi(images.flatten(1))))
    assert found[:, -1].tolist() == pytest.approx([0.3, 0.3])


def test_a_constant_input_next_to_the_pixels_scales_with_the_root_of_their_number():
    embedding = embedding_of(0.5)
    images = torch.rand(2, 1, 4, 4)
    found = written_out(embedding.features(2 * images - 1))
    inputs = torch.cat([images.flatten(1), torch.full((2, 1), 0.5 * 4)], dim=1)
    torch.testing.assert_close(found[:, :-1], written_out(embedding.phi(inputs)))
    assert embedding.num_parameters() == embedding_of().num_parameters() + 6


@pytest.mark.parametrize("input_constant", [0.0, 0.5, 100.0])
def test_features_have_the_norm_that_the_noise_is_for(input_constant):
    embedding = embedding_of(input_constant)
    extremes = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 1, 4, 4)
    images = torch.cat([2 * torch.rand(20, 1, 4, 4) - 1, extremes])
    norms = written_out(embedding.features(images)).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((22,), math.hypot(1.0, 0.3)))


def test_with_a_constant_features_see_how_bright_an_image_is():
    """Squared distance of an image and its half, of that of two images."""
    images = torch.rand(40, 1, 20, 20, generator=torch.Generator().manual_seed(0))

    def visible(input_constant) -> float:
        embedding = embedding_of(input_constant, width=100, image_size=20)
        whole, half = (written_out(embedding.features(2 * x - 1)) for x in (images, images / 2))
        return float((whole - half).square().sum() / (whole - whole.roll(1, 0)).square().sum())

    assert visible(0.3) > 3 * visible(0.0)


def test_the_seed_chooses_the_network():
    first, again, other = (embedding_of(seed=seed).phi.output.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ------------------------------------------------------------------------------------------ the release

BOUND = math.hypot(1.0, 0.2)


def test_the_plan_is_one_release_over_all_records(make_method):
    assert make_method("DP-NTK").privacy_plan() == [Release("mean embedding", None)]


@pytest.mark.parametrize("network", [[], ["model.model_ntk=fc_2l", "model.ntk_width2=7"]])
def test_without_noise_the_embedding_is_that_of_all_data(network, make_trial, samples):
    """Image by image with autograd, as the published code does it with the first batch."""
    trial = make_trial("DP-NTK", *network, "train.n_iter=0", epsilon=math.inf)
    trial.run()
    embedding = trial.synthesizer.embedding
    psi = gradients(embedding.phi.double(), torch.from_numpy(samples.images).double().flatten(1) / 255)
    by_hand = torch.stack([psi[torch.from_numpy(samples.labels) == label].sum(0) / 60 for label in range(3)])
    found = trial.synthesizer.noisy_embedding.double()
    torch.testing.assert_close(rows_in_full(embedding.phi, found[:, :-1]), by_hand, rtol=1e-4, atol=1e-6)
    assert found[:, -1].tolist() == pytest.approx([0.2 / 3] * 3)


def test_the_divisor_is_the_public_number_of_records(make_trial, samples):
    """Leaving one record out moves the embedding by the norm of one: no count, no mean per class."""
    embeddings = []
    for records in (samples, samples.take(np.arange(59))):
        trial = make_trial("DP-NTK", "train.n_iter=0", epsilon=math.inf, records=records)
        trial.run()
        embeddings.append(trial.synthesizer.noisy_embedding)
    moved = embeddings[0] - embeddings[1]
    assert moved.norm().item() == pytest.approx(BOUND / 60, rel=1e-4)
    assert (moved.norm(dim=1) > 1e-6).tolist() == [False, False, True]


def test_a_class_without_records_is_noise_like_any_other(make_trial, samples):
    records = samples.take(np.flatnonzero(samples.labels != 1))
    settings = ("model.ntk_width=100", "train.n_iter=0")
    trial = make_trial("DP-NTK", *settings, epsilon=1, noise_seed=3, records=records)
    trial.run()
    row = trial.synthesizer.noisy_embedding[1] * 60
    multiplier = trial.private.ledger.planned("mean embedding").noise_multiplier
    assert row.square().mean().sqrt().item() == pytest.approx(multiplier * BOUND, rel=0.05)


def test_no_image_has_its_features_written_out(make_trial, monkeypatch):
    """The private release forms sums of classes alone: no tensor has a row of all features per image."""
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (seen.append(b.shape), matmul(a, b))[1])
    trial = make_trial("DP-NTK", "train.n_iter=0")
    trial.run()
    largest = max(math.prod(shape) for shape in seen)
    assert seen and largest < 60 * trial.synthesizer.noisy_embedding.shape[1] / 4


# ------------------------------------------------------------------------------------------ shares of classes


def shares_found(make_trial, samples, kept: list[int], epsilon=math.inf, **more) -> list[float]:
    chosen = np.concatenate([np.flatnonzero(samples.labels == k)[:n] for k, n in enumerate(kept)])
    trial = make_trial("DP-NTK", "train.n_iter=0", epsilon=epsilon, records=samples.take(chosen), **more)
    trial.run()
    method = trial.synthesizer
    return method.embedding.class_shares(method.noisy_embedding).tolist()


def test_shares_of_classes_come_out_of_the_release(make_trial, samples):
    assert shares_found(make_trial, samples, [20, 10, 10]) == pytest.approx([0.5, 0.25, 0.25], rel=1e-5)


def test_a_share_is_never_zero_or_negative(make_trial, samples):
    assert shares_found(make_trial, samples, [20, 20, 0])[2] > 0.001
    noisy = shares_found(make_trial, samples, [20, 20, 0], epsilon=0.01, noise_seed=2)
    assert min(noisy) > 0 and sum(noisy) == pytest.approx(1)


# ------------------------------------------------------------------------------------------ the fit


def loss_by_hand(method: DPNTK, target: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """|target - share of the class x its mean|^2 averaged over the parts of a step, |mean|^2 without bias: by products
    of different images, with several parts of images of one and the next."""
    config, rng = method.config.train, method.runtime.rng("train 0")
    size = config.batch_size // config.n_splits
    order = torch.randperm(3, generator=rng)
    labels = order[torch.arange(size) % 3]
    parts = []
    for _ in range(config.n_splits):
        noise = torch.randn(size, method.fitted.generator.z_dim, generator=rng)
        parts.append(written_out(method.embedding.features(method.fitted.generator(noise, labels))))
    total = 0.0
    for label in range(3):
        own = [psi[labels == label] for psi in parts]
        count = len(own[0])
        if config.n_splits == 1:
            square = (own[0].sum(0).square().sum() - own[0].square().sum()) / (count * (count - 1))
        else:
            means = [psi.mean(0) for psi in own]
            # As far as gradients go, which take the next part as it is.
            square = 2 * sum(
                one @ other.detach() for one, other in zip(means, means[1:] + means[:1], strict=True)
            )
        total = total + shares[label] ** 2 * square
        total = total - 2 * shares[label] * sum(target[label] @ psi.mean(0) for psi in own)
    return total / config.n_splits


@pytest.mark.parametrize("n_splits", [1, 2, 3])
def test_a_step_descends_the_distance_of_the_means(n_splits, make_trial):
    """Gradients by plain autograd of the loss over pairs of images, for classes of unequal shares."""
    settings = (f"train.n_splits={n_splits}", "train.batch_size=39", "train.n_iter=1", "train.lr=1e-6")
    method = make_trial("DP-NTK", *settings).synthesizer
    shares = torch.tensor([0.5, 0.3, 0.2])
    width = method.embedding.features(torch.zeros(1, 1, 8, 8)).num_features
    target = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) / 10
    target[:, -1] = shares * 0.2
    other = copy.deepcopy(method)
    method.fitted.fit("train", target, method.config.train.schedule())
    other.fitted.generator.train()
    loss_by_hand(other, target, shares).backward()
    pairs = zip(method.fitted.generator.parameters(), other.fitted.generator.parameters(), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)


def distance(make_trial, samples, n_iter: int, *settings: str) -> float:
    """From the released embedding to that of many generated images, shares of classes as released."""
    settings = (f"train.n_iter={n_iter}", "model.ntk_width=30", "train.batch_size=30", *settings)
    trial = make_trial("DP-NTK", "model.Generator.g_conv_dim=8", *settings, epsilon=math.inf, records=samples)
    trial.run()
    method = trial.synthesizer
    drawn = method.generate(300)
    weights = 3 * method.embedding.class_shares(method.noisy_embedding)[:, None]
    mean = method.embedding.mean(to_float(drawn.images), torch.from_numpy(drawn.labels), 3)
    return (weights * mean - method.noisy_embedding).norm().item()


def test_fitting_brings_the_generator_closer(make_trial, samples):
    records = samples.take(np.flatnonzero((samples.labels != 2) | (np.arange(60) < 30)))
    before, after = (distance(make_trial, records, n_iter) for n_iter in (0, 60))
    assert after < 0.7 * before


def test_fitting_reads_the_noisy_embedding_alone(make_trial):
    """Two data sets with the same released embedding give the same generator: the rest is post-processing."""
    trial = make_trial("DP-NTK", epsilon=1)
    trial.run()
    other = make_trial("DP-NTK", epsilon=1)
    other.synthesizer.noisy_embedding = trial.synthesizer.noisy_embedding
    other.synthesizer.train(None)
    one, two = trial.synthesizer.generate(6), other.synthesizer.generate(6)
    assert np.array_equal(one.images, two.images)


def test_the_learning_rate_decays_after_every_interval():
    config = StepFitConfig(
        batch_size=4, lr=0.1, lr_decay=0.5, n_iter=10, n_splits=2, scheduler_interval=3, snapshot_freq=1
    )
    schedule = config.schedule()
    rates = [schedule.learning_rate(step) for step in range(7)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025])


def test_steps_use_the_learning_rate(make_trial):
    settings = ("train.n_iter=3", "train.scheduler_interval=2", "train.lr_decay=0.5", "train.lr=0.02")
    trial = make_trial("DP-NTK", *settings)
    rates = []
    step = torch.optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
        )
        trial.run()
    assert rates == pytest.approx([0.02, 0.02, 0.01])


# ------------------------------------------------------------------------------------------ pretraining, resuming


@pytest.mark.parametrize("cond", ["true", "false"])
def test_public_pretraining_needs_no_private_data(cond, make_method, public):
    settings = ("public_data.name=glyphs", "pretrain.n_iter=2", "pretrain.batch_size=16")
    method = make_method("DP-NTK", *settings, f"pretrain.cond={cond}")
    before = method.fitted.generator.first.bias.detach().clone()
    table = method.fitted.generator.embedding.weight.detach().clone()
    method.pretrain(public, None)
    assert not torch.equal(before, method.fitted.generator.first.bias)
    moved = (method.fitted.generator.embedding.weight != table).any(1)
    assert len(moved) == 6 and moved.sum() > 1
    assert method.generate(5).labels.tolist() == [0, 1, 2, 0, 1]  # private classes only


def test_central_images_warm_the_generator_up(make_trial, spec):
    central = ["public_data.name=central_mean", "public_data.central.sample_num=2"]
    settings = [*central, "public_data.central.sigma=50.0", "public_data.central.batch_size=60"]
    trial = make_trial("DP-NTK", *settings, "pretrain.n_iter=2", "pretrain.batch_size=8", epsilon=10)
    assert [release.name for release in trial.private.ledger.releases()] == [
        "central images",
        "mean embedding",
    ]
    trial.run()
    assert trial.private.ledger.complete


class Killed(BaseException):
    pass


def resumed(make_trial, folder, settings):
    """What run.py does with --resume_exp."""
    trial = make_trial("DP-NTK", *settings, noise_seed=5, runtime=Runtime(folder=folder))
    kept = Checkpoints(folder, "DP-NTK", trial.synthesizer, trial.private.ledger)
    trial.synthesizer.runtime.snapshot = lambda stage: kept.save(stage, "snapshot")
    restored = kept.restore() or ""
    if not restored.startswith("train"):
        trial.synthesizer.pretrain(trial.public, trial.private)
    trial.synthesizer.train(trial.private)
    return trial.synthesizer, restored


@pytest.mark.parametrize(("killed_at", "expected"), [(3, "pretrain (snapshot)"), (8, "train (snapshot)")])
def test_a_killed_run_continues_as_if_nothing_happened(
    killed_at, expected, make_trial, tmp_path, monkeypatch
):
    """Four steps of pretraining and four of training, a snapshot after every second; asked once alone."""
    settings = ("public_data.name=glyphs", "pretrain.n_iter=4", "pretrain.batch_size=8")
    whole, _ = resumed(make_trial, tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        steps, take = [], EmbeddingGenerator._take_step

        def dying(self, *args):
            steps.append(1)
            if len(steps) == killed_at:
                raise Killed
            take(self, *args)

        patch.setattr(EmbeddingGenerator, "_take_step", dying)
        with pytest.raises(Killed):
            resumed(make_trial, tmp_path / "run", settings)
    if expected.startswith("train"):
        monkeypatch.setattr(PrivateData, "noisy_sum", lambda *_, **__: pytest.fail("asked again"))
    method, restored = resumed(make_trial, tmp_path / "run", settings)
    assert restored == expected
    one, other = whole.fitted.generator.state_dict(), method.fitted.generator.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "run/train/samples/iter_2/sample.png").exists()


# ------------------------------------------------------------------------------------------ settings

SIZES = {  # data -> parameters of the generator, of the random network, and features
    "mnist_28": (1_422_506, 636_010, 628_802),
    "fmnist_28": (1_422_506, 636_010, 628_802),
    "cifar10_32": (3_838_884, 109_354, 107_042),
    "cifar100_32": (3_850_404, 132_484, 107_042),
    "camelyon_32": (3_837_860, 107_298, 107_042),
    "celeba_male_64": (4_022_180, 402_210, 401_954),
    "celeba_male_128": (4_759_460, 1_581_858, 1_581_602),
}


@pytest.mark.parametrize("data", SIZES)
def test_published_settings_reach_the_published_sizes(data):
    argv = ["--method", "DP-NTK", "--data_name", data, "--epsilon", "inf"]
    method = compose(load_config(argv, METHODS)).synthesizer
    generator, network, num_features = SIZES[data]
    counts = {"generator": generator, "random network of the features": network}
    assert method.parameter_counts() == counts
    blank = torch.zeros(1, *method.spec.image_shape)
    assert method.embedding.features(blank).num_features == num_features


@pytest.mark.parametrize(
    ("data", "epsilon", "multiplier"),
    [("mnist_28", 1, 4.119), ("mnist_28", 10, 0.5322), ("cifar10_32", 1, 4.073)],
)
def test_the_noise_is_that_of_one_gaussian_release(data, epsilon, multiplier):
    argv = ["--method", "DP-NTK", "--data_name", data, "--epsilon", str(epsilon), "eval.mode=val"]
    ledger = compose(load_config(argv, METHODS)).ledger
    assert ledger.planned("mean embedding").noise_multiplier == pytest.approx(multiplier, rel=1e-3)


STEPS = {  # (data, epsilon) -> train: steps, images, parts; pretrain: steps, images, parts
    ("mnist_28", 10): (2000, 5000, 2, 2000, 5000, 8),
    ("mnist_28", 1): (2000, 5000, 8, 2000, 5000, 8),
    ("fmnist_28", 10): (2000, 5000, 8, 4000, 5000, 4),
    ("fmnist_28", 1): (2000, 5000, 8, 4000, 5000, 8),
    ("cifar10_32", 1): (2000, 2500, 8, 4000, 2500, 8),
    ("eurosat_32", 10): (2000, 5000, 8, 4000, 5000, 8),
    ("celeba_male_64", 10): (2000, 5000, 32, 4000, 5000, 8),
}


@pytest.mark.parametrize(("data", "epsilon"), STEPS)
def test_published_steps(data, epsilon):
    config = load_config(
        ["--method", "DP-NTK", "--data_name", data, "-e", str(epsilon)], METHODS
    ).method_config
    found = [(part.n_iter, part.batch_size, part.n_splits) for part in (config.train, config.pretrain)]
    assert found[0] + found[1] == STEPS[data, epsilon]
    assert config.train.lr == config.pretrain.lr == 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        "model.model_ntk=lenet5",
        "model.ntk_width=0",
        "model.input_constant=-0.1",
        "model.class_mass=0",
        "train.batch_size=1",
        "train.n_splits=0",
        "train.n_splits=6",
        "train.n_iter=-1",
        "train.lr=0",
        "train.scheduler_interval=0",
    ],
)
def test_bad_settings_are_refused(make_method, wrong):
    key = "batch_size" if wrong == "train.n_splits=6" else wrong.partition("=")[0].partition(".")[2]
    with pytest.raises(UserError, match=key):
        make_method("DP-NTK", wrong)


def test_the_second_width_is_required_for_a_second_layer(make_method):
    with pytest.raises(UserError, match="ntk_width2"):
        make_method("DP-NTK", "model.model_ntk=fc_2l", "model.ntk_width2=null")
