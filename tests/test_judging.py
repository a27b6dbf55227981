"""What an evaluation is given of the private images: what its metrics need, and no more."""

import numpy as np
import pytest

from data.spec import DataSpec, Samples
from evaluation.evaluator import Evaluator, EvaluatorSettings
from evaluation.listing import evaluation_line
from models import METHODS
from opacus_ext.noise import NoiseSource
from pipeline.configuration import evaluation_config, run_config
from pipeline.evaluation import RealImages, disclose, reveal, validation_data
from pipeline.record import write_start
from pipeline.revealed import CEILING, COPIES, ORACLE, SHOWN, compared_by
from utils.command_line import read_command_line
from utils.config import PAST_RUN, load_config
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
def test_training_images_are_reveal_if_something_needs_them(settings, users):
    real = RealImages(disclose(IMAGES), IMAGES, None)
    train, oracle, reasons = reveal(config_with(*settings, "eval.ceiling=none"), real)
    assert oracle is None
    if users is None:
        assert train is None and reasons == []
    else:
        assert train is IMAGES and len(reasons) == 1 and compared_by(reasons) == [*users.split(", "), COPIES]


@pytest.mark.parametrize(
    ("metrics", "classifiers", "measured"),
    [("accuracy", "small_cnn", True), ("fid", "small_cnn", False), ("accuracy", "wrn", False)],
)
def test_training_images_are_reveal_to_measure_a_ceiling(metrics, classifiers, measured):
    config = config_with(f"eval.metrics=[{metrics}]", f"eval.classifiers=[{classifiers}]")
    train, _, reasons = reveal(config, RealImages(disclose(IMAGES), IMAGES, None))
    assert (CEILING in reasons) == measured and (train is IMAGES) == (measured or metrics == "fid")


def test_every_reason_is_listed():
    real = RealImages(disclose(IMAGES), IMAGES, None, disclose(IMAGES))
    train, oracle, reasons = reveal(config_with("eval.metrics=[fid]", "eval.gallery=report"), real)
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


# ------------------------------------------------------------------------------------------ a past run as a layer


def run_folder(tmp_path, *settings: str):
    """A folder with config.yaml and environment.json as a run leaves them."""
    argv = ["--method", "Noise", "--data_name", "digits_8", "--epsilon", "3", "preset=quick", *settings]
    config = load_config(argv, METHODS)
    write_start(tmp_path, config, "identity")
    return config


def test_list_values_of_a_run_are_kept_when_it_is_evaluated_again(tmp_path):
    names = [f"no, {digit}" for digit in range(10)]  # a comma is part of each name
    quoted = ", ".join(f"'{name}'" for name in names)
    run = run_folder(tmp_path, f"sensitive_data.class_names=[{quoted}]", "eval.metrics=[fid]")
    again = evaluation_config(["--exp_path", str(tmp_path)])
    assert run.sensitive_data.class_names == again.sensitive_data.class_names == names
    assert again.eval.metrics == ["fid"] and again.provenance["sensitive_data.class_names"] == PAST_RUN
    assert (again.method, again.epsilon, again.provenance["method"]) == ("Noise", 3.0, PAST_RUN)


def test_the_command_line_overrides_a_past_run_but_validation_images_are_opt_in(tmp_path):
    run_folder(tmp_path, "eval.mode=val", "seed=4", "privacy.noise_seed=7", "eval.metrics=[fid]")
    again = evaluation_config(["--exp_path", str(tmp_path), "eval.metrics=[kid]"])
    assert (again.eval.metrics, again.eval.mode, again.seed) == (["kid"], "syn", 4)
    assert again.privacy.noise_seed is None, "the noise of the run would be drawn again"
    assert evaluation_config(["--exp_path", str(tmp_path), "eval.mode=val"]).eval.mode == "val"


def test_a_resumed_run_has_all_values_of_the_run(tmp_path):
    started = run_folder(tmp_path, "gen.data_num=77", "eval.metrics=[kid]")
    resumed = run_config(read_command_line(["--resume_exp", str(tmp_path)], "run"))
    assert resumed.snapshot == started.snapshot and resumed.resume == str(tmp_path.resolve())
    other = run_config(read_command_line(["--resume_exp", str(tmp_path), "eval=none"], "run"))
    assert other.eval.metrics == [] and other.eval.mode == started.eval.mode and other.gen.data_num == 77


def test_a_flag_on_the_resumed_command_line_keeps_the_rest_of_the_run(tmp_path):
    started = run_folder(tmp_path, "gen.data_num=77", "eval=none", "seed=5")
    same = ["--method", "noise", "--epsilon", "3", "--weights_root", str(tmp_path), "seed=5"]
    resumed = run_config(read_command_line(["--resume_exp", str(tmp_path), *same], "run"))
    assert resumed.snapshot == started.snapshot and resumed.weights_root == tmp_path


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--epsilon", "1"], ["--epsilon 3.0", "now 1"]),
        (["--method", "DPDM"], ["--method Noise", "now DPDM"]),
        (["--data_name", "mnist_28"], ["--data_name digits_8", "now mnist_28"]),
        (["gen.data_num=5", "seed=1"], ["gen.data_num=77 (now 5)", "seed=0 (now 1)"]),
    ],
)
def test_a_change_of_the_run_is_refused_in_a_short_line_before_its_plan(tmp_path, more, found, capsys):
    run_folder(tmp_path, "gen.data_num=77")
    with pytest.raises(UserError) as refused:
        run_config(read_command_line(["--resume_exp", str(tmp_path), *more], "run"))
    text = str(refused.value)
    assert all(part in text for part in found) and "eval.*" in text and len(text) < 500, text
    assert "PrivImage" not in text and capsys.readouterr().out == ""


def test_a_damaged_past_run_is_refused(tmp_path):
    run_folder(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("seed:", "sed:"))
    for load in (
        lambda: evaluation_config(["--exp_path", str(tmp_path)]),
        lambda: run_config(read_command_line(["--resume_exp", str(tmp_path)], "run")),
    ):
        with pytest.raises(UserError, match=r"config\.yaml.* seed"):
            load()
