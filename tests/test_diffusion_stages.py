"""Stages and checkpoints of the diffusion family: what is trained, and where a run may start from."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import arguments, call

import run as run_program
from data.samples_file import read_samples
from models import METHODS
from models.diffusion.samplers import SAMPLERS
from models.nn.unet import PARAMETER_GROUPS
from pipeline.checkpoints import Checkpoints
from utils.config import load_config
from utils.errors import UserError
from utils.runtime import Runtime

PRETRAINED = ["PDP-Diffusion", "DP-LDM-SD", "PrivImage"]
TRAINED_GROUPS = {"label_embedding", "condition", "input_conv", "attention"}


def saved(trial, folder: Path, stage: str = "pretrain") -> str:
    """The path of a checkpoint of the trial as it is now."""
    Checkpoints(folder, trial.name, trial.synthesizer, trial.private.ledger).save(stage, "final")
    return str(folder / stage / "checkpoints" / "final_checkpoint.pth")


def weights(trial) -> dict[str, torch.Tensor]:
    """Raw and averaged weights by name."""
    state = trial.synthesizer.state_dict()
    averages = {f"ema of {name}": weight.clone() for name, weight in state["ema"]["weights"].items()}
    return {**{name: weight.clone() for name, weight in state["network"].items()}, **averages}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pretrained(make_trial, name: str, *settings: str):
    trial = make_trial(name, *settings, noise_seed=5)
    trial.synthesizer.pretrain(trial.public, trial.private)
    return trial


# ------------------------------------------------------------------------------------------ what is trained


def test_dp_ldm_sd_trains_its_groups_and_nothing_else(make_trial):
    trial = pretrained(make_trial, "DP-LDM-SD")
    before = trial.synthesizer.state_dict()["ema"]["weights"]
    trial.synthesizer.train(trial.private)
    after = trial.synthesizer.network
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    groups = after.parameter_groups()
    trained = {name for group in TRAINED_GROUPS for name in groups[group]}
    assert moved == trained
    averaged = trial.synthesizer.ema.weights
    assert {name for name in averaged if not torch.equal(averaged[name], before[name])} == trained


def test_the_optimiser_holds_what_is_trained(make_trial):
    trial = pretrained(make_trial, "DP-LDM-SD")

    def held() -> set[int]:
        return {id(p) for group in trial.synthesizer.optimizer.param_groups for p in group["params"]}

    assert held() == {id(p) for p in trial.synthesizer.network.parameters()}  # in pretraining everything
    trial.synthesizer.train(trial.private)
    assert held() == {id(p) for p in trial.synthesizer.network.parameters() if p.requires_grad}
    assert len(held()) < len(list(trial.synthesizer.network.parameters()))


def test_groups_are_chosen_by_name(make_method):
    method = make_method("DP-LDM-SD", "train.trained_groups=[output]")
    assert method._trained_parameters() == {
        f"output_{part}.{kind}" for part in ("norm", "conv") for kind in ("weight", "bias")
    }
    for wrong in ("[]", "[attn]"):
        with pytest.raises(UserError, match=r"train\.trained_groups: .* attention"):
            make_method("DP-LDM-SD", f"train.trained_groups={wrong}")


def test_groups_are_a_partition(make_method):
    network = make_method("DPDM").network
    groups = network.parameter_groups()
    assert tuple(groups) == PARAMETER_GROUPS
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    assert all(name.split(".")[-2] in ("query", "key", "value", "output") for name in groups["attention"])
    assert groups["label_embedding"] == ["label_embedding.weight"]


# ------------------------------------------------------------------------------------------ starting from a checkpoint


def test_final_checkpoints_hold_raw_weights_and_their_average(make_trial, tmp_path):
    trial = pretrained(make_trial, "PDP-Diffusion")
    state = torch.load(saved(trial, tmp_path), weights_only=True)["state"]
    raw, average = state["network"], state["ema"]["weights"]
    assert set(raw) == set(average) == set(dict(trial.synthesizer.network.named_parameters()))
    assert any(not torch.equal(raw[name], average[name]) for name in raw)


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_a_run_starts_from_the_weights_it_names(kind, make_trial, make_method, tmp_path):
    trial = pretrained(make_trial, "PDP-Diffusion")
    state = trial.synthesizer.state_dict()
    expected = state["network"] if kind == "raw" else state["ema"]["weights"]
    settings = [f"model.ckpt={saved(trial, tmp_path)}", f"model.ckpt_weights={kind}", "pretrain.n_epochs=0"]
    network = make_method("PDP-Diffusion", *settings).network
    assert all(torch.equal(p, expected[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize(
    ("name", "pretraining", "setting"),
    [
        ("PDP-Diffusion", "PDP-Diffusion", "pretrain.n_epochs=0"),
        ("PDP-Diffusion", "DP-LDM-SD", "public_data.name=null"),
        ("DP-LDM-SD", "PDP-Diffusion", "public_data.name=null"),
    ],
)
def test_fine_tuning_from_a_checkpoint_is_the_second_half_of_a_run(
    name, pretraining, setting, make_trial, tmp_path
):
    """To the last bit. The two methods pretrain alike, so either takes the other's checkpoint."""
    whole = make_trial(name, noise_seed=5)
    whole.run()
    checkpoint = saved(pretrained(make_trial, pretraining), tmp_path)
    tuned = make_trial(name, f"model.ckpt={checkpoint}", setting, noise_seed=5)
    tuned.run()
    assert same(weights(tuned), weights(whole))
    assert np.array_equal(tuned.synthesizer.generate(5).images, whole.synthesizer.generate(5).images)


def test_fine_tuning_from_a_checkpoint_of_the_query_books_its_cost_again(make_trial, tmp_path):
    whole = make_trial("PrivImage", noise_seed=5)
    whole.synthesizer.pretrain(whole.public, whole.private)
    checkpoint = saved(whole, tmp_path)
    tuned = make_trial("PrivImage", f"model.ckpt={checkpoint}", "pretrain.n_epochs=0")
    tuned.run()
    inherited, training = tuned.private.ledger.report()["releases"]
    assert (inherited["name"], inherited["noise_multiplier"]) == ("checkpoint: semantic query", 100.0)
    assert inherited["executed"] == 1
    assert training["noise_multiplier"] == pytest.approx(
        whole.private.ledger.planned("dp-sgd").noise_multiplier, rel=1e-6
    )
    assert tuned.private.report()["noise_seeded"] is True  # what the query added can still be taken away


@pytest.mark.parametrize("name", ["DP-FETA", "DP-FETA-Pro"])
def test_fine_tuning_from_a_checkpoint_of_the_warm_ups_books_their_cost_again(name, make_trial, tmp_path):
    """And is the second half of a run, to the last bit."""
    whole = make_trial(name, noise_seed=5)
    whole.run()
    checkpoint = saved(pretrained(make_trial, name), tmp_path)
    tuned = make_trial(name, f"model.ckpt={checkpoint}", "pretrain.n_epochs=0", noise_seed=5)
    tuned.run()
    assert same(weights(tuned), weights(whole))
    plans = [trial.private.ledger.report()["releases"] for trial in (whole, tuned)]
    assert [release["name"].removeprefix("checkpoint: ") for release in plans[1]] == [
        release["name"] for release in plans[0]
    ]
    assert [release["executed"] for release in plans[1]] == [release["executed"] for release in plans[0]]


@pytest.mark.parametrize("name", PRETRAINED)
def test_resumed_pretraining_equals_one_long_pretraining(name, make_trial, tmp_path):
    """Order of the images, random draws, optimiser and average included."""
    fewer, more = (["pretrain.batch_size=8", f"pretrain.n_epochs={epochs}"] for epochs in (1, 2))
    query = ["public_data.selective.sigma=1e-3"] if name == "PrivImage" else []  # two queries, one answer
    trials = {"epsilon": math.inf, "noise_seed": 5}
    whole, first = (make_trial(name, *settings, *query, **trials) for settings in (more, fewer))
    for trial in (whole, first):
        trial.synthesizer.pretrain(trial.public, trial.private)
    again = make_trial(name, *fewer, *query, f"model.ckpt={saved(first, tmp_path)}", **trials)
    again.synthesizer.pretrain(again.public, again.private)
    assert again.synthesizer.step == whole.synthesizer.step > first.synthesizer.step
    assert same(weights(again), weights(whole))


def test_going_on_takes_the_learning_rate_from_the_configuration(make_trial, tmp_path):
    checkpoint = saved(pretrained(make_trial, "PDP-Diffusion"), tmp_path)
    again = make_trial("PDP-Diffusion", f"model.ckpt={checkpoint}", "pretrain.optim.params.lr=0.25")
    again.synthesizer.pretrain(again.public, again.private)
    assert [group["lr"] for group in again.synthesizer.optimizer.param_groups] == [0.25]


def test_pretraining_on_top_of_private_training_starts_afresh(make_trial, tmp_path):
    """The private stage's optimiser is not taken over, and its cost is."""
    first = make_trial("PDP-Diffusion", noise_seed=5)
    first.run()
    checkpoint = saved(first, tmp_path, "train")
    again = make_trial("PDP-Diffusion", f"model.ckpt={checkpoint}", epsilon=20)
    assert again.synthesizer.step == 0 and again.synthesizer.optimizer is None
    again.run()
    assert again.private.ledger.executed("checkpoint: dp-sgd") == 4


def test_sampling_alone_draws_the_images_of_the_whole_run(make_trial, tmp_path):
    whole = make_trial("PDP-Diffusion", noise_seed=5)
    whole.run()
    settings = [f"model.ckpt={saved(whole, tmp_path, 'train')}", "pretrain.n_epochs=0", "train.n_epochs=0"]
    alone = make_trial("PDP-Diffusion", *settings)
    alone.run()
    assert np.array_equal(alone.synthesizer.generate(7).images, whole.synthesizer.generate(7).images)
    assert alone.private.ledger.spent() == pytest.approx(whole.private.ledger.spent())


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_draws_for_a_method(sampler, make_method):
    method = make_method(
        "DPDM",
        f"model.sampler_acc.type={sampler}",
        "model.sampler_acc.s_churn=1",
        "model.sampler_acc.guid_scale=1",
    )
    samples = method.generate(9)
    assert samples.images.shape == (9, 1, 8, 8) and samples.images.std() > 0


# ------------------------------------------------------------------------------------------ through run.py


def test_a_finished_run_only_samples_on_request(tmp_path):
    """As the published benchmark says it: no epochs, the run's own final checkpoint, and --resume_exp."""
    first = call(run_program.main, arguments("PDP-Diffusion", tmp_path, "eval=none"))
    assert first.code == 0, first.err
    path, checkpoint = first.folder / "gen/gen.npz", first.folder / "train/checkpoints/final_checkpoint.pth"
    before, content = read_samples(path), checkpoint.read_bytes()
    path.unlink()
    none = [f"model.ckpt={checkpoint}", "pretrain.n_epochs=0", "train.n_epochs=0", "eval=none"]
    argv = arguments("PDP-Diffusion", tmp_path, *none, "--resume_exp", first.folder.name)
    again = call(run_program.main, argv)
    assert again.code == 0, again.err
    assert again.folder == first.folder and "pretrain:" not in again.err and "train (DP-SGD)" not in again.err
    assert np.array_equal(read_samples(path).images, before.images)
    assert checkpoint.read_bytes() == content


def test_resuming_to_sample_from_another_runs_checkpoint_is_refused(tmp_path):
    first = call(run_program.main, arguments("DPDM", tmp_path, "eval=none", "train.n_epochs=0"))
    other = first.folder / "pretrain/checkpoints/final_checkpoint.pth"
    none = [f"model.ckpt={other}", "pretrain.n_epochs=0", "train.n_epochs=0", "eval=none"]
    argv = arguments("DPDM", tmp_path, *none, "--resume_exp", first.folder.name)
    assert "model.ckpt" in call(run_program.main, argv).refusal


def test_a_checkpoint_with_fewer_labels_than_classes_is_refused(make_trial, make_method, spec, tmp_path):
    checkpoint = saved(pretrained(make_trial, "DPDM"), tmp_path)
    method = make_method("DPDM", f"model.ckpt={checkpoint}")
    larger = dataclasses.replace(spec, num_classes=4, class_names=tuple("abcd"))
    with pytest.raises(UserError, match=r"model\.ckpt: .*\b3 labels.*\b4 classes"):
        type(method)(method.config, larger, Runtime())


def test_a_checkpoint_with_fewer_labels_than_public_classes_is_pretrained_without_labels(
    make_trial, make_method, tmp_path
):
    checkpoint = saved(pretrained(make_trial, "DPDM"), tmp_path)
    with pytest.raises(UserError, match=r"3 labels.* 6 classes.*pretrain\.cond=false"):
        make_method("PDP-Diffusion", f"model.ckpt={checkpoint}")
    trial = make_trial("PDP-Diffusion", f"model.ckpt={checkpoint}", "pretrain.cond=false")
    trial.run()
    assert trial.synthesizer.network.null_label == 3


def test_unconditional_pretraining_moves_the_null_row_alone(make_trial):
    trial = make_trial("PDP-Diffusion", "pretrain.cond=false")
    before = trial.synthesizer.network.label_embedding.weight.detach().clone()
    trial.synthesizer.pretrain(trial.public, trial.private)
    moved = (trial.synthesizer.network.label_embedding.weight != before).any(1)
    assert moved.tolist() == [False] * 6 + [True]


def test_a_batch_larger_than_the_public_set_takes_all_of_it(make_trial, caplog):
    trial = make_trial("PDP-Diffusion", "pretrain.batch_size=100")
    with caplog.at_level("INFO", logger="dpib"):
        trial.synthesizer.pretrain(trial.public, trial.private)
    assert trial.synthesizer.step == 1
    assert all(part in caplog.text for part in ("pretrain: ", "48 images", "batch_size=100"))


def test_levels_missing_at_an_image_size_are_skipped(caplog):
    """[16, 8, 4] is a published setting for 28 px, whose levels are 28, 14, 7 and 4."""
    argv = [
        "--method",
        "DPDM",
        "--data_name",
        "mnist_28",
        "model.network.ch_mult=[1,2,2,4]",
        "model.network.nf=8",
    ]
    config = load_config([*argv, "model.network.attn_resolutions=[16,8,4]"], METHODS).method_config
    with caplog.at_level("INFO", logger="dpib"):
        network = config.model.network.make(10)
    assert "no level has [16, 8] pixels; there are [28, 14, 7, 4]" in caplog.text
    attending = {stage for stage, module in network.named_modules() if stage.endswith("attention") and module}
    assert {stage.split(".")[0] for stage in attending} == {"down", "middle", "up"}
    with pytest.raises(UserError, match=r"model\.network\.attn_resolutions: \[16, 8\] .* 28, 14, 7, 4"):
        load_config([*argv, "model.network.attn_resolutions=[16,8]"], METHODS)
