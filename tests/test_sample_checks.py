"""Samples that are of no use are named, real ones pass; what samples were made of is said."""

import dataclasses

import numpy as np
import pytest
from tiny_runs import arguments, call, strict_json

import run as run_program
from data.digits import load_digits_8
from data.glyphs import CHARACTERS
from data.spec import DataSpec, Samples
from evaluation.report import Report, accuracy_interval
from evaluation.sample_checks import accuracy_warnings, exact_copies, sample_warnings, zero_warnings
from pipeline.revealed import COPIES, compared_by

SPEC = DataSpec("toy", 8, 1, 2, 30, ("cat", "dog"))


def of(images: np.ndarray, labels=None) -> Samples:
    labels = np.arange(len(images)) % 2 if labels is None else labels
    return Samples(images, np.asarray(labels, np.int64))


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


def test_real_and_random_images_are_not_suspicious():
    train, _ = load_digits_8()
    spec = DataSpec("digits", 8, 1, 10, len(train), tuple("0123456789"))
    assert sample_warnings(train, spec) == []
    assert sample_warnings(of(random_images(50)), SPEC) == []


def test_constant_samples_are_named():
    images = random_images(20)
    images[:3] = np.array([5, 90, 200], np.uint8)[:, None, None, None]
    assert "3 of 20 samples" in " ".join(sample_warnings(of(images), SPEC))


def test_samples_of_one_class_are_named():
    (line,) = sample_warnings(of(random_images(20), np.ones(20)), SPEC)
    assert "dog" in line and "2 classes" in line
    spec = dataclasses.replace(SPEC, num_classes=3, class_names=("cat", "dog", "bird"))
    (line,) = sample_warnings(of(random_images(20)), spec)
    assert "no sample" in line and "bird" in line


def test_copies_of_each_other_are_counted():
    images = random_images(20)
    images[10:14] = images[:4]
    assert any(line.startswith("8 of 20 ") for line in sample_warnings(of(images), SPEC))


@pytest.mark.parametrize("modes", [1, 2])
def test_near_copies_of_each_other_are_counted(modes):
    """Of one image, or of one per class: what a collapsed generator draws."""
    images = random_images(modes)[np.arange(40) % modes].astype(int) // 2 + 60
    noise = np.random.default_rng(1).integers(-1, 2, images.shape)
    (line,) = sample_warnings(of((images + noise).astype(np.uint8)), SPEC)
    assert "40 of 40" in line and "near copies" in line


def report_with(confusion: list, name: str = "accuracy/cnn/syn_val") -> Report:
    counts = np.array(confusion)
    right, total = int(counts.trace()), int(counts.sum())
    info = {"interval_95": accuracy_interval(right, total)}
    return Report({name: 100 * right / total}, {name: info}, {}, {name: {"confusion": confusion}})


@pytest.mark.parametrize(
    ("confusion", "words"),
    [
        ([[90, 0], [10, 0]], ["90.0 %", "50.0 %"]),  # always the same answer
        ([[45, 45], [0, 10]], ["90.0 %"]),  # balanced accuracy 75
        ([[92, 2], [3, 3]], ["94.0 %"]),  # above, but within the interval
        ([[70, 10], [10, 70]], []),
        ([[10, 0], [0, 0]], []),  # test images of one class tell nothing
    ],
)
def test_an_accuracy_that_is_not_above_the_majority_is_named(confusion, words):
    lines = accuracy_warnings(report_with(confusion))
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line and "accuracy/cnn/syn_val" in line
    assert not accuracy_warnings(report_with(confusion, "calibration_error/cnn/syn_val"))


def test_metrics_that_found_nothing_in_common_are_named():
    values = {"recall/x": 0.0, "recall_k4/x": 0.0, "precision/x": 0.2, "coverage/x": 0.1, "fid/x": 0.0}
    (line,) = zero_warnings(Report(values))
    assert "recall/x, recall_k4/x" in line and "coverage" not in line
    assert len(zero_warnings(Report(values | {"precision/x": 0.0}))) == 2
    assert zero_warnings(Report({"precision/x": 0.5, "recall/x": 0.01})) == []


def test_copies_of_public_images_are_counted():
    public = random_images(5000, seed=3)
    samples = np.concatenate([public[[7, 4999, 7]], random_images(4, seed=4)])
    assert exact_copies(samples, public) == 3
    assert exact_copies(samples, public[:, :, :4]) == 0


# ------------------------------------------------------------------------------------------ whole runs


def test_samples_that_are_public_images_are_reported(tmp_path):
    """Private Evolution of a public set delivers its images: everywhere that samples are described."""
    more = [
        "model.api=nearest", "model.api_params.nearest.embedding=pixels", "public_data.per_class=20",
        "train.variation_degree_schedule=[1,2,2]", "eval.metrics=[calibration_error]", "public_data.name=glyphs",
        "setup.precision=bf16", "eval.ceiling=none",
    ]  # fmt: skip
    outcome = call(run_program.main, arguments("PE", tmp_path, *more))
    assert outcome.code == 0, outcome.err
    results, privacy = (strict_json(outcome.folder / name) for name in ("results.json", "privacy.json"))
    expected = {"name": "glyphs", "images": 20 * len(CHARACTERS), "classes": len(CHARACTERS)}
    assert privacy["public_data"] == results["public_data"] == expected
    assert privacy["public_copies"] == results["public_copies"] == 100
    (copies,) = (line for line in results["warnings"] if "glyphs" in line)
    assert copies.startswith("100 of 100 ")
    card, page = ((outcome.folder / name).read_text() for name in ("privacy_card.md", "report.html"))
    assert copies in outcome.out and copies in card and copies in page
    assert f"**glyphs**, {expected['images']:,} images" in card and "1,240 images" in page
    assert "public_data.per_class=20" in card and "setup.precision" not in card and "eval.metrics" not in card
    assert privacy["samples_per_class"] == [10] * 10 and "labels: 10 " in card
    # calibration_error trains classifiers on samples: no training image was needed
    assert privacy["revealed"] == [] and "**Revealed" not in card


def test_useless_samples_are_reported_and_only_requested_images_are_revealed(tmp_path):
    outcome = call(
        run_program.main, arguments("Noise", tmp_path, "eval.metrics=[FID,accuracy]", "eval.ceiling=none")
    )
    results, privacy = (strict_json(outcome.folder / name) for name in ("results.json", "privacy.json"))
    (reason,) = privacy["revealed"]
    assert compared_by([reason]) == ["fid", COPIES]
    assert results["public_data"] is None and "public_copies" not in results
    (line,) = [line for line in results["warnings"] if "most frequent class" in line]
    page = (outcome.folder / "report.html").read_text()
    assert f"warning: {line}" in outcome.out and line in page
    assert line not in (outcome.folder / "privacy_card.md").read_text()  # it is about test images
