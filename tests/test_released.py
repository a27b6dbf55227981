"""The classifier that a run releases: its file, its evaluation, runs without images, and scripts/predict.py."""

import csv
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import arguments, call

import eval as eval_program
import run as run_program
from data.digits import load_digits_8
from scripts.predict import main as predict

WITHOUT_IMAGES = ("train.fit=sgd", "train.batch_size=500", "train.n_epochs=10", "train.lr=4.0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with samples and a classifier."""
    outcome = call(
        run_program.main, arguments("DP-Linear", tmp_path_factory.mktemp("exp"), "eval.metrics=[accuracy]")
    )
    assert outcome.code == 0, outcome.err
    return outcome.folder


@pytest.fixture(scope="module")
def without_images(tmp_path_factory):
    """A run whose only product is a classifier, with metrics that need samples in its evaluation."""
    argv = arguments("DP-Linear", tmp_path_factory.mktemp("exp"), *WITHOUT_IMAGES, "eval.ceiling=none")
    outcome = call(run_program.main, argv)
    assert outcome.code == 0, outcome.err
    return outcome


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_classifier_is_evaluated_like_the_others(finished):
    found = results(finished)
    accuracy = found["metrics"]["accuracy/released/last_epoch"]
    assert 80 < accuracy <= 100
    details = json.loads((finished / "details.json").read_text())["accuracy/released/last_epoch"]
    assert np.trace(details["confusion"]) / 360 * 100 == pytest.approx(accuracy)
    assert len(details["per_class"]) == 10
    # The mean is that of the classifiers which were trained on the samples.
    assert "released" not in found["metric_info"]["accuracy/mean/last_epoch"]["classifiers"]


def test_the_file_states_its_origin_and_loads_without_code(finished):
    content = torch.load(finished / "gen/classifier.pth", weights_only=True)
    assert content["origin"]["method"] == "DP-Linear" and content["origin"]["spent"] <= 10
    assert [release["name"] for release in content["origin"]["releases"]] == ["linear"]


def test_the_card_covers_both_products(finished, without_images):
    both = (finished / "privacy_card.md").read_text()
    assert "gen/gen.npz" in both and "gen/classifier.pth" in both
    only = (without_images.folder / "privacy_card.md").read_text()
    assert "gen/gen.npz" not in only and "gen/classifier.pth" in only


def test_a_run_without_images_is_complete(without_images):
    folder = without_images.folder
    assert not (folder / "gen/gen.npz").exists()
    names = {name.split("/")[0] for name in results(folder)["metrics"]}
    assert names == {"accuracy", "balanced_accuracy", "auroc"}
    assert "fid" in without_images.out  # is named as left out
    assert results(folder)["missing"] == {}
    revealed = json.loads((folder / "privacy.json").read_text())["revealed"]
    assert revealed == []  # nothing is compared with training images
    assert "released" in (folder / "report.html").read_text()


def test_a_finished_run_without_images_is_evaluated_again(without_images):
    before = results(without_images.folder)["metrics"]
    argv = ["--exp_path", str(without_images.folder), "--metrics", "accuracy,calibration_error,fid"]
    outcome = call(eval_program.main, argv)
    assert outcome.code == 0, outcome.err
    after = results(without_images.folder)["metrics"]
    assert after["accuracy/released/last_epoch"] == before["accuracy/released/last_epoch"]
    assert 0 < after["calibration_error/released/last_epoch"] < 1


def test_metrics_of_samples_alone_are_refused_for_a_run_without_images(without_images):
    before = (without_images.folder / "results.json").read_bytes()
    refusal = call(eval_program.main, ["--exp_path", str(without_images.folder), "--metrics", "kid"]).refusal
    assert "kid" in refusal and "accuracy" in refusal
    assert (without_images.folder / "results.json").read_bytes() == before


def test_an_evaluation_without_images_is_planned(without_images):
    outcome = call(eval_program.main, ["--exp_path", str(without_images.folder), "--dry_run"])
    assert outcome.code == 0, outcome.err
    assert "classifier" in outcome.out and "small_cnn" not in outcome.out


def test_directions_need_public_images(tmp_path):
    refusal = call(
        run_program.main, arguments("DP-Linear", tmp_path / "exp", "model.num_directions=8")
    ).refusal
    assert "num_directions" in refusal and "public_data.name" in refusal


def test_a_classifier_of_other_classes_is_refused(finished, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    path = copy / "gen/classifier.pth"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "class_names": [f"other {k}" for k in range(10)]}, path)
    assert "classifier.pth" in call(eval_program.main, ["--exp_path", str(copy)]).refusal


def test_a_run_that_stopped_before_its_evaluation_resumes(tmp_path, monkeypatch):
    argv = arguments("DP-Linear", tmp_path / "exp", *WITHOUT_IMAGES, "eval.metrics=[accuracy]")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.evaluate_run", stop)
        stopped = call(run_program.main, argv)
    assert stopped.code == 130
    resumed = call(run_program.main, ["--resume_exp", str(stopped.folder)])
    assert resumed.code == 0 and "accuracy/released/last_epoch" in results(stopped.folder)["metrics"]


def stop(*_):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------ prediction


@pytest.fixture
def images(tmp_path):
    """20 test images as PNG files in two folders, which are no classes, and a text file."""
    _, test = load_digits_8()
    for row in range(20):
        folder = tmp_path / "images" / ("a" if row < 10 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.images[row, 0]).save(folder / f"{row:02}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_every_image_gets_a_class(finished, images, tmp_path):
    out = tmp_path / "found.csv"
    outcome = call(predict, ["--exp_path", str(finished), "--images", str(images), "--out", str(out)])
    assert outcome.code == 0, outcome.err
    assert out.stat().st_mode & 0o077 == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["file"] for row in rows] == [f"{'a' if k < 10 else 'b'}/{k:02}.png" for k in range(20)]
    _, test = load_digits_8()
    right = [int(row["class"]) == label for row, label in zip(rows, test.labels[:20], strict=True)]
    assert np.mean(right) > 0.7
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    assert "notes.txt" in outcome.out  # is named as left out


@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_archives_without_labels_are_classified(kind, finished, images, tmp_path):
    _, test = load_digits_8()
    path = tmp_path / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(images.rglob("*.png")):
                archive.write(file, file.name)
    else:
        np.savez(path, images=test.images[:20, 0])
    out = tmp_path / "found.csv"
    outcome = call(predict, ["--exp_path", str(finished), "--images", str(path), "--out", str(out)])
    assert outcome.code == 0, outcome.err
    rows = list(csv.DictReader(out.open()))
    right = [int(row["class"]) == label for row, label in zip(rows, test.labels[:20], strict=True)]
    assert np.mean(right) > 0.7


def test_images_of_another_size_and_colour_are_converted(finished, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    Image.new("RGB", (64, 48), (200, 10, 10)).save(folder / "one.jpg")
    out = tmp_path / "found.csv"
    outcome = call(predict, ["--exp_path", str(finished), "--images", str(folder), "--out", str(out)])
    assert outcome.code == 0, outcome.err
    assert "64" in outcome.out and len(list(csv.DictReader(out.open()))) == 1


def test_mistakes_of_a_prediction_are_one_line_and_leave_nothing(finished, images, tmp_path):
    out = tmp_path / "found.csv"
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 8, 8), np.uint8))
    broken = tmp_path / "classifier.pth"
    broken.write_bytes(b"no classifier")
    mistakes = {
        "--images": (finished, tmp_path / "missing"),
        "empty": (finished, tmp_path / "empty"),
        "none.npz": (finished, tmp_path / "none.npz"),
        "classifier.pth": (broken, images),
        "--exp_path": (tmp_path / "empty", images),
    }
    for named, (run, given) in mistakes.items():
        refusal = call(predict, ["--exp_path", str(run), "--images", str(given), "--out", str(out)]).refusal
        assert named.removeprefix("--images") in refusal
        assert not out.exists()
    out.write_text("mine")
    argv = ["--exp_path", str(finished), "--images", str(images), "--out", str(out)]
    assert "--out" in call(predict, argv).refusal and out.read_text() == "mine"
