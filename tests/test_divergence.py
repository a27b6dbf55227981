"""A network whose weights or samples are NaN or infinite ends the run; nothing of it is delivered."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import QUERIED
from test_run_dir import new_checkpoints
from tiny_runs import arguments, call
from torch import nn

import run as run_program
from models import METHODS
from models.public.semantic_query import QUERY
from opacus_ext import accounting
from opacus_ext.accounting import Release
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.validate import validate_independence
from pipeline.divergence import explaining_divergence, require_not_diverged
from utils.checkpoint_files import not_finite
from utils.errors import Diverged, UserError
from utils.files import read_json
from utils.images import to_uint8

WITHOUT_WEIGHTS = {"Noise", "PE"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_refused(value):
    images = torch.zeros(3, 1, 2, 2)
    assert to_uint8(images).tolist() == torch.full((3, 1, 2, 2), 128).tolist()
    images[1, 0, 1, 1] = value
    with pytest.raises(Diverged, match="1 of 3"):
        to_uint8(images)


def test_tensors_are_found_in_nested_objects():
    bad, good = torch.tensor([1.0, math.nan]), torch.ones(2)
    state = {
        "a": good,
        "b": [good, {"c": bad}],
        "d": torch.tensor(math.inf),
        "e": None,
        "f": math.nan,
        "g": "nan",
    }
    assert not_finite(state) == ["b.1.c", "d"]
    assert not_finite({"counts": torch.ones(2, dtype=torch.int64)}) == []


def test_a_broken_state_never_overwrites_a_good_snapshot(tmp_path):
    kept = new_checkpoints(tmp_path)
    kept.save("train", "snapshot")
    before = kept.last().read_bytes()
    kept.synthesizer.weights = torch.tensor([1.0, math.nan, 2.0])
    for kind in ("snapshot", "final"):
        with pytest.raises(Diverged, match="'weights' is NaN"):
            kept.save("train", kind)
    assert kept.last().read_bytes() == before and not kept.finished("train")


def test_a_mask_that_is_infinite_from_the_start_is_no_divergence(tmp_path, monkeypatch):
    masked = {"weights": torch.zeros(2), "mask": torch.tensor([0.0, -math.inf])}
    monkeypatch.setattr("test_run_dir.Counter.state_dict", lambda self: masked)
    kept = new_checkpoints(tmp_path)
    kept.save("train", "snapshot")
    masked["weights"] = torch.full((2,), math.inf)
    with pytest.raises(Diverged, match="'weights'"):
        kept.save("train", "snapshot")


def floats(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for entry in value.values() for tensor in floats(entry)] if isinstance(value, dict) else []


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_leaves_a_checkpoint_or_samples_of_broken_weights(name, make_trial, tmp_path):
    from test_contract import checkpoints_of

    trial = make_trial(name)
    kept = checkpoints_of(trial, tmp_path)
    if name == "PE-SD":  # has no network before
        trial.synthesizer.pretrain(trial.public, trial.private)
    found = floats(trial.synthesizer.state_dict())
    assert bool(found) == (name not in WITHOUT_WEIGHTS)
    if not found:
        return
    for tensor in found:
        with torch.no_grad():
            tensor.fill_(math.nan)
    with pytest.raises(Diverged):
        kept.save("train", "final")
    assert not kept.finished("train")
    with pytest.raises(Diverged):
        trial.synthesizer.generate(6)


def test_a_diverged_query_classifier_makes_no_private_query(make_trial):
    trial = make_trial("PrivImage", *QUERIED, "pretrain.query.lr=1e30")
    with pytest.raises(Diverged, match="query classifier"):
        trial.synthesizer.pretrain(trial.public, trial.private)
    assert trial.private.ledger.executed(QUERY) == 0


def test_a_checkpoint_of_broken_weights_is_refused(make_trial, make_method, tmp_path):
    from test_contract import checkpoints_of

    trial = make_trial("DPDM")
    kept = checkpoints_of(trial, tmp_path)
    kept.save("pretrain", "final")
    content = torch.load(kept.last(), weights_only=True)
    next(iter(content["state"]["network"].values())).fill_(math.nan)
    torch.save(content, kept.last())
    with pytest.raises(UserError, match="NaN") as refused:
        make_method("DPDM", f"model.ckpt={kept.last()}")
    assert str(kept.last()) in str(refused.value) and "another checkpoint" in str(refused.value)


def test_a_network_that_is_broken_before_private_training_is_not_blamed_on_clipping():
    network = nn.Linear(4, 2)
    images, labels = torch.rand(4, 4), torch.tensor([0, 0, 1, 1])

    def loss(network, images, labels, rng):
        return nn.functional.cross_entropy(network(images), labels, reduction="none")

    for value in (math.nan, 1e38):
        with torch.no_grad():
            network.weight.fill_(value)
        with pytest.raises(UserError, match="pretrain") as refused:
            validate_independence(network, loss, images * 100, labels)
        assert "clipping" not in str(refused.value)


# ------------------------------------------------------------------------------------------ whole runs


def test_private_training_that_diverges_ends_the_run(tmp_path):
    outcome = call(run_program.main, arguments("DP-MERF", tmp_path, "train.lr=1e30"))
    line = outcome.refusal
    assert "train.lr=1e+30" in line and "epsilon 10" in line and "private training" in line
    folder = outcome.folder
    assert str(folder / "train" / "checkpoints" / "snapshot_checkpoint.pth") in line
    for absent in ("gen", "results.json", "privacy.json", "report.html"):
        assert not (folder / absent).exists()
    record = read_json(folder / "diverged.json")
    assert record["account"]["spent"] == pytest.approx(10, rel=1e-3) and record["message"] in line
    again = call(run_program.main, ["--resume_exp", str(folder)])
    assert again.refusal.startswith("error: --resume_exp: ") and "train.lr" in again.refusal


def test_a_run_that_diverged_is_marked_though_its_epsilon_cannot_be_computed(tmp_path):
    def fail(*_):
        raise MemoryError

    ledger = Ledger(Budget(1.0, 1e-5))
    ledger.adopt([Release("training", None, 0.1, 10)])
    ledger.book("training", 3)
    kept = new_checkpoints(tmp_path)
    kept.ledger = ledger
    config = SimpleNamespace(snapshot={"train": {"lr": 1.0}})
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Diverged, match=r"train\.lr"):
        patched.setattr(accounting, "_pld_epsilon", fail)
        with explaining_divergence("train", config, kept, None):
            raise Diverged("'weights' is NaN")
    with pytest.raises(UserError, match="cannot be resumed"):
        require_not_diverged(tmp_path)
    account = read_json(tmp_path / "diverged.json")["account"]
    assert account["spent"] == math.inf and "MemoryError" in account["not_computed"]


def test_public_pretraining_that_diverges_is_named_and_costs_nothing(tmp_path):
    more = ["pretrain.optim.params.lr=1e30", "pretrain.n_epochs=2"]
    outcome = call(run_program.main, arguments("PDP-Diffusion", tmp_path, *more))
    line = outcome.refusal
    assert "(glyphs)" in line and "pretrain.optim.params.lr=1e+30" in line
    assert "train.optim" not in line.replace("pretrain.optim", "") and "epsilon" not in line
    assert not outcome.folder.exists()


def test_samples_that_diverge_end_the_run_which_can_be_resumed(tmp_path, monkeypatch):
    """All that was asked is in the checkpoint: another precision may help, and costs nothing."""
    noise = METHODS.resolve("Noise")
    with monkeypatch.context() as patched:
        patched.setattr(
            noise, "generate", lambda self, count: to_uint8(torch.full((count, 1, 8, 8), math.nan))
        )
        outcome = call(run_program.main, arguments("Noise", tmp_path, "setup.precision=bf16"))
    assert "sampling" in outcome.refusal and "setup.precision=float32" in outcome.refusal
    assert not (outcome.folder / "gen").exists()
    again = call(run_program.main, ["--resume_exp", str(outcome.folder), "setup.precision=float32"])
    assert again.code == 0 and (outcome.folder / "gen" / "gen.npz").exists()
