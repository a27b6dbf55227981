"""What a run leaves on disk: whole files or none, folders that never collide, state that comes back as it was."""

import dataclasses
import errno
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from data.apart import require_not_from_run
from data.samples_file import read_samples, write_samples
from data.spec import Samples
from evaluation.report import Report
from opacus_ext.accounting import Release
from opacus_ext.ledger import Budget, Ledger
from pipeline.checkpoints import Checkpoints
from pipeline.folder import create, discard_unstarted, find
from pipeline.record import (
    command_of,
    require_same_config,
    results_of,
    settings_of,
    training_overrides,
    write_privacy,
)
from pipeline.stage_times import StageTimes
from utils import files
from utils.checkpoint_files import read
from utils.errors import UserError
from utils.files import atomic, read_json, write_json, write_text

# ------------------------------------------------------------------------------------------------- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_keeps_the_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_is_strict_and_comes_back(tmp_path):
    value = {"a": [1, 2.5, math.inf, None, True], "b": {"c": -math.inf, "path": tmp_path}, "text": "infinite"}
    write_json(tmp_path / "file.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    value["b"]["path"] = str(tmp_path)
    assert read_json(tmp_path / "file.json") == value


# ------------------------------------------------------------------------------------------------- folders


def test_folders_of_the_same_second_do_not_collide(tmp_path):
    folders = {create(tmp_path, "DP-MERF", "mnist_28", 10, "-trial") for _ in range(5)}
    assert len(folders) == 5
    for folder in folders:
        assert folder.parent == tmp_path / "dp-merf"
        assert folder.name.startswith("mnist_28_eps10.0-trial-20")


def test_a_run_is_found_by_name_and_by_path(tmp_path):
    folder = create(tmp_path, "Noise", "digits_8", 1.0, "")
    with pytest.raises(UserError, match="no run"):
        find(tmp_path, folder.name)  # nothing says that it is a run
    write_text(folder / "config.yaml", "seed: 0\n")
    assert find(tmp_path, folder.name) == find(Path("elsewhere"), str(folder)) == folder
    for name in ("nowhere", ".", ""):
        with pytest.raises(UserError, match=f"no run '{name}' in .*{folder.name}"):
            find(tmp_path, name)
    other = tmp_path / "dpdm" / folder.name
    write_text(other / "config.yaml", "seed: 0\n")
    with pytest.raises(UserError, match=r"may be .*dpdm.* or .*noise.*; give the path of one"):
        find(tmp_path, folder.name)
    assert find(tmp_path, folder.name, "Noise") == folder and find(tmp_path, folder.name, "DPDM") == other


def test_the_arguments_of_a_run_are_restored(tmp_path):
    """Also those that JSON, as it is written here, makes numbers of."""
    words = ["--method", "Noise", "--epsilon", "inf", "seed=1"]
    write_json(tmp_path / "environment.json", {"command": ["run.py", *words]})
    assert command_of(tmp_path) == words


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_does_not_reach_the_disk_takes_no_ones_place(code, tmp_path, monkeypatch):
    def fail(_) -> None:
        raise OSError(code, "no")

    write_text(tmp_path / "file", "before")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_text(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_file_system_that_cannot_flush_keeps_nobody_from_writing(tmp_path, monkeypatch):
    def fail(_) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr("os.fsync", fail)
    write_text(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "after"


def test_only_a_folder_without_checkpoints_is_discarded(tmp_path):
    started, unstarted = tmp_path / "started", tmp_path / "unstarted"
    write_text(started / "train/checkpoints/snapshot_checkpoint.pth", "x")
    write_text(unstarted / "config.yaml", "x")
    write_text(tmp_path / "answered/pretrain/semantic_query.json", "x")
    assert not discard_unstarted(tmp_path / "answered"), "the answer would be asked for again"
    assert not discard_unstarted(started) and started.exists()
    assert discard_unstarted(unstarted) and not unstarted.exists()


@dataclasses.dataclass
class FakeConfig:
    snapshot: dict
    changeable: tuple[str, ...] = ("train.n_split",)


def test_resuming_compares_everything_but_hardware_and_evaluation(tmp_path):
    write_text(
        tmp_path / "config.yaml",
        "seed: 0\nsetup: {device: cpu}\neval: {mode: syn, num_val: 5}\nprivacy: {epsilon: .inf, delta: null}\n",
    )

    def snapshot(**changes) -> FakeConfig:
        values = {
            "seed": 0,
            "setup": {"device": "cpu"},
            "eval": {"mode": "syn", "num_val": 5},
            "privacy": {"epsilon": math.inf, "delta": None},
        }
        return FakeConfig({**values, **changes})

    require_same_config(tmp_path, snapshot())
    require_same_config(tmp_path, snapshot(train={"n_split": 2}))
    require_same_config(tmp_path, snapshot(setup={"device": "cuda"}, eval={"mode": "syn", "num_val": 9}))
    for changes, key in (
        ({"seed": 1}, r"seed=0 \(now 1\)"),
        ({"eval": {"mode": "val", "num_val": 5}}, r"eval\.mode=syn \(now val\)"),
        ({"privacy": {"epsilon": 1.0, "delta": None}}, r"privacy\.epsilon=inf \(now 1\.0\)"),
        ({"train": {"lr": 0.1}}, r"train\.lr=None \(now 0\.1\)"),
    ):
        with pytest.raises(UserError, match=key):
            require_same_config(tmp_path, snapshot(**changes))


def test_a_long_list_of_differences_is_cut_and_begins_with_what_was_given(tmp_path):
    write_text(
        tmp_path / "config.yaml", "privacy: {epsilon: 10.0}\n" + "".join(f"k{i}: 0\n" for i in range(20))
    )
    now = FakeConfig({"privacy": {"epsilon": 1.0}, **{f"k{i}": 1 for i in range(20)}})
    with pytest.raises(UserError) as refused:
        require_same_config(tmp_path, now, first=("k7",))
    text = str(refused.value)
    assert text.index("k7=") < text.index("privacy.epsilon=10.0") < text.index("k0=")
    assert "18 more" in text and len(text) < 500


# ------------------------------------------------------------------------------------------------- checkpoints


class Counter:
    """A synthesizer as far as checkpoints are concerned."""

    def __init__(self) -> None:
        self.weights = torch.zeros(3)

    def state_dict(self) -> dict:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.weights = state["weights"]


def new_checkpoints(folder) -> Checkpoints:
    ledger = Ledger(Budget(math.inf, 1e-5))
    ledger.adopt([Release("query", 1.0, num_steps=5)])
    return Checkpoints(folder, "Counter", Counter(), ledger)


def test_the_furthest_checkpoint_is_restored_with_its_ledger(tmp_path):
    first = new_checkpoints(tmp_path)
    assert first.restore() is None and not first.finished("pretrain")
    order = [("pretrain", "snapshot"), ("pretrain", "final"), ("train", "snapshot"), ("train", "final")]
    for number, (stage, kind) in enumerate(order, start=1):
        first.synthesizer.weights = torch.full((3,), float(number))
        first.ledger.book("query")
        first.save(stage, kind)
        again = new_checkpoints(tmp_path)
        assert again.restore() == f"{stage} ({kind})"
        assert again.synthesizer.weights.tolist() == [number] * 3
        assert again.ledger.executed("query") == number
        assert again.finished(stage) == (kind == "final")


def test_another_plan_is_refused_before_anything_is_loaded(tmp_path):
    new_checkpoints(tmp_path).save("train", "final")
    other = new_checkpoints(tmp_path)
    other.ledger = Ledger(Budget(math.inf, 1e-5))
    other.ledger.adopt([Release("query", 1.0, num_steps=6)])
    other.synthesizer.weights = torch.ones(3)
    with pytest.raises(UserError, match="same configuration"):
        other.restore()
    assert other.synthesizer.weights.tolist() == [1.0] * 3


def test_a_checkpoint_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (write_text, (tmp_path / "harm", "done"))

    torch.save({"state": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(UserError, match=r"harmful\.pth"):
        read(str(tmp_path / "harmful.pth"))
    assert not (tmp_path / "harm").exists()


def test_a_file_of_other_content_is_not_a_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a checkpoint of this toolkit"):
        read(str(tmp_path / "other.pth"))


# ------------------------------------------------------------------------------------------------- samples


def test_samples_come_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    samples = Samples(images, np.arange(6, dtype=np.int64))
    write_samples(tmp_path / "gen" / "gen.npz", samples)
    again = read_samples(tmp_path / "gen" / "gen.npz")
    assert np.array_equal(again.images, images) and np.array_equal(again.labels, samples.labels)


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((2, 1, 4, 4), np.uint8)},
        {"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(2)},
        {"x": np.zeros((2, 1, 4, 4), np.float32), "y": np.zeros(2)},
        {"x": np.zeros((2, 1, 4, 4), np.uint8), "y": np.zeros(3)},
        {"x": np.array([{}, {}]), "y": np.zeros(2)},
    ],
)
def test_other_arrays_are_no_samples(tmp_path, arrays):
    np.savez(tmp_path / "gen.npz", **arrays)
    with pytest.raises(UserError, match=r"gen\.npz"):
        read_samples(tmp_path / "gen.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text"])
def test_damaged_samples_are_named(tmp_path, content):
    (tmp_path / "gen.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"gen\.npz"):
        read_samples(tmp_path / "gen.npz")


# ------------------------------------------------------------------------------------------------- results


@dataclasses.dataclass
class RunConfig:
    method: str = "Noise"
    data_name: str = "digits_8"
    epsilon: float = math.inf
    seed: int = 3
    preset: str = "quick"
    preset_tier: int = 10
    borrowed: bool = True
    images: None = None
    words: tuple[str, ...] = ("--method", "Noise", "seed=3")
    eval: object = dataclasses.field(default_factory=lambda: types.SimpleNamespace(mode="val"))
    snapshot: dict = dataclasses.field(
        default_factory=lambda: {"setup": {"precision": "tf32"}, "eval": {"mode": "val"}}
    )


TRAINING = {
    "budget": {"epsilon": math.inf, "delta": 1e-5},
    "private": False,
    "spent": math.inf,
    "noise_seeded": False,
    "revealed": [],
}


def test_selections_add_up_in_privacy_json(tmp_path):
    assert write_privacy(tmp_path, TRAINING)["run"] == f"{tmp_path.parent.name}/{tmp_path.name}"
    for number in (1, 2):
        for spent in (0.25, 0.5):  # booked choice by choice
            choice = {"id": str(number), "spent": spent}
            privacy = write_privacy(tmp_path, read_json(tmp_path / "privacy.json"), choice)
        assert [choice["spent"] for choice in privacy["selection"]] == [0.5] * number
    assert write_privacy(tmp_path, TRAINING)["selection"] == privacy["selection"]
    assert read_json(tmp_path / "privacy.json")["spent"] == math.inf


def test_what_was_shown_stays_in_privacy_json(tmp_path):
    """Also where the evaluation that was shown it did not come to its end, and the run is resumed."""
    write_privacy(tmp_path, {**TRAINING, "revealed": ["fidelity", "oracle"]})
    assert write_privacy(tmp_path, {**TRAINING, "revealed": ["fidelity"]})["revealed"] == [
        "fidelity",
        "oracle",
    ]


def test_writing_results_again_keeps_what_describes_the_training(tmp_path):
    choices = [{"spent": 0.5, "noise_seeded": False}, {"spent": 0.25, "noise_seeded": True}]
    privacy = {**TRAINING, "selection": choices}
    report, settings = Report({"fid/a": 1.0}, {"fid/a": {}}), {"mode": "syn", "seed": 3}
    first = results_of(tmp_path, RunConfig(), privacy, report, settings, {"train": 5.123}, {})
    write_json(tmp_path / "results.json", {**first, "git": "of the training"})
    snapshot = {"setup": {"precision": "float32"}, "eval": {"mode": "syn"}}
    again = RunConfig(seed=9, preset="paper", borrowed=False, words=("seed=9",), snapshot=snapshot)
    report = Report({"fid/b": 2.0}, {"fid/b": {}})
    settings = {"mode": "syn", "seed": 9}
    results = results_of(tmp_path, again, privacy, report, settings, {"evaluate": 1.0}, {"n": 7})
    assert results["git"] == "of the training" and results["judged_git"] == first["git"]
    assert results["metrics"] == {"fid/b": 2.0} and results["n"] == 7
    assert (results["seed"], results["preset"], results["borrowed"]) == (3, "quick", True)
    assert (results["precision"], results["eval_mode"], results["overrides"]) == ("tf32", "val", ["seed=3"])
    assert results["evaluation"] == {"mode": "syn", "seed": 9}
    assert results["timing"] == {"train": 5.12, "evaluate": 1.0}
    assert results["epsilon"] == results["spent_epsilon"] == math.inf
    assert results["selection_epsilon"] == 0.75
    assert results["noise_seeded"] is True, "the noise of one choice was known"


def test_the_settings_of_a_run_are_those_it_was_started_with(tmp_path):
    now = RunConfig(
        words=("--epsilon=1", "train.n_epochs=2", "-ed", "a=b", "seed=4", "--data_name", "digits_8")
    )
    assert settings_of(tmp_path, now)["overrides"] == ["train.n_epochs=2", "seed=4"]
    write_text(tmp_path / "config.yaml", "setup: {precision: bf16}\neval: {mode: sen}\n")
    write_json(tmp_path / "environment.json", {"command": ["run.py", "--method", "Noise", "setup=gpu"]})
    expected = {"precision": "bf16", "eval_mode": "sen", "overrides": ["setup=gpu"]}
    assert settings_of(tmp_path, now) == expected
    write_json(tmp_path / "environment.json", {})
    assert settings_of(tmp_path, now) == {**expected, "overrides": None}


def test_the_card_is_given_no_folder_of_the_command_line(tmp_path):
    """It is made to be shared."""
    words = (
        "model.ckpt=/home/ann/hiv/final.pth", "public_data.train_path=/data/ward 7/faces", "train.lr=1e-3",
        "public_data.selective.semantic_path=~/q.json", "sensitive_data.path=/data/hiv", "setup.device=cpu",
    )  # fmt: skip
    given = training_overrides(tmp_path, RunConfig(words=words))
    assert given == [
        "model.ckpt=final.pth",
        "public_data.train_path=faces",
        "train.lr=1e-3",
        "public_data.selective.semantic_path=q.json",
    ]


def test_the_time_of_a_stage_is_of_all_starts_together(tmp_path):
    with pytest.raises(KeyboardInterrupt), StageTimes(tmp_path).of("train"):
        raise KeyboardInterrupt
    (tmp_path / "timing.json").write_text('{"train": 100.0}')
    times = StageTimes(tmp_path)
    with times.of("train"):
        times.keep()
        assert StageTimes(tmp_path).seconds()["train"] >= 100
    with times.of("generate"):
        pass
    assert set(StageTimes(tmp_path).seconds()) == {"train", "generate"}
    assert 100 <= times.seconds()["train"] < 200


def test_a_public_set_may_lie_next_to_a_configuration_of_another_program(tmp_path):
    for text in ("- a\n- b\n", "name: other\n", "sensitive_data: {name: null}\n"):
        write_text(tmp_path / "config.yaml", text)
        require_not_from_run(tmp_path / "images", "--source")
    write_text(tmp_path / "config.yaml", "sensitive_data: {name: digits_8}\n")
    with pytest.raises(UserError, match=r"--source: .*private"):
        require_not_from_run(tmp_path / "images", "--source")
