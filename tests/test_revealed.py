"""privacy.json lists what an evaluation computed from private images, each thing once; copies of them are reported."""

import numpy as np
import pytest
from tiny_runs import arguments, call, data_root, strict_json

import eval as eval_program
import run as run_program
from data.digits import load_digits_8
from evaluation.report import Report
from pipeline.record import write_privacy
from pipeline.revealed import (
    CEILING,
    COPIES,
    GALLERY_ENTRY,
    ORACLE,
    SHOWN,
    compared_by,
    comparison,
    merged,
    without_failed,
)
from utils.files import write_json

OTHER = "scripts/judge_held_out.py"


def test_comparisons_are_one_entry():
    entries = [OTHER, comparison(["fid", "kid"]), CEILING, comparison(["kid", "mind"]), OTHER]
    assert merged(entries) == [OTHER, comparison(["fid", "kid", "mind"]), CEILING]
    assert merged([]) == []


def report_with(*names: str, **info) -> Report:
    return Report(dict.fromkeys(names, 1.0), {name: dict(info) for name in names})


@pytest.mark.parametrize(
    ("booked", "planned", "report", "others", "remaining"),
    [
        ([comparison(["fid", "fd_dinov2"])],) * 2
        + (report_with("fid/x"), [], [comparison(["fid"])]),
        # Not planned now: of an earlier evaluation.
        ([comparison(["mind", "fid"]), OTHER], [comparison(["fid"])], report_with(), [], [comparison(["mind"]), OTHER]),
        # Failed now, with another extractor, and computed earlier.
        ([comparison(["fid"])], [comparison(["fid"])], report_with("fid/other"), [], [comparison(["fid"])]),
        ([comparison(["fid", COPIES]), CEILING, ORACLE, SHOWN],) * 2 + (report_with(), [], []),
        ([CEILING, ORACLE],) * 2
        + (report_with("accuracy/cnn/best_val", ceiling=9.0), [], [CEILING, ORACLE]),
        ([comparison([GALLERY_ENTRY, COPIES]), SHOWN],) * 2
        + (report_with(), [GALLERY_ENTRY, SHOWN], [comparison([GALLERY_ENTRY]), SHOWN]),
    ],
)  # fmt: skip
def test_what_failed_is_not_listed(booked, planned, report, others, remaining):
    assert without_failed(booked, planned, report, others) == remaining


def test_entries_are_replaced_only_on_request(tmp_path):
    training = {"noise_seeded": False, "revealed": [comparison(["fid"])]}
    write_privacy(tmp_path, training)
    assert write_privacy(tmp_path, {**training, "revealed": []})["revealed"] == [comparison(["fid"])]
    assert write_privacy(tmp_path, training, revealed=[OTHER])["revealed"] == [OTHER]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was evaluated by fid and kid."""
    more = ["eval.metrics=[fid,kid]", "eval.ceiling=none"]
    outcome = call(run_program.main, arguments("Noise", tmp_path_factory.mktemp("exp"), *more))
    assert outcome.code == 0, outcome.err
    return outcome.folder


def evaluate_again(folder, *more: str):
    return call(eval_program.main, ["--exp_path", str(folder), "--data_root", str(data_root()), *more])


def test_a_failed_metric_is_not_revealed_and_its_extractor_is_named(finished, tmp_path):
    before = strict_json(finished / "privacy.json")["revealed"]
    assert [compared_by([entry]) for entry in before] == [["fid", "kid", COPIES]]
    outcome = evaluate_again(
        finished, "--weights_root", str(tmp_path), "eval.extractor=inception", "--metrics", "fid,authpct"
    )
    assert outcome.code == 3, outcome.err
    assert strict_json(finished / "privacy.json")["revealed"] == before
    results = strict_json(finished / "results.json")
    assert set(results["missing"]) == {"fid/inception", "authpct/inception"}
    assert "fid/inception" not in results["metrics"] and "fid/random_conv" in results["metrics"]
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("missing: fid/inception")]
    assert "prepare_weights.py" in line and "fid/random_conv" in line
    page = (finished / "report.html").read_text()
    assert "<td class='note'>random_conv; inception gave no value" in page
    # And what a later evaluation computes joins the same entry.
    assert evaluate_again(finished, "--metrics", "mind").code == 0
    (entry,) = strict_json(finished / "privacy.json")["revealed"]
    assert set(compared_by([entry])) == {"fid", "kid", "mind", COPIES}
    assert (finished / "privacy_card.md").read_text().count(entry) == 1


def test_a_run_without_a_result_from_training_images_reveals_nothing(tmp_path):
    more = ["eval.metrics=[fid]", "eval.ceiling=none", "eval.extractor=inception", "--weights_root"]
    outcome = call(run_program.main, arguments("Noise", tmp_path, *more, str(tmp_path)))
    assert outcome.code == 3 and strict_json(outcome.folder / "privacy.json")["revealed"] == []
    assert "training_copies" not in strict_json(outcome.folder / "results.json")


def test_copies_of_training_images_are_counted_where_only_the_owner_reads(tmp_path):
    train, test = load_digits_8()
    images = np.concatenate([train.images[:7], test.images[:20]])
    labels = np.concatenate([train.labels[:7], test.labels[:20]])
    np.savez(tmp_path / "images.npz", x=images, y=labels)
    argv = [
        "--images",
        str(tmp_path / "images.npz"),
        "--data_name",
        "digits_8",
        "--metrics",
        "inception_score",
    ]
    argv += ["--data_root", str(data_root()), "--out", str(tmp_path / "out")]
    outcome = call(eval_program.main, argv)
    results = strict_json(tmp_path / "out" / "results.json")
    assert results["training_copies"] == 7
    (line,) = [line for line in results["warnings"] if "7 of 27" in line]
    assert line in outcome.out and line in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0


def test_the_number_of_copies_stays_and_is_not_on_the_card(finished):
    results = strict_json(finished / "results.json")
    assert results["training_copies"] == 0
    write_json(finished / "results.json", {**results, "training_copies": 5})  # as if samples were copies
    outcome = evaluate_again(finished, "--metrics", "calibration_error", "eval.ceiling=none")
    results = strict_json(finished / "results.json")
    assert outcome.code == 0 and results["training_copies"] == 5
    (line,) = [line for line in results["warnings"] if "5 of 100" in line]
    assert line in outcome.out and line not in (finished / "privacy_card.md").read_text()
