"""What a user can get wrong: exit code 2, one line that names the thing, its value and what is allowed, no folder."""

import errno
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import arguments, call, execute, strict_json

import eval as eval_program
import run as run_program
from scripts import prepare_data


def refused(tmp_path: Path, *more: str, method: str = "Noise") -> str:
    """The line with which run.py refuses; asserts that there is no other line and no folder."""
    exp_root = tmp_path / "exp"
    refusal = call(run_program.main, arguments(method, exp_root, *more)).refusal
    assert not list(exp_root.glob("*/*")), "a half-made run folder is left"
    return refusal


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--epsilonn", "1"], ["--epsilonn", "--epsilon"]),
        (["gen.data_nun=5"], ["gen.data_nun", "gen.data_num"]),
        (["model.network.nf=8"], ["model.network.nf"]),  # Noise has no network
        (["extra"], ["extra", "key=value"]),
        (["--data_name", "digits_9"], ["digits_9", "digits_8"]),
        (["public_data.name=glyfs"], ["glyfs", "glyphs"]),
        (["eval.metrics=[fidd]"], ["fidd", "fid", "precision"]),
        (["eval.classifiers=[wrm]"], ["wrm", "wrn"]),
        (["eval.extractor=inceptionn"], ["inceptionn", "random_conv"]),
        (["eval.mode=vall"], ["vall", "syn"]),
        (["preset=quik"], ["quik", "quick"]),
        (["gen.data_num=many"], ["gen.data_num", "many"]),
        (["gen.data_num=10.5"], ["gen.data_num", "10.5"]),
        (["eval.metrics=accuracy"], ["eval.metrics", "accuracy"]),
        (["--epsilon", "0"], ["epsilon", "0", "greater than 0"]),
        (["--epsilon", "-1"], ["epsilon", "-1", "greater than 0"]),
        (["--epsilon", "abc"], ["epsilon", "abc", "number"]),
        (["--epsilon", "nan"], ["epsilon", "nan", "number"]),
        (["--epsilon", "1001"], ["epsilon", "1001", "at most 1000, or inf"]),
        (["privacy.delta=1"], ["privacy.delta: 1.0", "(0, 1)"]),
        (["privacy.delta=0"], ["privacy.delta: 0.0", "(0, 1)"]),
        (["privacy.relation=swap_one"], ["swap_one", "replace_one"]),
        (["gen.data_num=0"], ["gen.data_num", "0", "positive"]),
        (["gen.data_num=3"], ["gen.data_num", "3", "10"]),
        (["gen.data_num=99999999999999"], ["gen.data_num", "99,999,999,999,999", "GB of memory"]),
        (["gen.data_num=99999999999999", "--dry_run"], ["gen.data_num", "GB of memory"]),
        (["gen.data_num=99999999999999999999"], ["gen.data_num", "2^63"]),
        (["gen.data_num=060000"], ["gen.data_num", "060000", "leading zeros"]),
        (["seed=08"], ["seed", "08", "leading zeros"]),
        (["seed=1:30"], ["seed", "1:30", "colons"]),
        (["seed=?"], ["seed", "?", "int"]),
        (["eval.metrics=[?]"], ["eval.metrics", "[?]", "list"]),
        (["preset=quick\r"], ["preset=quick\\r", "Windows"]),
        (["setup.master_port=65536"], ["setup.master_port: 65536", "65535"]),
        (["setup.n_gpus_per_node=100000"], ["setup.n_gpus_per_node: 100000", "4096"]),
        (["--exp_description", "a/b"], ["--exp_description", "a/b"]),
        (["--resume_exp", "nowhere"], ["--resume_exp", "nowhere"]),
        (
            ["eval.mode=val", "sensitive_data.num_val=2000"],
            ["sensitive_data.num_val=143", "2000", "1436", "eval.mode=syn"],
        ),
        (["setup.device=tpu", "--print_config"], ["setup.device", "tpu", "auto, cpu or cuda"]),
        (["setup.precision=fp8"], ["setup.precision", "fp8", "bf16"]),
        (["setup.omp_n_threads=0"], ["setup.omp_n_threads: 0", "null or from 1"]),
        (["sensitive_data.num_channels=2"], ["sensitive_data.num_channels: 2", "1 or 3"]),
        (["sensitive_data.resolution=0"], ["sensitive_data.resolution: 0", "at least 1"]),
        (["public_data.per_class=0", "--dry_run"], ["public_data.per_class: 0", "null or at least 1"]),
    ],
)
def test_command_line(tmp_path, more, words):
    refusal = refused(tmp_path, *more)
    assert all(word in refusal for word in words), refusal


def test_no_arguments_print_the_usage():
    outcome = call(run_program.main, [])
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith("usage: python run.py") and "PrivImage, " in outcome.err
    assert "--dry_run" in outcome.err and "--help" in outcome.err


def test_unknown_method(tmp_path):
    argv = ["--method", "PrivImages", "--exp_root", str(tmp_path / "exp")]
    refusal = call(run_program.main, argv).refusal
    assert "PrivImages" in refusal and "did you mean 'PrivImage'" in refusal and "DP-MERF" in refusal


def test_a_process_reports_a_mistake_in_one_line(tmp_path):
    outcome = execute("run.py", arguments("Noise", tmp_path / "exp", "--epsilon", "0"))
    assert "greater than 0" in outcome.refusal
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        (
            "PrivImage",
            ["public_data.selective.sigma=0.05"],
            ["semantic query", "0.05", "of 10", "noise_multiplier"],
        ),
        ("PrivImage", ["public_data.selective.ratio=0.01"], ["public_data.selective.ratio", "0.01"]),
        (
            "PE-SD",
            ["public_data.selective.ratio=0.2"],
            ["public_data.selective.ratio: 0.2", "all public classes"],
        ),
        ("PrivImage", ["public_data.name=null"], ["public_data.name", "PrivImage"]),
        ("PrivImage", ["sensitive_data.name=null", "eval.mode=syn"], ["sensitive_data.name"]),
        ("DPDM", ["model.network.nf=7"], ["model.network.nf", "7", "multiple of 4"]),
        ("DPDM", ["train.batch_size=0"], ["train.batch_size", "0"]),
        ("DPDM", ["train.batch_size=1438"], ["train.batch_size: 1438", "1 to 1437", "null"]),
        ("DPDM", ["train.optim.optimizer=Sgdd"], ["train.optim.optimizer: Sgdd", "Adam"]),
        ("DPDM", ["pretrain.optim.params.lr=0"], ["pretrain.optim.params.lr: 0"]),
        ("DPDM", ["model.sampler_acc.type=dim"], ["model.sampler_acc.type: dim", "ddim", "dpmpp"]),
        ("DPDM", ["model.sampler.num_steps=1"], ["model.sampler.num_steps: 1", "at least 2"]),
        ("DPDM", ["train.loss.n_noise_samples=0"], ["train.loss.n_noise_samples: 0", "at least 1"]),
        ("DPDM", ["pretrain.loss.label_dropout=2"], ["pretrain.loss.label_dropout: 2", "[0, 1]"]),
        ("DPDM", ["train.snapshot_freq=0"], ["train.snapshot_freq: 0"]),
        ("DPDM", ["train.dp.n_split=0"], ["train.dp.n_split: 0"]),
        ("DPDM", ["model.network.attn_resolutions=[16]"], ["attn_resolutions: [16]", "8, 4"]),
        ("PrivImage", ["--data_name", "cifar100_32"], ["public_data.name: glyphs", "100 classes", "62"]),
        (
            "PrivImage",
            ["sensitive_data.name=null", "public_data.name=places365"],
            ["sensitive_data.name: null"],
        ),
        ("DP-LDM-SD", ["train.trained_groups=[heads]"], ["train.trained_groups: ['heads']", "attention"]),
        ("PrivImage", ["pretrain.query.image_size=0"], ["pretrain.query.image_size: 0", "at least 1"]),
        ("PrivImage", ["public_data.selective.batch_size=0"], ["public_data.selective.batch_size: 0"]),
        ("DP-FETA", ["pretrain.warm_up.batch_size=0"], ["pretrain.warm_up.batch_size: 0", "at least 1"]),
        ("DP-FETA-Pro", ["freq.sigma=0"], ["freq.sigma: 0", "greater than 0"]),
        ("DP-FETA-Pro", ["freq.Generator.g_conv_dim=0"], ["freq.Generator.g_conv_dim: 0", "at least 1"]),
        ("DP-LDM", ["train.batch_size=1438"], ["train.batch_size: 1438", "1 to 1437", "null"]),
        ("DP-LDM", ["model.schedule.beta_start=0"], ["model.schedule.beta_start: 0.0", "above 0"]),
        ("DP-LDM", ["model.network.head_width=0"], ["model.network.head_width: 0", "at least 1"]),
        ("DP-LDM", ["model.network.ch_mult=[0,1]"], ["model.network.ch_mult: [0, 1]", "at least 1"]),
        (
            "DP-LDM",
            ["model.network.attn_resolutions=[16]"],
            ["attn_resolutions: [16]", "latent pixels: 4, 2"],
        ),
        (
            "DP-LDM",
            ["pretrain.autoencoder.attn_resolutions=[16]"],
            ["pretrain.autoencoder.attn_resolutions: [16]", "8, 4"],
        ),
        ("DP-LoRA", ["train.rank=0"], ["train.rank: 0", "at least 1"]),
        ("DP-MERF", ["model.d_rff=7"], ["model.d_rff", "7", "even"]),
        ("PDP-Diffusion", ["public_data.per_class=0"], ["0", "at least 1"]),
    ],
)
def test_settings_of_methods(tmp_path, method, more, words):
    refusal = refused(tmp_path, *more, method=method)
    assert all(word in refusal for word in words), refusal


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("DPDM", ["train.dp.n_split=7", "train.loss.n_noise_samples=3", "train.batch_size=100"]),
        ("DP-LDM", ["train.dp.max_physical_batch_size=7", "train.loss.n_noise_samples=5"]),
        ("PDP-Diffusion", ["pretrain.batch_size=100000"]),  # all images, and the run says so
    ],
)
def test_numbers_that_need_not_divide_each_other(tmp_path, method, more):
    """Parts of a batch may differ in size, and noise draws are averaged: nothing is dropped or padded."""
    outcome = call(run_program.main, arguments(method, tmp_path / "exp", *more, "--dry_run", "-e", "inf"))
    assert outcome.code == 0, outcome.err


def test_a_large_delta_is_a_warning(tmp_path):
    outcome = call(
        run_program.main, arguments("DP-MERF", tmp_path / "exp", "privacy.delta=0.01", "--dry_run")
    )
    assert outcome.code == 0, outcome.err
    warning = next(line for line in outcome.out.splitlines() if line.startswith("warning: "))
    assert "0.01" in warning and "1/N = 0.000696" in warning


# ------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_architecture(tmp_path):
    made = call(run_program.main, arguments("DPDM", tmp_path / "made", "train.n_epochs=0", "eval=none"))
    assert made.code == 0, made.err
    checkpoint = made.folder / "train/checkpoints/final_checkpoint.pth"
    refusal = refused(tmp_path, f"model.ckpt={checkpoint}", "model.network.nf=12", method="DPDM")
    assert "architecture" in refusal and str(checkpoint) in refusal


def test_a_checkpoint_of_images_of_another_size(tmp_path):
    """The network itself would take them."""
    made = call(run_program.main, arguments("DPDM", tmp_path / "made", "train.n_epochs=0", "eval=none"))
    checkpoint = made.folder / "train/checkpoints/final_checkpoint.pth"
    refusal = refused(tmp_path, f"model.ckpt={checkpoint}", "--data_name", "mnist_28", method="DPDM")
    assert "(1, 8, 8)" in refusal and "(1, 28, 28)" in refusal and str(checkpoint) in refusal


def test_a_checkpoint_of_fewer_labels(tmp_path):
    made = call(run_program.main, arguments("DPDM", tmp_path / "made", "train.n_epochs=0", "eval=none"))
    checkpoint = made.folder / "train/checkpoints/final_checkpoint.pth"
    more = ["--data_name", "cifar100_32", "preset=quick", "sensitive_data.resolution=8"]
    more += ["sensitive_data.num_channels=1", f"model.ckpt={checkpoint}", "--dry_run", "-e", "inf"]
    refusal = refused(tmp_path, *more, method="DPDM")
    assert "knows 10 labels" in refusal and "100 classes" in refusal and str(checkpoint) in refusal


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a checkpoint", b"just words\n"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert str(path) in refused(tmp_path, f"model.ckpt={path}", method="DPDM")


def test_a_checkpoint_that_is_not_there(tmp_path):
    refusal = refused(tmp_path, f"model.ckpt={tmp_path / 'none.pth'}", method="DPDM")
    assert str(tmp_path / "none.pth") in refusal


def test_a_checkpoint_of_another_kind_of_method(tmp_path):
    made = call(run_program.main, arguments("DP-MERF", tmp_path / "made", "eval=none"))
    checkpoint = made.folder / "train/checkpoints/final_checkpoint.pth"
    assert "diffusion" in refused(tmp_path, f"model.ckpt={checkpoint}", method="DPDM")


def test_a_public_set_that_does_not_fit_the_checkpoint_leaves_no_folder(tmp_path):
    made = call(run_program.main, arguments("DPDM", tmp_path / "made", "train.n_epochs=0", "eval=none"))
    checkpoint = made.folder / "train/checkpoints/final_checkpoint.pth"
    refusal = refused(tmp_path, f"model.ckpt={checkpoint}", method="PDP-Diffusion")
    assert "62" in refusal and "10 labels" in refusal


# ------------------------------------------------------------------------------------------------- data


def image_folder(root: Path, classes: dict[str, int]) -> Path:
    """<root>/<class>/<number>.png, grey noise of 8x8."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
            image.save(root / name / f"{number}.png")
    return root


def prepare(source: Path, root: Path, *flags: str):
    argv = [
        *flags,
        "--data_name",
        "mine",
        "--source",
        str(source),
        "--data_root",
        str(root),
        "--resolution",
        "8",
    ]
    return call(prepare_data.main, argv)


@pytest.fixture()
def prepared(tmp_path) -> Path:
    """A data root with a prepared set `mine` of two classes."""
    outcome = prepare(image_folder(tmp_path / "images", {"cat": 20, "dog": 20}), tmp_path / "data")
    assert outcome.code == 0, outcome.err
    return tmp_path / "data"


MINE = ["--data_name", "mine", "sensitive_data.resolution=8", "sensitive_data.num_channels=1"]


def test_images_of_ones_own_run(tmp_path, prepared):
    more = [*MINE, "--data_root", str(prepared), "eval=none", "gen.data_num=4"]
    outcome = call(run_program.main, arguments("Noise", tmp_path / "exp", *more))
    assert outcome.code == 0, outcome.err
    assert outcome.folder.name.startswith("mine_eps10.0-")


def test_an_empty_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    refusal = prepare(tmp_path / "images", tmp_path / "data").refusal
    assert str(tmp_path / "images") in refusal
    assert not (tmp_path / "data" / "mine").exists()


def test_one_class(tmp_path):
    refusal = prepare(image_folder(tmp_path / "images", {"cat": 20}), tmp_path / "data").refusal
    assert str(tmp_path / "images") in refusal and "one class" in refusal and "cat" in refusal
    assert not (tmp_path / "data" / "mine").exists()


def test_a_corrupt_image_is_named(tmp_path):
    source = image_folder(tmp_path / "images", {"cat": 20, "dog": 20})
    whole = (source / "dog" / "7.png").read_bytes()
    (source / "dog" / "7.png").write_bytes(whole[: len(whole) // 2])
    assert "dog/7.png" in prepare(source, tmp_path / "data").refusal
    assert not (tmp_path / "data" / "mine").exists()


def test_a_file_that_is_no_image_is_named(tmp_path):
    source = image_folder(tmp_path / "images", {"cat": 20, "dog": 20})
    (source / "dog" / "8.png").write_text("not an image")
    zipped = shutil.make_archive(tmp_path / "zipped", "zip", source)
    for given in (source, Path(zipped)):
        refusal = prepare(given, tmp_path / "data").refusal
        assert refusal.endswith(f"{given}: dog/8.png: not an image, or corrupt")


def test_an_empty_data_folder(tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    refusal = refused(tmp_path, *MINE, "--data_root", str(tmp_path / "data"))
    assert "scripts/prepare_data.py --data_name mine" in refusal


def test_data_that_has_not_been_prepared(tmp_path):
    refusal = refused(tmp_path, "--data_name", "mnist_28", "--data_root", str(tmp_path / "data"))
    assert "scripts/prepare_data.py --data_name mnist_28" in refusal


def test_private_images_as_public_ones(tmp_path, prepared):
    public = ["public_data.name=other", f"public_data.train_path={tmp_path / 'link'}", "pretrain.epochs=1"]
    (tmp_path / "link").symlink_to(prepared / "mine")
    more = [*MINE, "--data_root", str(prepared), "gen.data_num=4", *public]
    refusal = refused(tmp_path, *more, method="DP-MERF")
    assert refusal.startswith("error: public_data.train_path: ") and "private images" in refusal


@pytest.mark.parametrize("public", ["images", ".", "images/cat", "link", "public/mine"])
def test_what_the_private_images_were_made_from_as_public_images(public, tmp_path, prepared):
    """By the path that meta.json names, also where that is prepared once more, as a public set."""
    assert prepare(tmp_path / "images", tmp_path / "public", "--public").code == 0
    (tmp_path / "link").symlink_to(tmp_path / "images")
    settings = ["public_data.name=other", f"public_data.train_path={tmp_path / public}", "pretrain.epochs=1"]
    more = [*MINE, "--data_root", str(prepared), "gen.data_num=4", *settings]
    refusal = refused(tmp_path, *more, method="DP-MERF")
    assert refusal.startswith("error: public_data.train_path: ") and "private images" in refusal


def test_a_copy_of_private_rows_that_a_run_kept(tmp_path, prepared):
    """Of a large set the training part of eval.mode=val is written to the cache."""
    shutil.copytree(prepared / "mine", tmp_path / "copy")
    meta = json.loads((tmp_path / "copy" / "meta.json").read_text())
    source = str(prepared / "mine" / "train_images.npy")
    (tmp_path / "copy" / "meta.json").write_text(json.dumps({**meta, "source": source}))
    settings = ["public_data.name=other", f"public_data.train_path={tmp_path / 'copy'}", "pretrain.epochs=1"]
    more = [*MINE, "--data_root", str(prepared), "gen.data_num=4", *settings]
    refusal = refused(tmp_path, *more, method="DP-MERF")
    assert refusal.startswith("error: public_data.train_path: ") and "private images" in refusal


def test_public_images_next_to_the_private_ones_are_accepted(tmp_path, prepared):
    prepare(image_folder(tmp_path / "others", {"a": 20, "b": 20}), tmp_path / "images" / "sets", "--public")
    for public in ("others", "images/sets/mine"):
        settings = [
            "public_data.name=other",
            f"public_data.train_path={tmp_path / public}",
            "pretrain.epochs=1",
        ]
        more = [*MINE, "--data_root", str(prepared), "gen.data_num=4", *settings, "--dry_run"]
        outcome = call(run_program.main, arguments("DP-MERF", tmp_path / "exp", *more))
        assert outcome.code == 0, outcome.err


def test_private_images_as_public_ones_by_name(tmp_path, prepared):
    """Some sets are known as private and as public ones, and lie in one folder."""
    shutil.copytree(prepared / "mine", prepared / "emnist")
    public = ["public_data.name=emnist", "public_data.n_classes=null", "pretrain.epochs=1"]
    private = [*MINE, f"sensitive_data.path={prepared / 'emnist'}"]
    more = [*private, "--data_root", str(prepared), "gen.data_num=4", *public]
    assert "public_data.name: " in refused(tmp_path, *more, method="DP-MERF")


def test_samples_of_a_run_as_public_images(tmp_path):
    run = call(run_program.main, arguments("Noise", tmp_path / "runs", "eval=none")).folder
    for made in ("gen/gen.npz", "gen"):
        more = ["public_data.name=other", f"public_data.train_path={run / made}", "pretrain.epochs=1"]
        assert "private images" in refused(tmp_path, *more, method="DP-MERF")
        outcome = prepare(run / made, tmp_path / "data", "--public")
        assert "--source: " in outcome.refusal and "private images" in outcome.refusal
    (run / "privacy.json").unlink()  # as in a run that still trains, whose previews are there
    assert "private images" in refused(tmp_path, *more, method="DP-MERF")


@pytest.mark.parametrize(
    ("method", "more", "named", "helps"),
    [
        ("Noise", [], "sensitive_data.num_val: 500", True),
        ("DPDM", ["eval.mode=syn"], "train.batch_size: 4096", True),
        ("DPDM", ["eval.mode=syn", "preset=paper"], "train.batch_size: 4096", True),
        ("Noise", ["eval.mode=val"], "sensitive_data.num_val: 500", False),  # also with preset=quick
        ("DPDM", ["preset=quick", "train.batch_size=9999"], "train.batch_size: 9999", False),
    ],
)
def test_preset_quick_is_advised_for_a_small_set_if_it_fits(tmp_path, method, more, named, helps):
    image = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", x=image, y=np.arange(60) % 2)
    outcome = call(
        prepare_data.main,
        ["--data_name", "mine", "--source", str(tmp_path / "mine.npz"), "--data_root", str(tmp_path)],
    )
    assert outcome.code == 0, outcome.err
    argv = ["--method", method, "--data_name", "mine", "--data_root", str(tmp_path), "--dry_run"]
    refusal = call(run_program.main, [*argv, *more]).refusal
    assert named in refusal and ("preset=quick" in refusal) == helps, refusal


def test_a_run_does_not_resume_after_its_data_were_prepared_again(tmp_path, prepared, monkeypatch):
    """Another split would ask images as validation images that the run was trained on."""
    settings = ["--data_root", str(prepared), "eval.mode=val", "sensitive_data.num_val=5", "gen.data_num=4"]
    argv = arguments("Noise", tmp_path / "exp", *MINE, *settings, "eval.metrics=[accuracy]")

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("evaluation.metrics.accuracy._percent", stop)
        folder = call(run_program.main, argv).folder
    assert prepare(tmp_path / "images", prepared, "--force").code == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refusal = call(run_program.main, [*argv, "--resume_exp", folder.name]).refusal
    assert "prepared again" in refusal
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "environment.json").unlink()
    refusal = call(run_program.main, [*argv, "--resume_exp", folder.name]).refusal
    assert refusal == f"error: {folder / 'environment.json'}: there is no such file; restore it"


def test_labels_out_of_range(tmp_path, prepared):
    path = prepared / "mine" / "train_labels.npy"
    labels = np.load(path)
    labels[3] = 9
    np.save(path, labels)
    assert "train_labels.npy" in refused(tmp_path, *MINE, "--data_root", str(prepared))


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "meta.json"])
def test_a_truncated_prepared_file_is_named(tmp_path, prepared, name):
    path = prepared / "mine" / name
    path.write_bytes(path.read_bytes()[:-40])
    refusal = refused(tmp_path, *MINE, "--data_root", str(prepared))
    assert name in refusal and "again" in refusal


def test_a_configuration_that_contradicts_the_data(tmp_path, prepared):
    more = ["--data_name", "mine", "sensitive_data.resolution=16", "--data_root", str(prepared)]
    refusal = refused(tmp_path, *more)
    assert "sensitive_data.resolution" in refusal and "16" in refusal and "8" in refusal


# ------------------------------------------------------------------------------------------------- disk


def test_a_folder_of_runs_that_cannot_be_made(tmp_path):
    (tmp_path / "exp").write_text("a file")
    refusal = call(run_program.main, arguments("Noise", tmp_path / "exp")).refusal
    assert "--exp_root" in refusal and str(tmp_path / "exp") in refusal
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "noise").write_text("a file")
    assert "--exp_root" in call(run_program.main, arguments("Noise", tmp_path / "other")).refusal


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_of_runs_without_permission(tmp_path):
    (tmp_path / "exp").mkdir(mode=0o500)
    refusal = call(run_program.main, arguments("Noise", tmp_path / "exp")).refusal
    assert "--exp_root" in refusal and "ermission" in refusal


def limited_to(num_bytes: int, argv: list[str]):
    """run.py as a process that can write no file larger than `num_bytes`, as on a full disk."""
    start = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); sys.path.insert(0, '.'); "
        "import run; sys.exit(run.main(sys.argv[1:]))"
    )
    return execute("-c", [start.format(num_bytes), *argv])


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(resource, "RLIMIT_FSIZE"), reason="POSIX limits")
def test_a_full_disk_at_the_first_checkpoint_leaves_nothing(tmp_path):
    outcome = limited_to(20_000, arguments("DP-MERF", tmp_path / "exp", "eval=none"))
    assert outcome.code == 2 and "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: disk full") and "--resume_exp" not in last
    assert not list((tmp_path / "exp").glob("*/*"))


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(resource, "RLIMIT_FSIZE"), reason="POSIX limits")
def test_a_full_disk_after_training_can_be_resumed(tmp_path):
    argv = arguments("Noise", tmp_path / "exp", "eval=none", "gen.data_num=2000")
    outcome = limited_to(50_000, argv)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    last, folder = outcome.err.splitlines()[-1], outcome.folder
    assert last.startswith("error: disk full") and f"--resume_exp {folder}" in last
    assert not (folder / "gen" / "gen.npz").exists()
    assert not list(folder.rglob("*partial*"))
    resumed = call(run_program.main, [*argv, "--resume_exp", folder.name])
    assert resumed.code == 0, resumed.err
    assert strict_json(folder / "results.json")["method"] == "Noise"


# ------------------------------------------------------------------------------------------------- eval.py


def test_evaluating_what_is_no_run(tmp_path):
    assert "--exp_path" in call(eval_program.main, ["--method", "Noise"]).refusal
    argv = ["--method", "Noise", "--exp_path", str(tmp_path)]
    assert str(tmp_path) in call(eval_program.main, argv).refusal


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_run_that_cannot_be_written_is_not_evaluated(tmp_path, monkeypatch, code):
    folder = call(run_program.main, arguments("Noise", tmp_path / "exp", "eval=none")).folder
    before = files_of(folder)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", fail)
    refusal = call(eval_program.main, ["--exp_path", str(folder), "--metrics", "kid"]).refusal
    assert str(folder) in refusal and os.strerror(code) in refusal
    assert files_of(folder) == before


def test_a_disk_that_fills_during_an_evaluation_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.evaluation.write_results", fail)
    np.savez(tmp_path / "mine.npz", x=np.zeros((40, 8, 8), np.uint8), y=np.arange(40) % 10)
    out = tmp_path / "judged"
    words = ["--images", str(tmp_path / "mine.npz"), "--out", str(out), "--metrics", "nn_ratio"]
    outcome = call(eval_program.main, [*words, "--data_name", "digits_8", "eval.extractor=random_conv"])
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith("error: disk full"), outcome.err
    assert not out.exists()


def test_evaluating_damaged_samples(tmp_path):
    folder = call(run_program.main, arguments("Noise", tmp_path / "exp", "eval=none")).folder
    (folder / "gen" / "gen.npz").write_bytes(b"PK\x03\x04 cut")
    argv = ["--method", "Noise", "--exp_path", str(folder)]
    assert "gen.npz" in call(eval_program.main, argv).refusal
