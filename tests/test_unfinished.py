"""An evaluation that is stopped keeps its finished classifiers and metrics; its time is printed before it starts."""

import dataclasses
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import call, strict_json

import eval as eval_program
from data.cache import PrivateCache
from data.digits import load_digits_8
from data.spec import DataSpec
from evaluation.classifiers import training
from evaluation.evaluator import Evaluator, EvaluatorSettings
from evaluation.unfinished import Unfinished, unfinished
from models import METHODS
from pipeline import evaluation_time
from pipeline.evaluation_time import classifier_time_line
from utils.config import load_config
from utils.stopping import StoppedBySignal
from utils.timing import Cost

SPEC = DataSpec("digits_8", 8, 1, 10, 200, tuple("0123456789"))


@pytest.fixture(scope="module")
def digits():
    train, test = load_digits_8()
    return train.take(np.arange(200)), test.take(np.arange(100))


@pytest.fixture
def images(digits, tmp_path):
    """60 digits as an npz."""
    np.savez(tmp_path / "images.npz", x=digits[0].images[:60], y=digits[0].labels[:60])
    return tmp_path / "images.npz"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The classifiers that are trained, in their order."""
    names, real = [], training.train_classifier

    def train(name, *arguments, **options):
        names.append(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(training, "train_classifier", train)
    return names


def stop_at(monkeypatch, stopped: str) -> None:
    """Let a signal come when classifier `stopped` begins."""
    real = training.train_classifier

    def train(name, *arguments, **options):
        if name == stopped:
            raise StoppedBySignal(15)
        return real(name, *arguments, **options)

    monkeypatch.setattr(training, "train_classifier", train)


def evaluate(images: Path, root: Path, out: Path):
    argv = ["--images", str(images), "--data_name", "digits_8", "--data_root", str(root), "--out", str(out)]
    return call(
        eval_program.main, [*argv, "eval.ceiling=none", "eval.metrics=[kid,accuracy]", "eval.num_val=10"]
    )


def test_the_same_command_trains_only_the_remaining_classifiers(images, tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "logistic_regression")
        outcome = evaluate(images, tmp_path / "root", tmp_path / "out")
    assert outcome.code == 143 and trained == ["small_cnn"] and not (tmp_path / "out").exists()
    assert "same command" in outcome.out
    kept = list(tmp_path.glob("root/digits_8/.cache/evaluation-*"))
    assert len(kept) == 1 and stat.S_IMODE(kept[0].stat().st_mode) == 0o700
    files = sorted(kept[0].iterdir())
    assert len(files) == 2 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    metric = next(path for path in files if path.suffix == ".json")
    changed = json.loads(metric.read_text())
    changed["samples"]["kid"]["value"] = 0.123  # shows whether it is read
    metric.write_text(json.dumps(changed))

    outcome = evaluate(images, tmp_path / "root", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert trained == ["small_cnn", "logistic_regression"]
    assert "small_cnn about" not in outcome.out and "logistic_regression about" in outcome.out
    assert not kept[0].exists()
    resumed = strict_json(tmp_path / "out" / "results.json")["metrics"]
    assert resumed.pop("kid/random_conv") == 0.123

    assert evaluate(images, tmp_path / "other root", tmp_path / "uninterrupted").code == 0
    whole = strict_json(tmp_path / "uninterrupted" / "results.json")["metrics"]
    assert whole.pop("kid/random_conv") != 0.123 and whole == resumed


class FirstChoice:
    """A noisy selection that counts its choices."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def choose(self, name, correct) -> int:
        self.asked.append(name)
        return 0


def settings(tmp_path, *more: str, mode: str = "val") -> EvaluatorSettings:
    argv = ["--method", "Noise", "--data_name", "digits_8", "preset=quick", "eval.metrics=[accuracy]"]
    config = load_config([*argv, f"eval.mode={mode}", "eval.ceiling=none", *more], METHODS).eval
    return EvaluatorSettings(config, SPEC, tmp_path, "cpu", 0, PrivateCache(tmp_path / "cache"))


def test_a_noisy_choice_is_reused_by_its_own_run_alone(digits, tmp_path, trained, monkeypatch):
    train, test = digits
    own, other = (tmp_path / name for name in ("run", "copy"))
    choices = FirstChoice()

    def start(folder, *more):
        used = settings(tmp_path, *more)
        kept = unfinished(used, train, folder)
        return Evaluator(used).evaluate(train, train=None, test=test, select=choices, kept=kept), kept

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "logistic_regression")
        start(own)
    report, kept = start(own)
    assert choices.asked == ["selection/small_cnn", "selection/logistic_regression"]
    assert report.metric_info["accuracy/small_cnn/noisy_val"]["epoch"] == 2
    start(other)  # its privacy.json has no choice
    assert len(choices.asked) == 4
    start(own, "eval.selection_epsilon=2")
    assert len(choices.asked) == 6
    kept.discard()
    start(own)  # an evaluation after a finished one makes new choices
    assert len(choices.asked) == 8 and len(trained) == 8


def test_a_damaged_file_costs_a_training_and_no_cache_keeps_nothing(digits, tmp_path, trained):
    train, test = digits
    used = settings(tmp_path, "eval.classifiers=[logistic_regression]", mode="syn")
    kept = unfinished(used, train, None)
    for _ in range(2):
        Evaluator(used).evaluate(train, train=None, test=test, select=None, kept=kept)
        for path in (tmp_path / "cache").glob("evaluation-*/*"):
            path.write_bytes(path.read_bytes()[:50])
    assert trained == ["logistic_regression"] * 2
    nothing = unfinished(dataclasses.replace(used, cache=None), train, None)
    nothing.keep_metric("kid", {}, {})
    assert nothing.is_empty() and nothing.metric("kid") is None


@pytest.mark.parametrize(
    ("arguments", "program", "advice"),
    [
        (["--images", "x.npz", "preset=paper"], "eval", "preset=quick"),
        (["--method", "Noise", "preset=paper"], "run", "eval=quick"),
        (["--images", "x.npz", "preset=quick"], "eval", None),
    ],
)
def test_the_time_of_the_classifiers_is_printed_with_a_faster_way(arguments, program, advice, monkeypatch):
    config = load_config([*arguments, "--data_name", "digits_8"], METHODS, program)
    if program == "eval":
        config = dataclasses.replace(config, images=Path("x.npz"))
    costs = {"resnet": Cost("classifier resnet", "", 3600.0), "wrn": Cost("classifier wrn", "", 7200.0)}
    monkeypatch.setattr(evaluation_time, "classifier_costs", lambda *_: costs)
    line = classifier_time_line(config, SPEC, 100, 50, "cpu")
    assert "3.0 hours" in line and "wrn about 2.0 hours" in line
    assert ("eval=quick" in line or "preset=quick" in line) == (advice is not None)
    assert advice is None or f"; {advice} " in line


def test_a_dry_run_of_an_evaluation_prints_its_time(images, tmp_path):
    argv = ["--images", str(images), "--data_name", "digits_8", "--data_root", str(tmp_path), "--dry_run"]
    outcome = call(eval_program.main, argv)
    assert outcome.code == 0, outcome.err
    for part in (
        "classifier small_cnn: ",
        "ceiling small_cnn: ",
        "features random_conv: ",
        "together: about ",
    ):
        assert part in outcome.out


def test_without_classifiers_there_is_no_time_of_classifiers():
    config = load_config(["--method", "Noise", "--data_name", "digits_8", "eval.metrics=[fid]"], METHODS)
    assert classifier_time_line(config, SPEC, 100, 50, "cpu", Unfinished()) is None
