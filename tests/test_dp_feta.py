"""DP-FETA and DP-FETA-Pro: their plans, the order of their stages, and what a killed run asks again."""

import math

import numpy as np
import pytest
import torch

from models.diffusion import synthesizer
from models.diffusion.synthesizer import WARM_UP
from models.dp_feta_pro import FREQUENCY
from models.embedding.mean_embedding import MEAN_EMBEDDING, EmbeddingGenerator
from models.public.central_images import CENTRAL_IMAGES
from opacus_ext.accounting import Release
from opacus_ext.ledger import Ledger
from opacus_ext.private_data import PrivateData
from pipeline.checkpoints import Checkpoints
from utils.errors import UserError
from utils.runtime import Runtime

METHODS = ["DP-FETA", "DP-FETA-Pro"]
CENTRAL = Release(CENTRAL_IMAGES, 50.0, 1.0, 2)
EMBEDDING = Release(MEAN_EMBEDDING, 50.0)
TRAINING = Release("dp-sgd", None, 1.0, 4)
PLANS = {"DP-FETA": [CENTRAL, TRAINING], "DP-FETA-Pro": [CENTRAL, EMBEDDING, TRAINING]}


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def weights(method) -> torch.Tensor:
    return flat(method.network)


# ------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_holds_every_query(name, make_method):
    assert make_method(name).privacy_plan() == PLANS[name]


@pytest.mark.parametrize("name", METHODS)
def test_without_pretraining_dpsgd_is_all(name, make_method):
    """As in sampling from a checkpoint: pretrain.n_epochs=0."""
    assert make_method(name, "pretrain.n_epochs=0").privacy_plan() == [TRAINING]


def test_each_warm_up_can_be_left_out(make_method):
    assert make_method("DP-FETA-Pro", "freq.n_epochs=0").privacy_plan() == [CENTRAL, TRAINING]
    without = make_method("DP-FETA-Pro", "pretrain.warm_up.n_epochs=0")
    assert without.privacy_plan() == [EMBEDDING, TRAINING]


def test_only_public_images_are_mirrored(make_trial, monkeypatch):
    """public_data.flip is about the public set; what is made of private digits stays as it is."""
    settings = ("public_data.name=glyphs", "public_data.flip=true", "pretrain.n_epochs=1")
    trial, stages = make_trial("DP-FETA-Pro", *settings), []
    method, flipped = trial.synthesizer, synthesizer.randomly_flipped
    monkeypatch.setattr(
        synthesizer, "randomly_flipped", lambda *rest: stages.append(method.stage) or flipped(*rest)
    )
    taken, public_loss = [], type(method)._public_loss
    monkeypatch.setattr(
        type(method), "_public_loss", lambda self, *rest: taken.append(self.stage) or public_loss(self, *rest)
    )
    method.pretrain(trial.public, trial.private)
    assert set(stages) == {"pretrain"} and set(taken) == {"pretrain", WARM_UP, FREQUENCY}


@pytest.mark.parametrize(
    ("public", "kind"),
    [("null", "central_mean"), ("glyphs", "central_mean"), ("central_mode", "central_mode")],
)
def test_central_images_are_a_stage_of_the_method_whatever_is_public(public, kind, make_method):
    method = make_method("DP-FETA", f"public_data.name={public}")
    assert method.pretraining.central.kind == kind
    assert method.privacy_plan() == PLANS["DP-FETA"]


def test_a_sampled_plan_composes_and_costs_more_than_dpsgd_alone(make_trial):
    settings = ("public_data.central.batch_size=20", "public_data.central.sigma=3.0")
    plain, warmed = (
        make_trial(name, *more, epsilon=1) for name, more in (("DPDM", ()), ("DP-FETA", settings))
    )
    assert warmed.private.ledger.planned(CENTRAL_IMAGES).sample_rate == pytest.approx(1 / 3)
    noise = [trial.private.ledger.planned("dp-sgd").noise_multiplier for trial in (plain, warmed)]
    assert noise[1] > 1.05 * noise[0]
    warmed.run()
    assert warmed.private.ledger.spent() <= 1


def test_a_dry_run_reports_the_cost_of_the_warm_ups(make_method):
    costs = {cost.stage: cost.description for cost in make_method("DP-FETA-Pro").costs()}
    assert costs[WARM_UP] == "3 steps x 4 images"  # 2 images of 3 classes, batches of 4, 3 epochs
    assert costs[FREQUENCY] == "3 steps x 8 images"
    assert list(costs) == ["frequency generator", WARM_UP, FREQUENCY, "train", "generate"]


# ------------------------------------------------------------------------------------------ other methods


def test_any_diffusion_method_can_be_warmed_up(make_trial):
    """DPDM with central_mean is DP-FETA: the same plan and, with the same noise, the same weights."""
    settings = [
        "public_data.central.sample_num=2", "public_data.central.sigma=50.0", "public_data.central.batch_size=60",
        "public_data.name=central_mean", "pretrain.warm_up.batch_size=4", "pretrain.warm_up.n_epochs=3",
        "train.batch_size=null", "train.optim.params.lr=2e-3",
    ]  # fmt: skip
    trials = [make_trial(name, *settings, noise_seed=2) for name in ("DPDM", "PDP-Diffusion", "DP-FETA")]
    for trial in trials:
        assert trial.public is None
        trial.run()
        assert trial.synthesizer.privacy_plan() == PLANS["DP-FETA"]
    assert torch.equal(weights(trials[0].synthesizer), weights(trials[2].synthesizer))


@pytest.mark.parametrize("kind", ["central_mean", "central_mode"])
def test_central_images_warm_up_dp_merf(kind, make_trial):
    settings = [f"public_data.name={kind}", "pretrain.epochs=1", "pretrain.batch_size=3"]
    settings += [f"public_data.central.{key}" for key in ("sample_num=2", "sigma=50.0", "batch_size=60")]
    trial = make_trial("DP-MERF", *settings)
    assert trial.private.ledger.releases()[0] == CENTRAL
    before = trial.synthesizer.fitted.generator.first.bias.detach().clone()
    trial.synthesizer.pretrain(trial.public, trial.private)
    assert not torch.equal(before, trial.synthesizer.fitted.generator.first.bias)
    trial.synthesizer.train(trial.private)
    assert trial.private.ledger.complete


def warmed_up(method) -> torch.nn.Module:
    """The network that samples come from."""
    if hasattr(method, "fitted"):
        return method.fitted.generator
    return method.network if hasattr(method, "network") else method.generator


LATENTS = ["model.autoencoder=pixels", "model.network.attn_resolutions=[4]"]
WARMED_UP = {
    "DP-LDM-SD": ["pretrain.warm_up.n_epochs=1"],
    "DP-LDM": ["pretrain.warm_up.n_epochs=1", *LATENTS],
    "DP-LoRA": ["pretrain.warm_up.n_epochs=1", *LATENTS],
    "DP-Kernel": ["pretrain.batch_size=3"],
    "GS-WGAN": ["pretrain.batch_size=3"],
}


@pytest.mark.parametrize("name", WARMED_UP)
def test_central_images_warm_up_other_networks_too(name, make_trial):
    central = [f"public_data.central.{key}" for key in ("sample_num=2", "sigma=50.0", "batch_size=60")]
    trial = make_trial(name, "public_data.name=central_mean", *central, *WARMED_UP[name])
    method, ledger = trial.synthesizer, trial.private.ledger
    assert trial.public is None and ledger.releases()[0] == CENTRAL
    before = flat(warmed_up(method))
    method.pretrain(trial.public, trial.private)
    assert not torch.equal(before, flat(warmed_up(method)))
    assert [ledger.executed(release.name) for release in ledger.releases()] == [2, 0]
    method.train(trial.private)
    assert ledger.complete


def test_public_images_come_before_the_warm_up(make_trial, monkeypatch):
    trial = make_trial("DP-FETA", "public_data.name=glyphs", "pretrain.n_epochs=1", "pretrain.batch_size=16")
    assert stages_of(trial, monkeypatch) == ["pretrain", WARM_UP, "train"]
    assert trial.synthesizer.network.null_label == 6


# ------------------------------------------------------------------------------------------ stages


def stages_of(trial, monkeypatch) -> list[str]:
    kind, begun = type(trial.synthesizer), []
    begin = kind._enter_stage
    monkeypatch.setattr(kind, "_enter_stage", lambda self, stage: begun.append(stage) or begin(self, stage))
    trial.run()
    return begun


def test_the_curriculum_goes_from_space_to_frequency(make_trial, monkeypatch):
    assert stages_of(make_trial("DP-FETA-Pro"), monkeypatch) == [WARM_UP, FREQUENCY, "train"]


@pytest.mark.parametrize("name", METHODS)
def test_dpsgd_starts_from_the_average_of_the_warm_up_with_a_fresh_optimiser(name, make_trial):
    trial = make_trial(name, "train.n_epochs=0", epsilon=math.inf)
    method = trial.synthesizer
    start = weights(method)
    method.pretrain(trial.public, trial.private)
    average = torch.cat([weight.flatten() for weight in method.ema.weights.values()])
    assert not torch.equal(weights(method), start)
    method.train(trial.private)
    torch.testing.assert_close(weights(method), average, rtol=0, atol=0)
    assert method.ema.num_updates == 0 and not method.optimizer.state


@pytest.mark.parametrize("name", METHODS)
def test_warm_ups_read_only_the_released_results(name, make_trial, make_method):
    """Post-processing: with the answers and without the private data the same weights come out."""
    trial = make_trial(name)
    trial.synthesizer.pretrain(trial.public, trial.private)
    other = make_method(name)
    other.pretraining.central.load_state_dict(trial.synthesizer.pretraining.central.state_dict())
    if name == "DP-FETA-Pro":
        other.noisy_embedding = trial.synthesizer.noisy_embedding
    other.pretrain(None, None)
    assert torch.equal(weights(other), weights(trial.synthesizer))


def test_warm_up_images_are_augmented_anew_at_every_access(make_trial, monkeypatch):
    seen = []
    trial = make_trial("DP-FETA")
    augment = trial.synthesizer.pretraining.central.augment
    monkeypatch.setattr(
        trial.synthesizer.pretraining.central,
        "augment",
        lambda images, rng: seen.append(augment(images, rng)) or seen[-1],
    )
    trial.synthesizer.pretrain(None, trial.private)
    assert [len(images) for images in seen] == [4, 4, 4]  # 6 images, batches of 4, 3 epochs
    assert len({images.tobytes() for images in seen}) == 3


def test_without_private_data_the_warm_up_is_refused(make_method):
    with pytest.raises(UserError, match=r"sensitive_data\.name is null"):
        make_method("DP-FETA").pretrain(None, None)


# ------------------------------------------------------------------------------------------ the frequency stage


def test_the_embedding_is_that_of_the_resized_images_over_the_public_number(make_trial, samples):
    trial = make_trial("DP-FETA-Pro", "freq.image_size=4", epsilon=math.inf)
    trial.synthesizer.pretrain(trial.public, trial.private)
    method = trial.synthesizer
    pixels = torch.from_numpy(samples.images).float() / 127.5 - 1
    phi = method.embedding.features(pixels)
    assert method.embedding.phi.frequencies.shape[1] == 16
    torch.testing.assert_close(phi.norm(dim=1), torch.full((60,), 1.04**0.5))  # 1, and 0.2 for the share
    expected = torch.stack([phi[torch.from_numpy(samples.labels) == label].sum(0) / 60 for label in range(3)])
    torch.testing.assert_close(method.noisy_embedding, expected, rtol=1e-4, atol=1e-6)


def test_noise_of_the_embedding(make_trial):
    trial = make_trial("DP-FETA-Pro", "freq.d_rff=4000", "freq.sigma=30.0", "freq.n_epochs=1")
    trial.synthesizer.pretrain(trial.public, trial.private)
    noise = trial.synthesizer.noisy_embedding * 60  # whose mean embedding is small beside it
    assert noise.std().item() == pytest.approx(30.0, rel=0.05)


def test_generated_images_are_balanced_and_enlarged(make_trial, monkeypatch):
    trial = make_trial("DP-FETA-Pro", "freq.image_size=4")
    shown, fit = {}, type(trial.synthesizer)._fit_public

    def watched(self, stage, images, loss, augment):
        shown[stage] = images, augment(images.images[:5], None) if stage == FREQUENCY else None
        return fit(self, stage, images, loss, augment)

    monkeypatch.setattr(type(trial.synthesizer), "_fit_public", watched)
    trial.synthesizer.pretrain(trial.public, trial.private)
    images, enlarged = shown[FREQUENCY]
    assert images.images.shape == (24, 1, 4, 4) and np.bincount(images.labels).tolist() == [8, 8, 8]
    assert enlarged.shape == (5, 1, 8, 8) and enlarged.dtype == np.uint8
    corners = enlarged[:, :, ::7, ::7].astype(int)  # bilinear enlargement keeps the corners
    assert np.abs(corners - images.images[:5, :, ::3, ::3]).max() <= 1


# ------------------------------------------------------------------------------------------ killed runs


class Killed(BaseException):
    pass


def attempt(make_trial, name, folder, **options):
    """run.py with --resume_exp: restore what there is, then the stages that are left."""
    trial = make_trial(name, epsilon=10, runtime=Runtime(folder=folder), **options)
    kept = Checkpoints(folder, name, trial.synthesizer, trial.private.ledger)
    trial.synthesizer.runtime.snapshot = lambda stage: kept.save(stage, "snapshot")
    kept.restore()
    trial.run()
    return trial


def killed_at(monkeypatch, owner, method, call):
    original, calls = getattr(owner, method), []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, dying)


@pytest.mark.parametrize(
    ("name", "owner", "method", "call", "asks"),
    [
        ("DP-FETA", Runtime, "preview", 1, []),  # right after the central images were kept
        ("DP-FETA-Pro", Runtime, "preview", 1, ["noisy_sum"]),
        ("DP-FETA-Pro", EmbeddingGenerator, "fit", 1, []),  # right after the embedding was kept
        ("DP-FETA-Pro", EmbeddingGenerator, "draw", 1, []),
    ],
)
def test_a_killed_run_repeats_no_query(name, owner, method, call, asks, make_trial, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, owner, method, call)
        with pytest.raises(Killed):
            attempt(make_trial, name, tmp_path)
    for question in {"sampled_noisy_sum", "noisy_sum"} - set(asks):
        monkeypatch.setattr(PrivateData, question, lambda *_, **__: pytest.fail("asked again"))
    trial = attempt(make_trial, name, tmp_path)
    assert trial.private.ledger.complete


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_between_queries_equals_an_uninterrupted_one(name, make_trial, tmp_path, monkeypatch):
    """What it had heard was kept nowhere, so it starts over; nothing is booked beyond the plan."""
    whole = attempt(make_trial, name, tmp_path / "whole", noise_seed=4)
    book = Ledger.book

    def dying(self, release, *args):
        if release == CENTRAL_IMAGES and self.executed(release) == 1:
            raise Killed
        return book(self, release, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "book", dying)
        with pytest.raises(Killed):
            attempt(make_trial, name, tmp_path / "run", noise_seed=4)
    trial = attempt(make_trial, name, tmp_path / "run", noise_seed=4)
    assert torch.equal(weights(trial.synthesizer), weights(whole.synthesizer))
    assert trial.private.ledger.report() == whole.private.ledger.report()


def test_a_run_killed_in_the_frequency_stage_resumes_there(make_trial, tmp_path, monkeypatch):
    from models.dp_feta_pro import DPFETAPro

    whole = attempt(make_trial, "DP-FETA-Pro", tmp_path / "whole", noise_seed=4)
    finish = DPFETAPro._finish_step

    def dying(self, *args):
        finish(self, *args)
        if self.stage == FREQUENCY and self.step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DPFETAPro, "_finish_step", dying)
        with pytest.raises(Killed):
            attempt(make_trial, "DP-FETA-Pro", tmp_path / "run", noise_seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(PrivateData, "sampled_noisy_sum", lambda *_, **__: pytest.fail("asked again"))
        patch.setattr(PrivateData, "noisy_sum", lambda *_, **__: pytest.fail("asked again"))
        trial = attempt(make_trial, "DP-FETA-Pro", tmp_path / "run", noise_seed=4)
    assert torch.equal(weights(trial.synthesizer), weights(whole.synthesizer))


@pytest.mark.parametrize("wrong", ["freq.sigma=0.0", "freq.d_rff=3", "freq.n_epochs=-1", "freq.data_num=0",
                                   "freq.fit.batch_size=0", "pretrain.warm_up.batch_size=0"])  # fmt: skip
def test_bad_settings_are_refused(make_method, wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0].replace(".", r"\.")):
        make_method("DP-FETA-Pro", wrong)
