"""IDPS: its published sizes and noise, its stages, its augmentations, and what the classifier and the samples are."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import arguments, call

import run as run_program
from models import METHODS
from models.diffusion.augmented import NUM_LABELS, augmented
from models.nn.wide_resnet import PlainWSConv2d, WideResNet
from models.released.agreement import draw_agreeing
from models.released.classifier import ORIGIN, logits_of, read_classifier, write_classifier
from models.warm_start.augmentation import cut_out, several_views, shifted
from models.warm_start.classifier import MixingSGD
from opacus_ext.accounting import epsilon_of
from opacus_ext.dpsgd import dpsgd_release
from opacus_ext.gradients.per_example import per_example_gradients
from opacus_ext.ledger import Budget, Ledger
from utils.config import load_config
from utils.errors import UserError
from utils.runtime import Runtime

SETTINGS = ("pretrain.n_epochs=1", "warm_up.n_epochs=2")


# ---------------------------------------------------------------------------------------------- the published setting


@pytest.mark.parametrize(("num_classes", "published"), [(10, 2_748_890), (100, 2_772_020)])
def test_the_classifier_has_the_published_size(num_classes, published):
    with torch.device("meta"):
        network = WideResNet(3, num_classes, depth=16, widen=4)
    assert sum(parameter.numel() for parameter in network.parameters()) == published


@pytest.mark.parametrize("data", ["cifar10_32", "cifar100_32"])
def test_published_runs_mirror_images_in_every_stage(data):
    config = load_config(["--method", "IDPS", "--data_name", data, "--epsilon", "2", "preset=paper"], METHODS)
    assert not any("--method" in note for note in config.notes)
    assert config.method_config.public_data.flip and config.method_config.pretrain.flip


def test_characters_are_mirrored_in_no_preset():
    for data in ("digits_8", "mnist_28"):
        config = load_config(["--method", "IDPS", "--data_name", data, "--epsilon", "1"], METHODS)
        assert not config.method_config.public_data.flip and not config.method_config.pretrain.flip


@pytest.mark.parametrize(("data", "steps", "sigma"), [("cifar10_32", 360, 3.306), ("cifar100_32", 600, 4.19)])
def test_the_published_plan_and_its_noise(data, steps, sigma):
    config = load_config(
        ["--method", "DPTrainer", "--data_name", data, "--epsilon", "2", "preset=paper"], METHODS
    )
    assert config.method == "IDPS" and config.sensitive_data.num_public == 2000
    assert any("DPTrainer" in note and "IDPS" in note for note in config.notes)
    train = config.method_config.train
    release = dpsgd_release("dp-sgd", 48_000, train.batch_size, train.n_epochs)
    assert (release.sample_rate, release.num_steps) == (pytest.approx(1 / 12), steps)
    ledger = Ledger(Budget(2.0, 1e-5))
    ledger.adopt([release])
    assert ledger.planned("dp-sgd").noise_multiplier == pytest.approx(sigma, rel=3e-3)


# ------------------------------------------------------------------------------------------------------------ network


def test_filters_have_mean_0_and_deviation_1():
    layer = PlainWSConv2d(3, 5, 3, padding=1)
    weight = layer.standardised_weight().flatten(1)
    assert layer.bias is None
    assert torch.allclose(weight.mean(1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(weight.std(1), torch.ones(5), atol=1e-3)


def test_gradients_of_standardised_filters_are_those_of_autograd():
    torch.manual_seed(0)
    network = WideResNet(3, 4, depth=10, widen=1).double()
    images, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 3])

    def loss(network, images, labels, rng):
        return F.cross_entropy(network(images), labels, reduction="none")

    found = per_example_gradients(network, loss, images, labels, None)
    for row in range(3):
        network.zero_grad()
        loss(network, images[row : row + 1], labels[row : row + 1], None).sum().backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- augmentation


def test_without_augmentation_images_and_labels_stay():
    images = torch.rand(8, 1, 9, 9)
    same, described = augmented(images, Runtime().draws("x", 8), 0.0, False)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    assert described.shape == (8, NUM_LABELS) and not described.any()


def test_mirror_images_are_described():
    images = torch.rand(40, 1, 8, 8)
    changed, described = augmented(images, Runtime().draws("x", 40), 0.0, True)
    is_mirrored = described[:, 0] == 1
    assert 5 < is_mirrored.sum() < 35
    torch.testing.assert_close(changed[is_mirrored], images[is_mirrored].flip(-1), atol=1e-5, rtol=0)


def test_images_are_turned_upside_down_with_half_of_the_probability():
    _, described = augmented(torch.zeros(4000, 1, 4, 4), Runtime().draws("x", 4000), 0.4, True)
    assert described[:, 1].mean().item() == pytest.approx(0.2, abs=0.03)


def test_characters_are_never_mirrored():
    """Without flips the transformation keeps its orientation, whatever else happens."""
    _, described = augmented(torch.rand(200, 1, 8, 8), Runtime().draws("x", 200), 0.9, False)
    assert not described[:, :2].any() and described[:, 2:].abs().sum(0).min() > 0


def test_shifted_images_are_crops():
    images = torch.arange(16.0).view(1, 1, 4, 4)
    corner = shifted(images, torch.tensor([[0.0, 0.999]]), 1, "constant")
    assert torch.equal(corner, F.pad(images, (1, 1, 1, 1))[:, :, :4, 2:])
    assert torch.equal(shifted(images, torch.tensor([[0.5, 0.5]]), 1, "reflect"), images)


def test_cutout_removes_a_square_from_half_of_the_images():
    uniform = torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.5, 0.9], [0.0, 0.0, 0.1]])
    kept = cut_out(torch.ones(3, 2, 8, 8), uniform, 4)
    assert [int((image == 0).sum()) for image in kept] == [2 * 16, 0, 2 * 4]


def test_views_of_an_image_are_next_to_each_other():
    images = torch.rand(5, 1, 8, 8)
    views = several_views(images, Runtime().draws("x", 5), 3, pad=0, flip=False)
    assert torch.equal(views, images.repeat_interleave(3, 0))


# --------------------------------------------------------------------------------------------------------------- stages


def test_pretraining_never_touches_private_images(make_method, public, spec):
    from data.spec import PublicData

    method = make_method("IDPS", *SETTINGS)
    labels = np.arange(48) % 3
    share = PublicData(
        "in_distribution", type(public.samples)(public.samples.images, labels), spec.class_names
    )
    before = {name: p.clone() for name, p in method.fit.network.named_parameters()}
    method.pretrain(share, None)
    assert any(not torch.equal(p, before[name]) for name, p in method.fit.network.named_parameters())


def test_other_classes_are_refused(make_method, public):
    with pytest.raises(UserError, match="num_public"):
        make_method("IDPS").pretrain(public, None)


def test_clipping_about_a_public_centre_is_refused(make_method):
    with pytest.raises(UserError, match=r"extender.*dope"):
        make_method("IDPS", "train.extender=dope")


@pytest.mark.parametrize("section", ["warm_up", "train"])
def test_crops_shift_less_than_an_image(section, make_method):
    make_method("IDPS", f"{section}.pad=7")
    with pytest.raises(UserError, match=rf"{section}\.pad: 8 .*below 8"):
        make_method("IDPS", f"{section}.pad=8")


@pytest.mark.parametrize("extender", ["none", "mirror"])
def test_extenders_have_the_same_plan_and_cost(extender, make_trial):
    trial = make_trial("IDPS", f"train.extender={extender}", epsilon=1)
    trial.run()
    (release,) = trial.private.ledger.releases()
    assert (release.name, release.sample_rate, release.num_steps) == ("dp-sgd", 1.0, 4)
    assert epsilon_of([release], 1e-5) <= 1.0001


@pytest.mark.parametrize(
    ("setting", "idle"),
    [
        ("train.extender=none", "train.public_batch_size"),
        ("pool.data=public", "pool.num"),
        ("warm_up.n_epochs=0", "warm_up"),
    ],
)
def test_settings_without_effect_are_named(setting, idle, make_method):
    assert idle in make_method("IDPS", setting).settings_without_effect()
    other = {"train.extender=none": "train.extender=mirror"}.get(setting, "train.augmult=2")
    assert idle not in make_method("IDPS", other).settings_without_effect()


def test_mirror_mixes_the_noisy_and_the_public_direction():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = MixingSGD([parameter], lr=1.0)
    optimizer.mix = lambda: (0.75, [torch.tensor([0.0, 4.0])])
    parameter.grad = torch.tensor([4.0, 0.0])
    optimizer.step()
    assert torch.equal(parameter.data, torch.tensor([-3.0, -1.0]))


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_a_stopped_run_ends_with_the_same_classifier(stage, make_trial):
    settings = ("pretrain.n_epochs=2", "pretrain.snapshot_freq=2", "warm_up.snapshot_freq=3")
    whole = make_trial("IDPS", *settings, noise_seed=1)
    whole.run()
    stopped, states = make_trial("IDPS", *settings, noise_seed=1), []

    def stop(reached: str) -> None:
        states.append((stopped.synthesizer.state_dict(), stopped.private.ledger.executed("dp-sgd")))
        if reached == stage:
            raise KeyboardInterrupt

    stopped.synthesizer.runtime.snapshot = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    state, executed = states[-1]
    resumed = make_trial("IDPS", *settings, noise_seed=1)
    resumed.synthesizer.load_state_dict(state)
    if executed:
        resumed.private.ledger.book("dp-sgd", executed)
    resumed.run()
    for name, weight in resumed.synthesizer.fit.ema.weights.items():
        torch.testing.assert_close(weight, whole.synthesizer.fit.ema.weights[name], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- products


def test_only_disputed_samples_are_drawn_again():
    """The classifier reads the label from the brightness; the first draw has it wrong for odd positions."""

    class Bright(torch.nn.Module):
        def forward(self, images):
            level = images.mean((1, 2, 3))
            return torch.stack([-level, level], 1)

    drawn = []

    def draw(labels: np.ndarray, stream: str) -> np.ndarray:
        drawn.append(len(labels))
        values = np.where(labels == 1, 255, 0).astype(np.uint8)
        if len(drawn) == 1:
            values[1::2] = 255 - values[1::2]
        return np.broadcast_to(values[:, None, None, None], (len(labels), 1, 4, 4)).copy()

    labels = np.array([0, 0, 1, 1, 0, 1])
    images = draw_agreeing(draw, labels, Bright(), "cpu")
    assert drawn == [6, 3]
    assert ((images[:, 0, 0, 0] > 0) == (labels == 1)).all()


def test_the_warm_up_alone_costs_nothing(tmp_path):
    outcome = call(
        run_program.main, arguments("IDPS", tmp_path / "exp", "train.n_epochs=0", "eval.metrics=[accuracy]")
    )
    assert outcome.code == 0, outcome.err
    import json

    results = json.loads((outcome.folder / "results.json").read_text())
    assert results["spent_epsilon"] == 0
    assert math.isfinite(results["metrics"]["accuracy/released/last_epoch"])
    privacy = json.loads((outcome.folder / "privacy.json").read_text())
    assert privacy["num_records"] == 1437 - 30


def test_the_file_of_the_classifier_gives_the_same_classifier(make_trial, samples, spec, tmp_path):
    trial = make_trial("IDPS")
    trial.run()
    path = tmp_path / "classifier.pth"
    write_classifier(path, trial.synthesizer.released_classifier(), spec, dict.fromkeys(ORIGIN))
    read = read_classifier(path, tmp_path, "cpu").classifier
    found, expected = (
        logits_of(network, samples.images, "cpu")
        for network in (read, trial.synthesizer.released_classifier())
    )
    assert np.array_equal(found, expected)
