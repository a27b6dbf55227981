"""What an evaluation is given of the private images: what its metrics need, and no more."""

import numpy as np
import pytest

from data.spec import DataSpec, Samples
from evaluation.evaluator import Evaluator, EvaluatorSettings
from evaluation.listing import evaluation_line
from models import METHODS
from opacus_ext.noise import NoiseSource
from pipeline.judging import CEILING, ORACLE, SHOWN, RealData, open_door, revealed, validation_data
from utils.config import load_config
from utils.errors import UserError

SPEC = DataSpec("digits_8", 8, 1, 10, 20, tuple("0123456789"))
IMAGES = Samples(np.zeros((20, 1, 8, 8), np.uint8), np.zeros(20, np.int64))


def config_with(*settings: str):
    argv = ["--method", "Noise", "--data_name", "digits_8", "preset=quick", "sensitive_data.num_val=137"]
    return load_config([*argv, *settings], METHODS)


@pytest.mark.parametrize(
    ("metrics", "asked"),
    [
        ("accuracy", True),
        ("ACCURACY", True),
        ("calibration_error", True),
        ("fid,calibration_error", True),
        ("fid", False),
        ("", False),
    ],
)
def test_private_choices_are_planned_and_announced_for_every_metric_with_classifiers(metrics, asked):
    config = config_with("eval.mode=val", f"eval.metrics=[{metrics}]")
    held_out = validation_data(config, SPEC, IMAGES, NoiseSource(None), "cpu")
    planned = [] if held_out is None else [release.name for release in held_out.ledger.releases()]
    assert planned == ([f"selection/{name}" for name in config.eval.classifiers] if asked else [])
    line = evaluation_line(config)
    assert ("eval.selection_epsilon" in line) == asked and ("costs no epsilon" in line) == (not asked)


@pytest.mark.parametrize(
    ("settings", "users"),
    [
        (["eval.metrics=[accuracy,calibration_error]"], None),
        (["eval.metrics=[inception_score]"], None),
        (["eval.metrics=[]"], None),
        (["eval.metrics=[accuracy,FID]"], "fid"),
        (
            ["eval.metrics=[precision_recall,nn_ratio]"],
            "precision, recall, precision_k4, recall_k4, nn_ratio",
        ),
        (["eval.metrics=[]", "eval.gallery=private"], "eval.gallery"),
    ],
)
def test_training_images_are_revealed_if_something_needs_them(settings, users):
    real = RealData(open_door(IMAGES), IMAGES, None)
    train, oracle, reasons = revealed(config_with(*settings, "eval.ceiling=none"), real)
    assert oracle is None
    if users is None:
        assert train is None and reasons == []
    else:
        assert train is IMAGES and len(reasons) == 1 and reasons[0].endswith(f" {users}")


@pytest.mark.parametrize(
    ("metrics", "classifiers", "measured"),
    [("accuracy", "small_cnn", True), ("fid", "small_cnn", False), ("accuracy", "wrn", False)],
)
def test_training_images_are_revealed_to_measure_a_ceiling(metrics, classifiers, measured):
    config = config_with(f"eval.metrics=[{metrics}]", f"eval.classifiers=[{classifiers}]")
    train, _, reasons = revealed(config, RealData(open_door(IMAGES), IMAGES, None))
    assert (CEILING in reasons) == measured and (train is IMAGES) == (measured or metrics == "fid")


def test_every_reason_is_listed():
    real = RealData(open_door(IMAGES), IMAGES, None, open_door(IMAGES))
    train, oracle, reasons = revealed(config_with("eval.metrics=[fid]", "eval.gallery=report"), real)
    assert train is oracle is IMAGES and reasons[1:] == [SHOWN, ORACLE] and "fid, eval.gallery" in reasons[0]


@pytest.mark.parametrize("metric", ["accuracy", "calibration_error"])
def test_a_metric_of_classifiers_needs_one(metric):
    config = config_with(f"eval.metrics=[{metric}]", "eval.classifiers=[]")
    with pytest.raises(UserError, match=r"eval\.classifiers"):
        Evaluator(EvaluatorSettings(config.eval, SPEC, "absent", "cpu", 0))


def test_an_evaluation_without_training_images_works():
    config = config_with("eval.metrics=[calibration_error]", "eval.ceiling=none")
    evaluator = Evaluator(EvaluatorSettings(config.eval, SPEC, "absent", "cpu", 0))
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    samples = Samples(images, np.arange(40, dtype=np.int64) % 10)
    report = evaluator.evaluate(samples, train=None, test=samples, select=None)
    assert [name for name in report.metrics if name.startswith("calibration_error")]
