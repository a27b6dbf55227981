"""The evaluator: what is reported, what is missing and why, and what the test set may influence."""

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity_inception

from data.cache import PrivateCache
from data.digits import load_digits_8
from data.spec import DataSpec, Samples
from evaluation.ceiling import with_ceiling
from evaluation.cost import evaluation_costs
from evaluation.evaluator import Evaluator, EvaluatorSettings
from evaluation.registry import check_metrics, memorisation_metrics, need_classifiers, needs_of
from evaluation.report import Report, accuracy_interval, spread
from evaluation.selection import split_samples
from extractors import inception, random_conv
from models import METHODS
from opacus_ext.noise import NoiseSource
from pipeline.evaluation import validation_data
from utils.config import load_config
from utils.errors import Unavailable, UserError
from utils.images import to_float
from utils.runtime import log
from utils.sections import EvalConfig

SPEC = DataSpec("digits_8", 8, 1, 10, 1437, tuple("0123456789"))


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, Samples]:
    """200 training and 100 test digits."""
    train, test = load_digits_8()
    return train.take(np.arange(200)), test.take(np.arange(100))


def config(**changes) -> EvalConfig:
    values = {
        "mode": "syn", "selection_epsilon": 1.0, "classifiers": ["small_cnn"], "metrics": ["accuracy"],
        "recipe": "quick", "num_val": 30, "batch_size": 64, "extractor": "random_conv",
        "oracles": False, "gallery": None, "ceiling": "none",
    }  # fmt: skip
    return EvalConfig(**values | changes)


def evaluate(
    digits,
    samples: Samples | None = None,
    *,
    test=None,
    select=None,
    validation=None,
    root="absent",
    cache=None,
    **changes,
):
    train, own_test = digits
    evaluator = Evaluator(EvaluatorSettings(config(**changes), SPEC, Path(root), "cpu", 0, cache))
    return evaluator.evaluate(
        train if samples is None else samples, train=train, test=test or own_test, select=select,
        validation=validation,
    )  # fmt: skip


class ChooseThird:
    """A noisy selection that always answers 2, and remembers what each candidate scores on `records`."""

    def __init__(self, records: Samples) -> None:
        self.records = records
        self.scores: dict[str, list[float]] = {}

    def choose(self, name, correct) -> int:
        assert name not in self.scores
        votes = correct(to_float(self.records.images), torch.from_numpy(self.records.labels))
        assert set(votes.unique().tolist()) <= {0.0, 1.0}
        self.scores[name] = (100 * votes.mean(dim=0)).tolist()
        return 2


def test_noisy_selection_makes_one_query_per_classifier_and_reports_its_choice(digits):
    select = ChooseThird(digits[1])
    report = evaluate(digits, mode="val", select=select)
    assert list(select.scores) == ["selection/small_cnn"]
    scores = select.scores["selection/small_cnn"]
    assert len(scores) == 10
    assert report.metrics["accuracy/small_cnn/noisy_val"] == pytest.approx(scores[2])
    assert report.metrics["accuracy/small_cnn/last_epoch"] == pytest.approx(scores[-1])
    assert scores[2] != scores[-1]
    assert report.metric_info["accuracy/small_cnn/noisy_val"]["epoch"] == 6
    assert "private" not in report.metric_info["accuracy/small_cnn/noisy_val"]


def test_mode_val_without_records_reports_the_rest(digits):
    report = evaluate(digits, mode="val", metrics=["accuracy", "fid"])
    assert set(report.missing) == {"accuracy/small_cnn/noisy_val", "accuracy/mean/noisy_val"}
    assert "eval.mode=syn" in report.missing["accuracy/small_cnn/noisy_val"]
    assert set(report.metrics) == {
        "accuracy/small_cnn/last_epoch", "accuracy/mean/last_epoch", "accuracy/small_cnn/syn_val",
        "accuracy/mean/syn_val", "fid/random_conv",
    }  # fmt: skip


def test_test_labels_do_not_influence_the_synthetic_selection(digits):
    test = digits[1]
    shuffled = Samples(test.images, np.random.default_rng(0).permutation(test.labels))
    first, second = evaluate(digits), evaluate(digits, test=shuffled)
    name = "accuracy/small_cnn/syn_val"
    assert first.metric_info[name]["epoch"] == second.metric_info[name]["epoch"]
    assert first.metrics[name] > second.metrics[name] + 20
    assert "private" not in first.metric_info[name]


def test_best_test_is_the_best_and_marked(digits):
    select = ChooseThird(digits[1])
    evaluate(digits, mode="val", select=select)
    report = evaluate(digits, mode="sen")
    assert report.metrics["accuracy/small_cnn/best_test"] == pytest.approx(
        max(select.scores["selection/small_cnn"])
    )
    assert "not a private result" in report.metric_info["accuracy/mean/best_test"]["private"]
    assert "private" not in report.metric_info["accuracy/small_cnn/last_epoch"]


def test_oracles_are_opt_in_and_marked(digits):
    assert not [name for name in evaluate(digits, mode="syn").metrics if "best" in name]
    records, shuffled = ChooseThird(digits[1]), np.random.default_rng(0).permutation(100)
    validation = digits[0].take(np.arange(100, 200))
    report = evaluate(digits, digits[0].take(np.arange(80)), mode="val", oracles=True, select=records,
                      validation=validation)  # fmt: skip
    scores = ChooseThird(validation)
    evaluate(digits, digits[0].take(np.arange(80)), mode="val", select=scores)
    of_validation = scores.scores["selection/small_cnn"]
    best = len(of_validation) - 1 - int(np.argmax(of_validation[::-1]))
    of_test = records.scores["selection/small_cnn"]
    assert report.metrics["accuracy/small_cnn/best_val"] == pytest.approx(of_test[best])
    assert report.metrics["accuracy/small_cnn/best_test"] == pytest.approx(max(of_test))
    for selection, where in (("best_val", "private validation images"), ("best_test", "test images")):
        for name in ("small_cnn", "mean"):
            assert where in report.metric_info[f"accuracy/{name}/{selection}"]["private"]
    # The labels of the test images do not reach the choice on validation images.
    other = Samples(digits[1].images, digits[1].labels[shuffled])
    again = evaluate(digits, digits[0].take(np.arange(80)), mode="val", oracles=True, select=ChooseThird(other),
                     validation=validation, test=other)  # fmt: skip
    name = "accuracy/small_cnn/best_val"
    assert again.metric_info[name]["epoch"] == report.metric_info[name]["epoch"]


def test_an_oracle_without_its_images_is_missing(digits):
    report = evaluate(digits, mode="val", oracles=True, select=ChooseThird(digits[1]))
    assert set(report.missing) == {"accuracy/small_cnn/best_val", "accuracy/mean/best_val"}


def test_classes_calibration_and_interval_belong_to_the_accuracy(digits):
    small = digits[0].take(np.flatnonzero(digits[0].labels != 3))
    report = evaluate(digits, small, metrics=["accuracy", "calibration_error"])
    name = "accuracy/small_cnn/last_epoch"
    tables, info = report.details[name], report.metric_info[name]
    confusion, labels = np.array(tables["confusion"]), digits[1].labels
    assert confusion.sum(axis=1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert report.metrics[name] == pytest.approx(100 * confusion.trace() / 100)
    assert tables["per_class"] == pytest.approx((100 * confusion.diagonal() / confusion.sum(axis=1)).tolist())
    assert tables["per_class"][3] == 0.0  # the class that the samples lack
    low, high = info["interval_95"]
    assert low < report.metrics[name] < high
    assert 0 < report.metrics["calibration_error/small_cnn/last_epoch"] < 1
    assert {"torch", "numpy"} <= set(info["versions"])


@pytest.mark.parametrize("count", [40, 297])
def test_scores_of_real_images_are_estimates_from_few_test_images(count):
    train, test = load_digits_8()
    metrics = ["accuracy", "fid", "fld"]
    report = evaluate(
        (train.take(np.arange(300)), test.take(np.arange(count))), metrics=metrics, ceiling="auto"
    )
    floors = {name: report.metric_info[f"{name}/random_conv"]["n_floor"] for name in ("fid", "fld")}
    assert floors == {"fid": count, "fld": count // 2}
    half = 50 - accuracy_interval(count // 4, count // 2)[0]
    (line,) = [line for line in report.table().splitlines() if line.startswith("real images: ")]
    assert f"{count // 2} test images" in line and f"{half:.0f} points" in line


def test_many_test_images_need_no_caution():
    info = {"better": "lower", "n_real": 9000, "n_fake": 10, "real_floor": 1.0, "n_floor": 1000}
    text = Report({"fid/x": 1.0}, {"fid/x": info}).about_real()
    assert "1,000 test images" in text and "points" not in text


def test_a_metric_without_real_images_has_no_number_of_them():
    info = {"better": "higher", "n_real": 0, "n_fake": 10}
    lines = Report(
        {"inception_score/x": 1.0, "fid/x": 2.0}, {"inception_score/x": info, "fid/x": info | {"n_real": 7}}
    ).table()
    rows = {line.split()[0]: line.split() for line in lines.splitlines() if "/x" in line}
    assert rows["inception_score/x"][2:] == ["higher", "10"] and rows["fid/x"][2:] == ["higher", "7", "10"]


def test_a_class_without_test_images_has_no_accuracy(digits):
    test = digits[1].take(np.flatnonzero(digits[1].labels != 3))
    assert evaluate(digits, test=test).details["accuracy/small_cnn/last_epoch"]["per_class"][3] is None


def test_sister_metrics_of_accuracy_share_its_classifiers_and_selections(digits):
    wanted = ["accuracy", "balanced_accuracy", "auroc"]
    report = evaluate(digits, metrics=wanted)
    labels = digits[1].labels
    for which in ("small_cnn/syn_val", "small_cnn/last_epoch", "mean/syn_val", "mean/last_epoch"):
        assert all(f"{name}/{which}" in report.metrics for name in wanted)
        levels = [report.metric_info[f"{name}/{which}"]["majority_class"] for name in wanted]
        assert levels == pytest.approx([100 * np.bincount(labels).max() / 100, 10.0, 0.5])
    tables = report.details["accuracy/small_cnn/syn_val"]
    balanced = report.metrics["balanced_accuracy/small_cnn/syn_val"]
    assert balanced == pytest.approx(np.mean(tables["per_class"]))
    assert 0.9 < report.metrics["auroc/small_cnn/syn_val"] <= 1


def test_no_auroc_without_a_second_class(digits):
    test = digits[1].take(np.flatnonzero(digits[1].labels == 3))
    report = evaluate(digits, test=test, metrics=["auroc", "accuracy"])
    assert list(report.missing) == ["auroc"] and "two classes" in report.missing["auroc"]
    info = report.metric_info["accuracy/small_cnn/last_epoch"]
    assert info["majority_class"] == 100.0


def test_each_metric_of_classifiers_needs_one(digits):
    for name in ("accuracy", "balanced_accuracy", "auroc", "calibration_error"):
        with pytest.raises(UserError, match=f"eval.classifiers.*{name}"):
            evaluate(digits, metrics=[name], classifiers=[])
        assert "classifiers" in needs_of(["fid", name.upper()])
    assert "classifiers" not in needs_of(["fid", "kid"])


def test_lists_of_metrics_come_from_the_registry():
    assert need_classifiers(["fid", "AUROC", "kid", "accuracy"]) == ["auroc", "accuracy"]
    assert set(memorisation_metrics()) == {"authpct", "nn_ratio", "fld_gap"}


@pytest.mark.parametrize("name", ["Accuracy", "balanced_accuracy", "auroc", "calibration_error"])
def test_every_metric_of_classifiers_gets_the_noisy_choice_that_it_needs(digits, name):
    """However the metric and the classifier are spelled."""
    settings = ["eval.mode=val", "sensitive_data.num_val=100", "eval.classifiers=[Small_CNN]"]
    argv = ["--method", "Noise", "--data_name", "digits_8", *settings]
    held_out = digits[0].take(np.arange(100))
    for metrics, planned in ((f"[{name}]", ["selection/small_cnn"]), ("[fid]", None)):
        asked = load_config([*argv, f"eval.metrics={metrics}"], METHODS)
        found = validation_data(asked, SPEC, held_out, NoiseSource(None), "cpu")
        names = None if found is None else [release["name"] for release in found.report()["releases"]]
        assert names == planned


# ------------------------------------------------------------------------------------------------- ceiling


def test_the_ceiling_is_the_classifier_trained_on_all_real_training_images(digits, monkeypatch):
    monkeypatch.setattr("evaluation.classifiers.recipe.QUICK_EPOCHS", (2, 2))
    noise = Samples(np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), np.uint8), np.arange(60) % 10)
    metrics = ["accuracy", "auroc", "calibration_error"]
    report = evaluate(digits, noise, metrics=metrics, ceiling="auto")
    # With nothing held out, samples that are the real images, in the order of training, lead to the same network.
    order, _ = split_samples(200, 0)
    real = evaluate(digits, digits[0].take(np.argsort(order)), metrics=metrics, num_val=0)
    for name in metrics:
        for selection in ("syn_val", "last_epoch"):
            ceiling = report.metric_info[f"{name}/small_cnn/{selection}"]["ceiling"]
            assert ceiling == pytest.approx(real.metrics[f"{name}/small_cnn/last_epoch"])
    info = report.metric_info["accuracy/mean/syn_val"]
    assert info["ceiling"] > report.metrics["accuracy/mean/syn_val"]
    assert "ceiling" not in real.metric_info["accuracy/small_cnn/last_epoch"]
    row = next(line for line in report.table().splitlines() if line.startswith("accuracy/small_cnn/syn_val"))
    assert f"{info['ceiling']:.2f}" in row.split() and f"{info['majority_class']:.2f}" in row.split()


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", ["logistic_regression"]), ("all", ["logistic_regression", "wrn"]), ("none", [])]
)  # fmt: skip
def test_large_classifiers_have_a_ceiling_only_on_request(choice, expected):
    classifiers = ["Logistic_Regression", "WRN"]
    assert with_ceiling(config(classifiers=classifiers, ceiling=choice)) == expected
    assert with_ceiling(config(classifiers=classifiers, ceiling=choice, metrics=["fid"])) == []


def test_the_estimated_cost_counts_one_training_on_real_images_per_ceiling(monkeypatch):
    monkeypatch.setattr("evaluation.cost.seconds_of", lambda work: 1.0)
    monkeypatch.setattr("evaluation.cost.batch_rows", lambda resolution: 2)  # 0.5 seconds per image

    def costs(ceiling: str) -> dict[str, float]:
        wanted = config(classifiers=["Small_CNN", "resnet"], ceiling=ceiling)
        found = evaluation_costs(wanted, SPEC, 100, 10, Path("absent"), "cpu")
        return {cost.stage: cost.seconds for cost in found}

    trained = {"classifier small_cnn", "classifier resnet"}
    assert set(costs("none")) == trained
    assert set(costs("auto")) == trained | {"ceiling small_cnn"}
    assert set(costs("all")) == trained | {"ceiling small_cnn", "ceiling resnet"}
    # The quick recipe trains 20 epochs on 1,437 images; the last one is tested on 10.
    assert costs("auto")["ceiling small_cnn"] == pytest.approx((20 * 1437 + 10) / 2)


def test_a_mean_has_a_ceiling_if_all_its_classifiers_have(digits, monkeypatch):
    monkeypatch.setattr("evaluation.classifiers.recipe.QUICK_EPOCHS", (1, 1))
    monkeypatch.setattr("evaluation.ceiling.SMALL_CLASSIFIERS", ("small_cnn",))
    report = evaluate(digits, classifiers=["small_cnn", "logistic_regression"], ceiling="auto")
    found = {name.split("/")[1] for name, info in report.metric_info.items() if "ceiling" in info}
    assert found == {"small_cnn"}


def test_a_ceiling_is_trained_once_per_dataset_recipe_and_seed(digits, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("evaluation.classifiers.recipe.QUICK_EPOCHS", (1, 1))
    monkeypatch.setattr("evaluation.ceiling.log.info", trained.append)
    name = "accuracy/logistic_regression/last_epoch"
    small = digits[0].take(np.arange(40))

    def ceiling(spec=SPEC, seed=0, train=digits[0]) -> float:
        settings = config(classifiers=["logistic_regression"], ceiling="auto")
        evaluator = Evaluator(
            EvaluatorSettings(settings, spec, Path("absent"), "cpu", seed, PrivateCache(tmp_path))
        )
        report = evaluator.evaluate(small, train=train, test=digits[1], select=None)
        return report.metric_info[name]["ceiling"]

    first = ceiling()
    assert ceiling() == first and len(trained) == 1
    others = digits[0].take(np.arange(len(digits[0]))[::-1])  # as many as before
    again = replace(SPEC, identity="prepared again")
    for changes in ({"seed": 1}, {"train": small}, {"train": others}, {"spec": again}):
        before = len(trained)
        ceiling(**changes)
        assert len(trained) == before + 1, changes
    (kept,) = (path for path in tmp_path.iterdir() if "prepared again" in path.name)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    content = kept.read_bytes()
    for damaged in (content[:100], b""):
        kept.write_bytes(damaged)
        assert ceiling(spec=again) == first
        assert kept.read_bytes() == content


def test_mean_over_classifiers(digits, monkeypatch):
    monkeypatch.setattr("evaluation.classifiers.recipe.QUICK_EPOCHS", (1, 1))
    small = digits[0].take(np.arange(60))
    report = evaluate(digits, small, classifiers=["small_cnn", "resnet"])
    each = [report.metrics[f"accuracy/{name}/last_epoch"] for name in ("small_cnn", "resnet")]
    assert report.metrics["accuracy/mean/last_epoch"] == pytest.approx(np.mean(each))
    info = report.metric_info["accuracy/mean/last_epoch"]
    assert info["std"] == pytest.approx(np.std(each))
    assert info["max"] == max(each)
    assert info["values"] == dict(zip(("small_cnn", "resnet"), each, strict=True))
    (low, least), (high, most) = sorted(info["values"].items(), key=lambda item: item[1])
    (line,) = spread(info)
    assert line.index(f"{least:.4g} ({low})") < line.index(f"{most:.4g} ({high})")
    assert f"accuracy/mean/last_epoch: {line}" in report.table()
    assert (info["n_real"], info["n_fake"], info["better"]) == (100, 54, "higher")


def test_split_of_samples_is_fixed_disjoint_and_bounded():
    chosen, held_out = split_samples(100, 500)
    assert len(held_out) == 10
    assert sorted([*chosen, *held_out]) == list(range(100))
    assert split_samples(60_000, 5000)[1].shape == (5000,)
    assert np.array_equal(split_samples(100, 500)[0], chosen)


def test_fidelity_with_random_conv(digits):
    report = evaluate(digits, metrics=["fid", "inception_score", "precision_recall"])
    assert set(report.metrics) == {
        f"{name}/random_conv" for name in ("fid", "precision", "recall", "precision_k4", "recall_k4")
    }
    assert report.metrics["fid/random_conv"] == pytest.approx(0.0, abs=1e-5)
    assert report.metrics["precision/random_conv"] == report.metrics["recall/random_conv"] == 1.0
    info = report.metric_info["fid/random_conv"]
    assert (info["better"], info["n_real"], info["n_fake"]) == ("lower", 200, 200)
    assert info["extractor"] == "random_conv"
    assert info["n_below_dim"] is True
    assert "training images" in info["private"]
    assert "probabilities" in report.missing["inception_score/random_conv"]


def test_real_images_in_the_place_of_the_samples(digits):
    wanted = ["fid", "precision", "authpct", "fld", "nn_ratio"]
    as_samples = evaluate(digits, digits[1], metrics=wanted)
    report = evaluate(digits, metrics=wanted)
    for name in ("fid", "precision", "authpct"):
        full = f"{name}/random_conv"
        assert report.metric_info[full]["real_floor"] == pytest.approx(as_samples.metrics[full], rel=1e-6)
        assert report.metric_info[full]["real_floor"] != report.metrics[full]
    # Test images cannot be samples and unseen images at once: each half has its part.
    assert report.metric_info["nn_ratio/random_conv"]["real_floor"] == pytest.approx(1, abs=0.15)
    assert abs(report.metric_info["fld/random_conv"]["real_floor"]) < report.metrics["fld/random_conv"] + 100


def test_too_few_test_images_leave_the_comparison_out(digits):
    few = digits[1].take(np.arange(15))
    report = evaluate(digits, test=few, metrics=["nn_ratio", "precision"])
    assert "real_floor" not in report.metric_info["nn_ratio/random_conv"]  # 7 images in a half, 10 are needed
    assert "real_floor" in report.metric_info["precision/random_conv"]
    report = evaluate(digits, test=digits[1].take(np.arange(9)), metrics=["nn_ratio"])
    reason = report.missing["nn_ratio/random_conv"]
    assert "10 test images" in reason and reason.endswith("9")


def test_copies_show_in_the_memorisation_metrics(digits):
    train, fresh = digits[0], load_digits_8()[0].take(np.arange(1000, 1200))
    wanted = {"metrics": ["authpct", "nn_ratio", "fld_gap"]}
    copied, drawn = (evaluate(digits, samples, **wanted).metrics for samples in (train, fresh))
    assert copied["authpct/random_conv"] == 0 < 30 < drawn["authpct/random_conv"]
    assert copied["nn_ratio/random_conv"] < 0.75 < 0.9 < drawn["nn_ratio/random_conv"]
    assert copied["fld_gap/random_conv"] < drawn["fld_gap/random_conv"] - 10


def test_random_conv_distinguishes_noise_from_digits(digits):
    train = digits[0]
    half, other = train.take(np.arange(100)), train.take(np.arange(100, 200))
    noise = Samples(np.random.default_rng(0).integers(0, 256, half.images.shape, dtype=np.uint8), half.labels)
    near, far = (
        evaluate((other, digits[1]), samples, metrics=["fid", "precision"]).metrics
        for samples in (half, noise)
    )
    assert far["fid/random_conv"] > 10 * near["fid/random_conv"]
    assert far["precision/random_conv"] < 0.1 < near["precision/random_conv"]


def test_random_conv_is_fixed():
    # Its weights come from NumPy alone, so every machine computes these features.
    extractor = random_conv.RandomConvExtractor(SPEC, Path("absent"), "cpu")
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    found = extractor(image)[0][0]
    assert found.shape == (256,)
    again = random_conv.RandomConvExtractor(SPEC, Path("absent"), "cpu")(image)[0][0]
    assert torch.equal(found, again)
    frozen = [0.649744, 0.417458, 0.629656, 0.241391]
    assert found[[0, 70, 128, 200]].tolist() == pytest.approx(frozen, rel=1e-4)


def test_only_the_requested_values_are_computed(digits):
    assert set(evaluate(digits, metrics=["recall"]).metrics) == {"recall/random_conv"}
    wanted = check_metrics(["Precision_Recall", "fid", "recall"])
    assert wanted == ["precision", "recall", "precision_k4", "recall_k4", "fid"]


def test_missing_weights_are_reported_with_the_command_and_hide_nothing(digits, tmp_path):
    wanted = ["fid", "inception_score", "precision", "recall", "accuracy"]
    report = evaluate(digits, root=tmp_path, extractor="inception", metrics=wanted)
    missing = {f"{name}/inception" for name in ("fid", "inception_score", "precision", "recall")}
    assert set(report.missing) == missing
    command = f"python scripts/prepare_weights.py --name inception --weights_root {tmp_path}"
    assert all(command in reason for reason in report.missing.values())
    assert "accuracy/small_cnn/syn_val" in report.metrics
    assert "fid/inception: " in report.table() and "weights" in report.table()


def test_damaged_weights_are_refused(digits, tmp_path):
    (tmp_path / inception.INCEPTION_WEIGHTS).write_bytes(b"<html>not found</html>")
    report = evaluate(digits, root=tmp_path, extractor="inception", metrics=["fid"])
    assert "is damaged" in report.missing["fid/inception"]
    assert report.metrics == {}


def test_too_few_images_are_refused_with_the_number_needed(digits):
    report = evaluate(digits, digits[0].take(np.arange(4)), metrics=["precision", "fid", "accuracy"])
    reason = report.missing["precision/random_conv"]
    assert "5 samples" in reason and reason.endswith("4")
    assert "fid/random_conv" in report.metrics
    assert "eval.num_val" in report.missing["accuracy/small_cnn/syn_val"]
    assert np.isfinite(report.metrics["accuracy/small_cnn/last_epoch"])


def test_a_failed_metric_is_reported_and_hides_no_other(digits, monkeypatch, caplog):
    def broken(*_):
        return 1 / 0

    monkeypatch.setattr("evaluation.metrics.fid.frechet_distance", broken)
    monkeypatch.setattr(log, "propagate", True)  # a program that ran in this process has switched it off
    with caplog.at_level("WARNING"):
        report = evaluate(digits, metrics=["fid", "recall"])
    assert report.missing["fid/random_conv"].startswith("failed with ZeroDivisionError: division by zero")
    assert set(report.metrics) == {"recall/random_conv"}
    assert "return 1 / 0" in caplog.text  # the traceback, so that a bug can be found


def test_an_extractor_that_fails_hides_no_metric_that_does_without(digits, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(random_conv.RandomConvExtractor, "__call__", broken)
    report = evaluate(digits, metrics=["fid", "authpct", "accuracy"], gallery="private")
    assert set(report.missing) == {"fid/random_conv", "authpct/random_conv", "gallery"}
    assert all("RuntimeError: out of memory" in reason for reason in report.missing.values())
    assert "accuracy/small_cnn/syn_val" in report.metrics


def test_a_value_is_kept_if_that_of_real_images_fails(digits, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("evaluation.evaluator.real_values", broken)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING"):
        report = evaluate(digits, metrics=["fid"])
    assert np.isfinite(report.metrics["fid/random_conv"]) and report.missing == {}
    assert "real_floor" not in report.metric_info["fid/random_conv"]
    assert "metric fid of real images" in caplog.text and "RuntimeError: out of memory" in caplog.text


def test_a_failure_of_the_private_selection_ends_the_run(digits):
    class Broken:
        def choose(self, name, correct):
            raise RuntimeError("no noise")

    with pytest.raises(RuntimeError, match="no noise"):
        evaluate(digits, mode="val", select=Broken(), metrics=["accuracy", "fid"])


@pytest.fixture
def random_inception(tmp_path, monkeypatch) -> str:
    """A file of random weights under a name that carries its hash; returns its SHA-256."""
    network = torch_fidelity_inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patched:
        patched.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(network, "load_state_dict", lambda *_: None)
        state = network("random", ["2048"]).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"weights-{digest[:8]}.pth"
    path.rename(tmp_path / name)
    monkeypatch.setattr(inception, "INCEPTION_WEIGHTS", name)
    return digest


def test_inception_features_serve_all_metrics_in_one_pass(digits, random_inception, tmp_path, monkeypatch):
    seen = []
    forward = inception.InceptionExtractor.__call__

    def counted(self, images):
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(inception.InceptionExtractor, "__call__", counted)
    real, fake = digits[0].take(np.arange(10)), digits[0].take(np.arange(10, 20))
    wanted = {"metrics": ["fid", "kid", "inception_score", "precision", "coverage", "authpct"]}
    test = digits[1].take(np.arange(6))
    report = evaluate((real, test), fake, root=tmp_path, extractor="inception", **wanted)
    assert report.missing == {}
    assert set(report.metrics) == {f"{name}/inception" for name in wanted["metrics"]}
    assert sorted(seen) == [6, 10, 10]
    assert 1 - 1e-9 <= report.metrics["inception_score/inception"] <= 10  # random weights may give exactly 1
    assert report.metric_info["fid/inception"]["weights_sha256"] == random_inception
    assert "torch-fidelity" in report.metric_info["fid/inception"]
    assert "private" not in report.metric_info["inception_score/inception"]


def test_grey_and_its_colour_copy_have_equal_inception_features(random_inception, tmp_path):
    extractor = inception.InceptionExtractor(SPEC, tmp_path, "cpu")
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    extracted, logits = extractor(grey)
    assert extracted.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    assert torch.equal(extracted, extractor(grey.repeat(1, 3, 1, 1))[0])


def test_cached_features_need_no_second_pass(digits, tmp_path, monkeypatch):
    arguments = {"metrics": ["fid", "precision", "recall"], "cache": PrivateCache(tmp_path)}
    first = evaluate(digits, **arguments)

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(random_conv.RandomConvExtractor, "__call__", refuse)
    assert evaluate(digits, **arguments) == first
    changed = digits[0].images.copy()
    changed[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="computed again"):
        evaluate(digits, Samples(changed, digits[0].labels), **arguments)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-50]),
        lambda path: path.write_bytes(b"hello"),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: path.write_bytes(path.read_bytes()[:300] + b"????" + path.read_bytes()[304:]),
    ],
)
def test_damaged_features_are_computed_again_and_replaced(digits, tmp_path, monkeypatch, caplog, damage):
    arguments = {"metrics": ["fid"], "cache": PrivateCache(tmp_path)}
    first = evaluate(digits, **arguments)
    paths = list(tmp_path.glob("*.npz"))
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        damage(path)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING"):
        assert evaluate(digits, **arguments) == first
    paths_in_log = {line.partition(": cached features")[0] for line in caplog.messages}
    assert paths_in_log == set(map(str, paths)) and paths
    assert {path: path.read_bytes() for path in paths} == whole


def test_features_that_cannot_be_kept_cost_a_warning_alone(digits, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING"):
        report = evaluate(digits, metrics=["fid"], cache=PrivateCache(tmp_path / "file" / "cache"))
    assert "fid/random_conv" in report.metrics
    (line,) = set(caplog.messages)
    assert "not kept" in line and str(tmp_path / "file" / "cache") in line

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation.features.np.savez", full)
    cache = PrivateCache(tmp_path / "full")
    caplog.clear()
    assert "fid/random_conv" in evaluate(digits, metrics=["fid"], cache=cache).metrics
    assert len({line for line in caplog.messages if "not cached" in line}) == 2
    assert [path.name for path in cache.folder.iterdir()] == ["key"]


@pytest.mark.parametrize(
    ("shape", "words"),
    [((5, 3, 8, 8), "3x8x8.*has 1x8x8"), ((5, 1, 16, 16), "1x16x16"), ((0, 1, 8, 8), "at least one image")],
)
def test_images_of_another_shape_are_refused(digits, shape, words):
    samples = Samples(np.zeros(shape, np.uint8), np.zeros(shape[0], np.int64))
    with pytest.raises(UserError, match=words):
        evaluate(digits, samples)


def test_labels_outside_the_classes_are_refused(digits):
    samples = Samples(digits[0].images[:3], np.array([0, 1, 10]))
    with pytest.raises(UserError, match=r"labels.* 10\b.* 0 to 9"):
        evaluate(digits, samples)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ["fidd"]}, "did you mean 'fid'"),
        ({"classifiers": ["vgg"]}, "unknown eval.classifiers 'vgg'"),
        ({"extractor": "vgg"}, "unknown eval.extractor 'vgg'"),
        ({"classifiers": []}, "needs at least one"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(changes, words):
    with pytest.raises(UserError, match=words):
        Evaluator(EvaluatorSettings(config(**changes), SPEC, Path("absent"), "cpu", 0))


def test_missing_metrics_are_reported_for_this_evaluation_alone():
    earlier = Report(missing={"accuracy": "no memory", "fid/inception": "no weights"})
    found = {"fid/random_conv": 2.0}
    written = Report(found, {name: {} for name in found}, {"kid/inception": "no weights"}).after(earlier, {})
    assert (set(written.metrics), set(written.missing)) == (set(found), {"kid/inception"})


def report_of(values: dict, settings: dict | None = None, classifiers=("a", "b")) -> Report:
    """A report as one evaluation finds it, or with `settings`, as it is read from its file."""
    known = {"better": "higher", "n_real": 10, "n_fake": 10} | ({"evaluation": settings} if settings else {})
    of_classifier = {"mean": {"classifiers": list(classifiers)}, "fid": {}}
    return Report(
        values, {name: known | of_classifier.get(name.split("/")[-1], {"epoch": 1}) for name in values}
    )


def read_again(report: Report, settings: dict) -> Report:
    info = {name: {"evaluation": settings} | known for name, known in report.metric_info.items()}
    return replace(report, metric_info=info)


def test_a_value_from_other_settings_is_kept_next_to_the_new_one():
    quick, paper = (
        {"recipe": "quick", "seed": 0, "mode": "syn"},
        {"recipe": "paper", "seed": 0, "mode": "val"},
    )
    earlier = report_of({"accuracy/a": 50.0, "accuracy/b": 60.0, "fid": 3.0}, quick)
    written = report_of({"accuracy/a": 70.0}).after(earlier, paper)
    assert list(written.metrics.items()) == [("accuracy/a", 70.0), ("accuracy/b", 60.0), ("fid", 3.0)], (
        "in their order"
    )
    assert written.metric_info["accuracy/a"]["before"][0] | {"evaluation": None} == {
        "value": 50.0, "with": "recipe=quick", "evaluation": None
    }  # fmt: skip
    lines = written.table().splitlines()
    assert "  accuracy/a: 50 with recipe=quick" in lines and any(
        line.startswith("  accuracy/b: ") and "recipe=quick" in line for line in lines
    )
    assert "  fid" not in written.table(), "classifiers have nothing to do with it"
    third = report_of({"accuracy/a": 71.0, "accuracy/b": 61.0}).after(read_again(written, paper), paper)
    assert [entry["value"] for entry in third.metric_info["accuracy/a"]["before"]] == [50.0, 70.0]
    assert [entry["value"] for entry in third.metric_info["accuracy/b"]["before"]] == [60.0]
    back = report_of({"accuracy/a": 51.0}).after(read_again(third, paper), quick)
    assert [entry["value"] for entry in back.metric_info["accuracy/a"]["before"]] == [50.0, 70.0, 71.0]
    assert back.metric_info["accuracy/b"]["unlike_now"] == "recipe=paper"


def test_a_mean_over_other_classifiers_is_another_value():
    settings = {"recipe": "quick", "seed": 0}
    earlier = report_of({"accuracy/mean": 50.0}, settings)
    same = report_of({"accuracy/mean": 50.0}).after(earlier, settings)
    assert "before" not in same.metric_info["accuracy/mean"]
    alone = report_of({"accuracy/mean": 55.0}, classifiers=["a"]).after(earlier, settings)
    assert alone.metrics == {"accuracy/mean": 50.0}, "a mean over one takes the place of one over two"
    written = report_of({"accuracy/mean": 70.0}, classifiers=["c", "d"]).after(earlier, settings)
    assert "  accuracy/mean: 50 with classifiers=['a', 'b']" in written.table().splitlines()


def test_report_survives_json_and_prints_every_name(digits):
    report = evaluate(digits, metrics=["fid", "inception_score"])
    assert Report(**json.loads(json.dumps(report.to_dict()))) == report
    lines = report.table().splitlines()
    assert lines[2].startswith("fid/random_conv *")
    assert len(lines[0].rstrip()) == len(lines[1])
    assert lines[-1].startswith("missing: inception_score/random_conv: ")


def test_a_broken_torchvision_is_reported_in_one_line_with_the_fix(monkeypatch):
    import builtins

    from extractors.inception import _inception_network

    real_import = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.startswith("torch_fidelity"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(Unavailable, match="pip install --force-reinstall torch torchvision") as caught:
        _inception_network()
    assert "\n" not in str(caught.value)


def test_a_different_privacy_cost_of_a_choice_is_reported():
    earlier = report_of({"accuracy/a": 50.0}, {"mode": "val", "selection_epsilon": 1.0})
    written = report_of({"accuracy/a": 60.0}).after(earlier, {"mode": "val", "selection_epsilon": 0.01})
    assert "  accuracy/a: 50 with selection_epsilon=1.0" in written.table().splitlines()


def test_a_repeated_measurement_with_the_same_settings_is_kept():
    """Of a noisy choice, which was paid for, or of the same samples in another order."""
    settings = {"recipe": "quick", "seed": 0}
    written = report_of({"accuracy/a": 51.0}).after(report_of({"accuracy/a": 50.0}, settings), settings)
    assert "  accuracy/a: 50 with the same settings, before" in written.table().splitlines()
    third = report_of({"accuracy/a": 52.0}).after(read_again(written, settings), settings)
    assert [entry["value"] for entry in third.metric_info["accuracy/a"]["before"]] == [50.0, 51.0]
