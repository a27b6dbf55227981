"""The programs from the command line to the last file: every method, interruptions, evaluation, and exit codes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from private_net import PrivateNet, arrays_of
from tiny_runs import ROOT, arguments, call, data_root, execute, kill_when, strict_json
from toys import TOYS

import eval as eval_program
import run as run_program
from data.digits import load_digits_8
from data.samples_file import read_samples
from models import METHODS
from opacus_ext.errors import AccountingError
from pipeline.folder import working_in
from scripts import judge_held_out

PUBLIC = ("PDP-Diffusion", "PrivImage")
# What a file that anyone may see must not hold; "accountant" may.
PRIVATE_NAMES = re.compile("loss|clean|(?<!ac)count|histogram|votes|grad", re.IGNORECASE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict:
    """One finished run per method; PrivImage keeps validation images aside."""
    outcomes = {}
    for method in METHODS:
        more = ["eval.mode=val", "sensitive_data.num_val=137"] if method == "PrivImage" else []
        argv = arguments(method, tmp_path_factory.mktemp("exp"), *more)
        outcomes[method] = call(run_program.main, argv)
        assert outcomes[method].code == 0, outcomes[method].err
    return outcomes


def test_every_method_has_a_toy_size():
    missing = set(METHODS) ^ set(TOYS)
    assert not missing, f"tests/toys.py: {missing}"


@pytest.mark.parametrize("method", list(METHODS))
def test_every_artefact_is_written(finished, method):
    folder = finished[method].folder
    assert re.fullmatch(r"digits_8_eps10\.0-\d{4}(-\d\d){5}", folder.name)
    assert folder.parent.name == method.lower()
    expected = {
        "config.yaml", "provenance.txt", "stdout.txt", "environment.json", "gen/gen.npz", "gen/sample.png",
        "privacy.json", "privacy_card.md", "results.json", "train/checkpoints/final_checkpoint.pth",
    }  # fmt: skip
    expected |= {"pretrain/checkpoints/final_checkpoint.pth"} if method in PUBLIC else set()
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert expected <= written
    assert not [name for name in written if "partial" in name]
    assert "command line" in (folder / "provenance.txt").read_text()
    samples = read_samples(folder / "gen" / "gen.npz")
    assert samples.images.shape == (100, 1, 8, 8)
    assert np.bincount(samples.labels).tolist() == [10] * 10


@pytest.mark.parametrize("method", list(METHODS))
def test_results_are_complete_and_strict_json(finished, method):
    results = strict_json(finished[method].folder / "results.json")
    expected = {
        "schema", "method", "data", "epsilon", "delta", "seed", "spent_epsilon", "preset", "preset_tier", "borrowed",
        "metrics", "metric_info", "timing", "git", "versions",
    }  # fmt: skip
    assert expected <= set(results)
    assert (results["method"], results["data"], results["preset"]) == (method, "digits_8", "quick")
    selection = "noisy_val" if method == "PrivImage" else "syn_val"
    wanted = {f"accuracy/small_cnn/{selection}", f"accuracy/mean/{selection}", "fid/random_conv"}
    assert wanted <= set(results["metrics"])
    for name in results["metrics"]:
        assert {"better", "n_real", "n_fake"} <= set(results["metric_info"][name])
    assert results["timing"]["evaluate"] > 0
    assert {"generate", "train"} <= set(results["timing"])
    assert strict_json(finished[method].folder / "environment.json")["seed"] == 0


@pytest.mark.parametrize("method", list(METHODS))
def test_what_was_planned_was_executed_within_the_budget(finished, method):
    folder = finished[method].folder
    privacy, results = strict_json(folder / "privacy.json"), strict_json(folder / "results.json")
    assert all(release["executed"] == release["planned"] for release in privacy["releases"])
    assert privacy["spent"] <= 10 * (1 + 1e-6)
    assert results["spent_epsilon"] == privacy["spent"]
    assert privacy["spent"] == 0 if method == "Noise" else privacy["spent"] > 9.9
    num_private = {"PrivImage": 1300, "IDPS": 1437 - 30}.get(method, 1437)
    assert privacy["budget"]["delta"] == pytest.approx(1 / (num_private * np.log(num_private)))
    assert privacy["revealed"], "the evaluation's look at the private images is not listed"
    assert privacy["noise_seeded"] is False


def test_a_trial_on_a_subset_of_the_images_is_labelled(tmp_path):
    words = ["eval=none", "sensitive_data.num_train=1000"]
    folder = call(run_program.main, arguments("DP-MERF", tmp_path, *words)).folder
    privacy, results = (strict_json(folder / name) for name in ("privacy.json", "results.json"))
    assert privacy["num_records"] == results["num_records"] == 1000
    assert privacy["budget"]["delta"] == pytest.approx(1 / (1000 * np.log(1000)))
    card = (folder / "privacy_card.md").read_text(encoding="utf-8")
    assert "1,000" in card and "437" in card and "sensitive_data.num_train" in card


@pytest.fixture(scope="module")
def net() -> PrivateNet:
    return PrivateNet(load_digits_8()[0].images)


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_private_is_in_the_folder(finished, net, method):
    """No pixels or hashes of private images, and no statistic that is computed from them without noise."""
    folder = finished[method].folder
    assert net.leaks(folder) == []
    for path in folder.rglob("*"):
        names = [name for name, _ in arrays_of(path)] if path.is_file() else []
        if path.suffix == ".json":
            names += re.findall(r'"([^"]+)":', path.read_text())
        assert not [name for name in names if re.search(PRIVATE_NAMES, name)], path
    assert "loss" not in finished[method].out


# ------------------------------------------------------------------------------------------------- judging again


def test_choosing_a_classifier_is_booked_and_adds_up(finished):
    folder = finished["PrivImage"].folder
    first = strict_json(folder / "privacy.json")
    assert [choice["spent"] for choice in first["selection"]] == [pytest.approx(1.0)]
    argv = ["--method", "PrivImage", "eval.mode=val", "--exp_path", str(folder), "--exp_root", "unused"]
    for number in (2, 3):
        outcome = call(eval_program.main, argv)
        assert outcome.code == 0, outcome.err
        privacy, results = strict_json(folder / "privacy.json"), strict_json(folder / "results.json")
        assert len(privacy["selection"]) == number
        assert results["selection_epsilon"] == pytest.approx(number)
        assert privacy["releases"] == first["releases"]
        assert f"spent epsilon {number}" in outcome.out
    assert set(results["timing"]) > {"train", "evaluate"}


@pytest.mark.parametrize("lost", [False, True])
def test_a_choice_of_an_evaluation_that_was_stopped_is_paid_for(tmp_path, monkeypatch, lost):
    """Once, since the resumed run uses it; twice if what was kept of it is lost."""
    settings = ["eval.mode=val", "sensitive_data.num_val=137", "eval.metrics=[accuracy]"]
    argv = arguments("Noise", tmp_path, *settings)
    booked = []

    def stop(*_) -> None:
        booked.extend(strict_json(next(tmp_path.rglob("privacy.json")))["selection"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("evaluation.metrics.accuracy._percent", stop)
        stopped = call(run_program.main, argv)
    assert stopped.code == 130
    assert len(booked) == 1, (
        "a choice that was made is not written down yet; a killed process would not pay for it"
    )
    selection = strict_json(stopped.folder / "privacy.json")["selection"]
    assert [choice["spent"] for choice in selection] == [pytest.approx(1.0)]
    (kept,) = data_root().glob("digits_8/.cache/evaluation-*")
    if lost:
        shutil.rmtree(kept)
    resumed = call(run_program.main, [*argv, "--resume_exp", stopped.folder.name])
    assert resumed.code == 0, resumed.err
    choices = strict_json(stopped.folder / "privacy.json")["selection"]
    assert choices[0] == selection[0] and len(choices) == 1 + lost
    results = strict_json(stopped.folder / "results.json")
    assert results["selection_epsilon"] == pytest.approx(1.0 + lost)
    assert any(name.endswith("/noisy_val") for name in results["metrics"])
    assert not kept.exists()


def test_a_choice_is_on_the_card_before_the_evaluation_ends(tmp_path, monkeypatch):
    """Also where judging again is stopped, which leaves the page of the earlier evaluation."""
    settings = ["eval.mode=val", "sensitive_data.num_val=137", "eval.metrics=[accuracy]"]
    folder = call(run_program.main, arguments("Noise", tmp_path, *settings)).folder
    monkeypatch.setattr("evaluation.metrics.accuracy._percent", _stop)
    assert call(eval_program.main, ["--exp_path", str(folder), "eval.mode=val"]).code == 130
    assert " 2 evaluation(s)" in (folder / "privacy_card.md").read_text()
    assert strict_json(folder / "results.json")["selection_epsilon"] == pytest.approx(2.0)
    assert " 1 evaluation(s)" in (folder / "report.html").read_text()


def test_only_one_process_at_a_time_uses_a_run_folder(finished, tmp_path):
    """Two that continue the same run would draw different noise for what is booked once."""
    folder = finished["DP-MERF"].folder
    argv = arguments("DP-MERF", folder.parent.parent, "--resume_exp", folder.name)
    with working_in(folder):
        for refusal in (
            call(eval_program.main, ["--exp_path", str(folder)]).refusal,
            call(run_program.main, argv).refusal,
        ):
            assert refusal.startswith(f"error: {folder}: another process works in this run")
    assert call(run_program.main, argv).code == 0


def test_a_run_ends_with_privacy_then_metrics_then_paths(finished):
    outcome = finished["PrivImage"]
    lines = outcome.out.splitlines()
    starts = ["privacy: the samples are (", "metric ", "report: ", "samples: ", "privacy card: ", "numbers: "]
    positions = [next(n for n, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert positions == sorted(positions) and positions[-1] == len(lines) - 1
    for line in lines[-4:]:
        assert Path(line.partition(": ")[2]).is_file()
    assert "| " not in outcome.out, "the card's Markdown is on the terminal"
    assert "# real" in outcome.out and "# samples" in outcome.out


def test_a_run_is_evaluated_from_its_folder_alone(tmp_path):
    """Everything that is not given comes from the run; another number of validation images would ask training ones."""
    settings = ["--epsilon", "3", "eval=none", "eval.mode=val", "sensitive_data.num_val=100"]
    folder = call(run_program.main, arguments("Noise", tmp_path, *settings)).folder
    assert "--metrics: " in call(eval_program.main, ["--exp_path", str(folder), "eval=none"]).refusal
    asked = call(eval_program.main, ["--exp_path", str(folder), "--print_config"])
    values = {line.split()[0]: line.split()[1] for line in asked.out.splitlines() if line[:1].strip()}
    assert values["sensitive_data.num_val"] == "100" and values["preset"] == "quick"
    assert (values["method"], values["data_name"], values["privacy.epsilon"]) == ("Noise", "digits_8", "3.0")
    fid = ["eval=none", "eval.metrics=[fid]", "eval.extractor=random_conv", "eval.mode=syn"]
    outcome = call(eval_program.main, ["--exp_path", str(folder), *fid])
    assert outcome.code == 0 and f"numbers: {folder / 'results.json'}" in outcome.out, outcome.err
    found = strict_json(folder / "results.json")["metric_info"]["fid/random_conv"]
    assert found["n_real"] == 1337, "images that the run held out are compared with"
    fixed = ("sensitive_data.num_train=1436", "sensitive_data.num_val=137", "privacy.relation=replace_one")
    for setting in fixed:
        refusal = call(eval_program.main, ["--exp_path", str(folder), setting]).refusal
        assert refusal.startswith(f"error: {setting.partition('=')[0]}: ") and "leave " in refusal
    privacy = strict_json(folder / "privacy.json")
    (folder / "privacy.json").write_text(json.dumps(privacy | {"num_records": privacy["num_records"] + 1}))
    refusal = call(eval_program.main, ["--exp_path", str(folder), "eval.mode=val"]).refusal
    assert "changed" in refusal
    (folder / "privacy.json").write_text(json.dumps(privacy | {"data_identity": "another folder's"}))
    refusal = call(eval_program.main, ["--exp_path", str(folder), "eval.mode=val"]).refusal
    assert "digits_8" in refusal and "prepared again" in refusal


def test_resuming_a_finished_run_is_refused_in_one_line(finished):
    folder = finished["Noise"].folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    argv = arguments("Noise", folder.parent.parent, "--resume_exp", folder.name)
    outcome = call(run_program.main, argv)
    last = outcome.out.splitlines()[-1]
    assert outcome.code == 0 and last.startswith(f"{folder} is finished") and f"--exp_path {folder}" in last
    assert "run folder" not in outcome.out and "privacy budget" not in outcome.out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stage_without_work_is_not_logged(finished):
    assert "pretrain:" not in finished["Noise"].out and "train:" not in finished["Noise"].out


def test_a_dry_run_of_an_evaluation_makes_no_query(finished):
    folder = finished["PrivImage"].folder
    kept = {name: (folder / name).read_text() for name in ("privacy.json", "results.json", "stdout.txt")}
    argv = ["--method", "PrivImage", "eval.mode=val", "--exp_path", str(folder), "--dry_run"]
    outcome = call(eval_program.main, argv)
    assert outcome.code == 0 and "100 images" in outcome.out
    assert "epsilon 1 " in outcome.out and "so far" in outcome.out
    assert kept == {name: (folder / name).read_text() for name in kept}


def test_a_second_evaluation_adds_to_the_report(finished):
    """Only what is asked for is computed anew; the rest stays, with the settings it was found with."""
    folder = finished["DP-MERF"].folder
    before = strict_json(folder / "results.json")
    argv = ["--method", "dp-merf", "--exp_path", str(folder), "seed=7", "preset=paper", "eval=quick"]
    outcome = call(eval_program.main, [*argv, "eval.metrics=[accuracy]", "eval.extractor=random_conv"])
    assert outcome.code == 0, outcome.err
    after = strict_json(folder / "results.json")
    asked = {name for name in before["metrics"] if name.startswith("accuracy/")}
    others = set(before["metrics"]) - asked
    assert asked and others and set(after["metrics"]) == asked | others
    for name in others:
        assert after["metrics"][name] == before["metrics"][name]
        assert after["metric_info"][name]["evaluation"] == before["evaluation"]
    assert all("evaluation" not in after["metric_info"][name] for name in asked)
    assert "earlier evaluation" in outcome.out
    assert "earlier evaluation" in (folder / "report.html").read_text()
    assert sum(after["samples_per_class"]) == 100 and after["samples_digest"] == before["samples_digest"]
    assert (after["seed"], after["preset"]) == (before["seed"], before["preset"]) == (0, "quick")
    assert after["evaluation"]["seed"] == 7
    assert after["spent_epsilon"] == before["spent_epsilon"]


def test_an_evaluation_keeps_the_settings_of_the_run_unless_they_cost_privacy(finished):
    """Its own settings hold, but only who asks for eval.mode=val pays for it once more."""
    folder = finished["PrivImage"].folder
    before = strict_json(folder / "results.json")["evaluation"]
    argv = ["--exp_path", str(folder), "--dry_run"]
    assert "eval.mode=val" in call(eval_program.main, argv).out
    shown = call(eval_program.main, ["--exp_path", str(folder), "--print_config"]).out
    for key in ("recipe", "num_val", "extractor"):
        assert (
            f"eval.{key}" in shown and str(before[key]) in shown.partition(f"eval.{key} ")[2].splitlines()[0]
        )
    assert "syn" in shown.partition("eval.mode ")[2].splitlines()[0]
    refusal = call(eval_program.main, [*argv, "gen.data_num=5"]).refusal
    assert refusal.startswith("error: gen.data_num=5: ")


def test_settings_are_compared_on_held_out_images(finished, tmp_path):
    """Which reads them without noise, is said, and is listed; results.json stays of the test images."""
    folder = finished["PrivImage"].folder
    results = (folder / "results.json").read_text()
    outcome = call(judge_held_out.main, [str(folder), "--data_root", str(data_root())])
    assert outcome.code == 0, outcome.err
    line = next(line for line in outcome.out.splitlines() if line.startswith("accuracy/small_cnn/syn_val"))
    assert line.split()[-2:] == ["137", "90"] and "NOT private" in outcome.out
    assert judge_held_out.REASON in strict_json(folder / "privacy.json")["revealed"]
    assert judge_held_out.REASON in (folder / "privacy_card.md").read_text()
    kept = strict_json(folder / "results.json")
    assert kept == json.loads(results)
    refusal = call(judge_held_out.main, [str(folder), str(finished["DP-MERF"].folder)]).refusal
    assert "eval.mode=syn" in refusal


def test_held_out_images_evaluate_a_run_without_test_images(tmp_path):
    settings = ("eval.mode=val", "sensitive_data.num_val=100", "eval.metrics=[]")
    folder = call(run_program.main, arguments("Noise", tmp_path, *settings)).folder
    assert not strict_json(folder / "results.json")["metrics"]
    outcome = call(judge_held_out.main, [str(folder), "--data_root", str(data_root())])
    assert outcome.code == 0, outcome.err
    assert "\naccuracy/small_cnn/syn_val " in outcome.out


def test_an_impossible_evaluation_is_refused_and_changes_nothing(tmp_path):
    folder = call(
        run_program.main, arguments("Noise", tmp_path, "eval.metrics=[fid]", "eval.extractor=random_conv")
    ).folder
    results, samples = (folder / "results.json").read_text(), (folder / "gen/gen.npz").read_bytes()
    (folder / "results.json").write_text(results[:100])
    assert (
        f"{folder / 'results.json'}: damaged" in call(eval_program.main, ["--exp_path", str(folder)]).refusal
    )
    (folder / "results.json").write_text("{}")
    assert "damaged (KeyError: 'data')" in call(eval_program.main, ["--exp_path", str(folder)]).refusal
    (folder / "results.json").write_text(results)
    with np.load(folder / "gen/gen.npz") as content:
        np.savez(folder / "gen/gen.npz", x=255 - content["x"], y=content["y"])
    assert "other samples" in call(eval_program.main, ["--exp_path", str(folder)]).refusal
    assert (folder / "results.json").read_text() == results
    (folder / "gen/gen.npz").write_bytes(samples)
    assert call(eval_program.main, ["--exp_path", str(folder)]).code == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "PrivImage"], ["--method", "PrivImage", "DP-MERF"]),
        (["--method", "DP-MERF", "--epsilon", "1"], ["--epsilon", "10.0"]),
        (["--method", "DP-MERF", "--data_name", "mnist_28"], ["--data_name", "mnist_28", "digits_8"]),
        (["--method", "DP-MERF", "eval.mode=val"], ["eval.mode", "val", "syn"]),
    ],
)
def test_evaluation_refuses_settings_that_do_not_match_the_run(finished, flags, words):
    folder = finished["DP-MERF"].folder
    before = (folder / "results.json").read_text()
    refusal = call(eval_program.main, [*flags, "--exp_path", str(folder)]).refusal
    assert all(word in refusal for word in words), refusal
    assert (folder / "results.json").read_text() == before


# ------------------------------------------------------------------------------------------------- interruptions


def test_killed_in_training_and_resumed_equals_uninterrupted(tmp_path):
    settings = ["privacy.noise_seed=1", "train.n_epochs=12", "train.snapshot_freq=2", "model.network.nf=4"]
    settings += ["model.network.ch_mult=[1]", "eval=none", "setup.omp_n_threads=1"]
    argv = arguments("PrivImage", tmp_path / "killed", *settings)
    folder = kill_when(argv, tmp_path / "killed", "train/checkpoints/snapshot_checkpoint.pth")
    assert not (folder / "results.json").exists()
    pretrained = (folder / "pretrain/checkpoints/final_checkpoint.pth").stat().st_mtime_ns
    resumed = execute("run.py", [*argv, "--resume_exp", folder.name])
    assert resumed.code == 0, resumed.err
    assert "resumed from train (snapshot)" in resumed.out
    assert "pretrain:" not in resumed.err
    assert (folder / "pretrain/checkpoints/final_checkpoint.pth").stat().st_mtime_ns == pretrained
    privacy = strict_json(folder / "privacy.json")
    assert all(release["executed"] == release["planned"] for release in privacy["releases"])
    assert privacy["noise_seeded"] is True

    whole = execute("run.py", arguments("PrivImage", tmp_path / "whole", *settings))
    one, other = read_samples(folder / "gen/gen.npz"), read_samples(whole.folder / "gen/gen.npz")
    assert np.array_equal(one.images, other.images)
    for name in ("spent", "releases"):
        assert privacy[name] == strict_json(whole.folder / "privacy.json")[name]


def test_a_run_stopped_before_the_first_snapshot_does_not_repeat_the_query(tmp_path, monkeypatch):
    argv = arguments("PrivImage", tmp_path, "eval=none")
    with monkeypatch.context() as patched:
        patched.setattr("models.diffusion.synthesizer.DiffusionSynthesizer._fit_public", _stop)
        folder = call(run_program.main, argv).folder
    answer = (folder / "pretrain/semantic_query.json").read_bytes()
    resumed = call(run_program.main, [*argv, "--resume_exp", folder.name])
    assert resumed.code == 0, resumed.err
    assert (folder / "pretrain/semantic_query.json").read_bytes() == answer
    releases = strict_json(folder / "privacy.json")["releases"]
    assert [release["executed"] for release in releases] == [1, 2]


def _stop(*_, **__) -> None:
    raise KeyboardInterrupt


def test_killed_between_training_and_generation(tmp_path):
    argv = arguments("DP-MERF", tmp_path, "eval=none")
    folder = call(run_program.main, argv).folder
    samples = read_samples(folder / "gen/gen.npz")
    for name in ("gen/gen.npz", "gen/sample.png", "privacy.json", "privacy_card.md", "results.json"):
        (folder / name).unlink()
    resumed = call(run_program.main, [*argv, "--resume_exp", folder.name])
    assert resumed.code == 0, resumed.err
    assert "resumed from train (final)" in resumed.out and "train:" not in resumed.err
    assert np.array_equal(read_samples(folder / "gen/gen.npz").images, samples.images)
    assert (folder / "gen/sample.png").exists() and (folder / "results.json").exists()


def test_stopped_from_the_keyboard(tmp_path, monkeypatch):
    argv = arguments("DP-MERF", tmp_path, "eval=none")
    with monkeypatch.context() as patched:
        patched.setattr("models.embedding.mean_embedding.EmbeddingGenerator.fit", _stop)
        stopped = call(run_program.main, argv)
    assert stopped.code == 130 and "Traceback" not in stopped.err
    advice = next(line for line in stopped.out.splitlines() if line.startswith("stopped; to continue from "))
    assert advice.endswith(f"python run.py --resume_exp {stopped.folder}")
    resumed = call(run_program.main, ["--resume_exp", str(stopped.folder)])
    assert resumed.code == 0, resumed.err
    releases = strict_json(stopped.folder / "privacy.json")["releases"]
    assert [release["executed"] for release in releases] == [1], "the mean embedding was asked again"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["--epsilon", "3"], ["--epsilon 10.0", "now 3"]),
        (["seed=5"], ["seed=0", "now 5"]),
        (["eval.mode=val"], ["eval.mode"]),
        (["train.epochs=2"], ["train.epochs=1", "now 2"]),
    ],
)
def test_resuming_with_another_configuration_is_refused(finished, setting, words):
    folder = finished["DP-MERF"].folder
    kept = {name: (folder / name).read_text() for name in ("config.yaml", "environment.json", "results.json")}
    argv = arguments("DP-MERF", folder.parent.parent, *setting, "--resume_exp", folder.name)
    refusal = call(run_program.main, argv).refusal
    assert "--resume_exp" in refusal and all(word in refusal for word in words), refusal
    assert kept == {name: (folder / name).read_text() for name in kept}


def test_resuming_an_unknown_run_names_the_known_ones(finished):
    folder = finished["DP-MERF"].folder
    refusal = call(
        run_program.main, arguments("DP-MERF", folder.parent.parent, "--resume_exp", "nowhere")
    ).refusal
    assert "nowhere" in refusal and folder.name in refusal
    alone = ["--exp_root", str(folder.parent.parent), "--resume_exp", "nowhere"]
    assert call(run_program.main, alone).refusal.startswith("error: --resume_exp: no run 'nowhere' in ")


# ------------------------------------------------------------------------------------------------- other ways to run


def test_a_plugin_method_is_listed_run_and_evaluated_again(tmp_path):
    (tmp_path / "my_shelf.py").write_text(
        "from evaluation.registry import metric\nfrom models import METHODS\n"
        "METHODS.register('Mine', METHODS.resolve('Noise'))\n"
        "@metric('brightness', better='higher', needs=('samples',))\n"
        "def brightness(samples):\n    return float(samples.images.mean())\n"
    )

    def program(name: str, *argv: str):
        return execute(name, list(argv), PYTHONPATH=str(tmp_path))

    listed = program("run.py", "--plugin", "my_shelf")
    assert listed.code == 2 and "usage: python run.py" in listed.err and ", Mine" in listed.err
    argv = [
        "--plugin",
        "my_shelf",
        "--method",
        "Mine",
        "--data_name",
        "digits_8",
        "--exp_root",
        str(tmp_path / "exp"),
    ]
    refused = program("run.py", *argv)
    assert refused.refusal.startswith("error: --method: Mine ")
    settings = tmp_path / "configs" / "method"
    settings.mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "method" / "Noise.yaml", settings / "Mine.yaml")
    done = program("run.py", *argv, "gen.data_num=20", "eval=none")
    assert done.code == 0, done.err
    judged = program(
        "eval.py", "--exp_path", str(done.folder), "--metrics", "fid,brightness", "eval.extractor=random_conv"
    )
    assert judged.code == 0, judged.err
    results = strict_json(done.folder / "results.json")
    assert results["method"] == "Mine" and 100 < results["metrics"]["brightness"] < 155


def test_every_file_of_a_run_without_privacy_states_it(tmp_path):
    outcome = call(run_program.main, arguments("DP-MERF", tmp_path, "--epsilon", "inf"))
    assert outcome.code == 0, outcome.err
    before, _, after = outcome.out.partition("privacy budget: ")
    assert "NOT private" in before.splitlines()[-1] and after.startswith("epsilon inf")
    assert "NOT private" in (outcome.folder / "privacy_card.md").read_text()
    assert "NOT private" in outcome.out
    results, privacy = (strict_json(outcome.folder / name) for name in ("results.json", "privacy.json"))
    assert results["epsilon"] == results["spent_epsilon"] == privacy["spent"] == "inf"
    assert privacy["private"] is False and "_epsinf-" in outcome.folder.name


def test_pretraining_alone_then_starting_from_its_checkpoint(tmp_path):
    alone = call(
        run_program.main, arguments("PDP-Diffusion", tmp_path, "sensitive_data.name=null", "eval.mode=syn")
    )
    assert alone.code == 0, alone.err
    checkpoint = alone.folder / "pretrain/checkpoints/final_checkpoint.pth"
    assert checkpoint.exists()
    assert not (alone.folder / "train").exists() and not (alone.folder / "privacy.json").exists()
    started = [f"model.ckpt={checkpoint}", "pretrain.n_epochs=0", "eval=none"]
    second = call(run_program.main, arguments("PDP-Diffusion", tmp_path, *started))
    assert second.code == 0, second.err
    assert "pretrain:" not in second.err
    untrained = call(run_program.main, arguments("PDP-Diffusion", tmp_path, *started, "train.n_epochs=0"))
    weights = torch.load(checkpoint, weights_only=True)["state"]["ema"]["weights"]
    final = untrained.folder / "train/checkpoints/final_checkpoint.pth"
    network = torch.load(final, weights_only=True)["state"]["network"]
    assert all(torch.equal(network[name], weights[name]) for name in weights)


def test_a_checkpoint_of_private_training_brings_its_cost_along(tmp_path):
    first = call(run_program.main, arguments("DPDM", tmp_path, "eval=none"))
    checkpoint = first.folder / "train/checkpoints/final_checkpoint.pth"
    started = [f"model.ckpt={checkpoint}", "train.n_epochs=0", "eval=none"]
    second = call(run_program.main, arguments("DPDM", tmp_path, *started))
    assert second.code == 0, second.err
    before, after = (strict_json(outcome.folder / "privacy.json") for outcome in (first, second))
    inherited = {release["name"]: release for release in after["releases"]}["checkpoint: dp-sgd"]
    assert inherited["executed"] == inherited["planned"] == before["releases"][0]["executed"] > 0
    assert after["spent"] == pytest.approx(before["spent"]) and after["spent"] > 1


def documented(method: str) -> list[list[str]]:
    """The settings of every command of docs/checkpoints.md for a method."""
    lines = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").splitlines()
    commands = [line.split() for line in lines if line.startswith(f"python run.py --method {method} ")]
    return [[word for word in command if "=" in word] for command in commands]


def final_state(folder: Path, stage: str) -> dict:
    path = folder / stage / "checkpoints/final_checkpoint.pth"
    return torch.load(path, weights_only=True)["state"]


def same_network(one: dict, other: dict) -> bool:
    weights = one["network"], other["network"]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )


def test_the_documented_starts_from_a_checkpoint_equal_one_run(tmp_path):
    def ran(settings: list[str], start: Path | None = None) -> Path:
        words = [word.replace("<run>", str(start)) for word in settings]
        argv = arguments("PDP-Diffusion", tmp_path, "privacy.noise_seed=1", "eval=none", *words)
        outcome = call(run_program.main, argv)
        assert outcome.code == 0, outcome.err
        return outcome.folder

    alone, tuned, longer, sampled = documented("PDP-Diffusion")
    whole = ran([])
    public = ran(alone)
    assert same_network(final_state(public, "pretrain"), final_state(whole, "pretrain"))
    assert same_network(final_state(ran(tuned, public), "train"), final_state(whole, "train"))
    steps = [final_state(folder, "pretrain")["step"] for folder in (public, ran(longer, public))]
    assert steps[1] == 2 * steps[0] > 0
    images = [read_samples(folder / "gen/gen.npz").images for folder in (whole, ran(sampled, whole))]
    assert np.array_equal(*images)


def test_the_documented_merging_of_adapters_gives_the_trained_network(tmp_path):
    (settings,) = documented("DP-LoRA")
    trained = call(run_program.main, arguments("DP-LoRA", tmp_path, "eval=none")).folder
    words = [word.replace("<run>", str(trained)) for word in settings]
    merged = call(run_program.main, arguments("DP-LoRA", tmp_path, "eval=none", *words))
    assert merged.code == 0, merged.err
    assert same_network(final_state(merged.folder, "train"), final_state(trained, "train"))
    spent = [strict_json(folder / "privacy.json")["spent"] for folder in (trained, merged.folder)]
    assert spent[1] == pytest.approx(spent[0])


def test_evaluating_nothing(tmp_path):
    outcome = call(run_program.main, arguments("Noise", tmp_path, "eval=none"))
    assert outcome.code == 0, outcome.err
    assert strict_json(outcome.folder / "results.json")["metrics"] == {}


def test_a_metric_without_weights_is_missing_and_the_others_are_there(tmp_path):
    settings = ["eval.metrics=[accuracy,fid]", "eval.extractor=inception", "--weights_root"]
    outcome = call(run_program.main, arguments("Noise", tmp_path, *settings, str(tmp_path / "none")))
    assert outcome.code == 3
    results = strict_json(outcome.folder / "results.json")
    assert "accuracy/mean/syn_val" in results["metrics"]
    assert "scripts/prepare_weights.py --name inception" in results["missing"]["fid/inception"]
    assert "missing: fid/inception" in outcome.out
    assert not any(name.startswith("fid/") for name in results["metrics"])


def test_a_dry_run_prints_the_plan_and_leaves_no_folder(tmp_path):
    outcome = call(run_program.main, arguments("PrivImage", tmp_path / "exp", "--dry_run"))
    assert outcome.code == 0, outcome.err
    for word in ("semantic query", "dp-sgd", "noise_multiplier", "epsilon alone", "parameters", "steps"):
        assert word in outcome.out, word
    assert not (tmp_path / "exp").exists()


def test_a_contradiction_of_the_accountants_shows_in_the_dry_run(tmp_path, monkeypatch):
    monkeypatch.setattr("opacus_ext.accounting._rdp_epsilon", lambda *_: 1e-3)
    outcome = call(run_program.main, arguments("PrivImage", tmp_path / "exp", "--dry_run"))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert "RDP epsilon 0.001" in outcome.err and "'dp-sgd'" in outcome.err


def test_a_report_that_cannot_be_computed_costs_no_samples(tmp_path, monkeypatch):
    def fail(*_):
        raise AccountingError("accountants disagree")

    monkeypatch.setattr("opacus_ext.accounting.available_epsilons", fail)
    outcome = call(run_program.main, arguments("DP-MERF", tmp_path, "eval=none"))
    assert outcome.code == 0, outcome.err
    assert len(read_samples(outcome.folder / "gen" / "gen.npz").images)
    assert strict_json(outcome.folder / "results.json")["spent_epsilon"] == "inf"
    assert "accountants disagree" in strict_json(outcome.folder / "privacy.json")["not_computed"]
    for text in (outcome.out, (outcome.folder / "privacy_card.md").read_text()):
        assert "accountants disagree" in text and "differentially private" not in text


def test_print_config_names_the_layer_of_every_value(tmp_path):
    outcome = call(run_program.main, arguments("PrivImage", tmp_path / "exp", "--print_config"))
    layers = {line.split()[0]: line for line in outcome.out.splitlines() if line}
    assert layers["gen.data_num"].endswith("command line")
    assert "base" in layers["privacy.relation"]
    assert "derived" in layers["model.network.image_size"] or "included" in layers["model.network.image_size"]
    assert "preset" in layers["eval.extractor"]
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("program", ["run.py", "eval.py"])
def test_help_needs_no_heavy_imports(program):
    outcome = execute(program, ["--help"], PYTHONPROFILEIMPORTTIME="1")
    assert outcome.code == 0 and "--data_name" in outcome.out
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in outcome.err.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "torchvision", "scipy", "sklearn", "matplotlib", "hydra", "opacus"}


@pytest.mark.parametrize(
    "mistake",
    ["--metod=X", "--method=PrivImge", "foo.bar=1", "train.n_epocs=1", "gen.data_num=x", "--data_name=x"],
)
def test_a_mistake_in_a_name_is_found_without_heavy_imports(mistake):
    outcome = execute("run.py", [mistake], PYTHONPROFILEIMPORTTIME="1")
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith("error: ")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in outcome.err.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "torchvision", "scipy", "sklearn", "opacus"}


def test_the_program_runs_from_another_folder(tmp_path):
    argv = arguments("Noise", tmp_path / "exp", "--dry_run")
    outcome = execute(str(ROOT / "run.py"), argv)
    assert outcome.code == 0, outcome.err


# ------------------------------------------------------------------------------------------------- real images


@pytest.mark.slow
def test_real_mnist(tmp_path):
    source = ROOT.parent / "shared" / "data" / "mnist"
    if not source.is_dir():
        pytest.skip("the MNIST files are not beside the project")
    root = ["--data_root", str(tmp_path / "data")]
    prepared = execute("scripts/prepare_data.py", ["--data_name", "mnist_28", "--source", str(source), *root])
    assert prepared.code == 0, prepared.err
    settings = [
        "model.d_rff=1000",
        "model.Generator.g_conv_dim=8",
        "train.batch_size=1000",
        "model.Generator.apply_attn=false",
    ]
    argv = arguments(
        "DP-MERF", tmp_path / "exp", "--data_name", "mnist_28", *root, *settings, "eval.mode=val"
    )
    outcome = execute("run.py", [*argv, "eval.metrics=[accuracy]"])
    assert outcome.code == 0, outcome.err
    results = strict_json(outcome.folder / "results.json")
    assert 0 <= results["metrics"]["accuracy/mean/noisy_val"] <= 100
    assert results["delta"] == pytest.approx(1 / (55_000 * np.log(55_000)))


@pytest.mark.slow
def test_real_cifar10(tmp_path):
    source = ROOT.parent / "shared" / "data" / "cifar10"
    if not source.is_dir():
        pytest.skip("the CIFAR-10 files are not beside the project")
    root = ["--data_root", str(tmp_path / "data")]
    prepared = execute(
        "scripts/prepare_data.py", ["--data_name", "cifar10_32", "--source", str(source), *root]
    )
    assert prepared.code == 0, prepared.err
    settings = ["train.batch_size=1000"]
    argv = arguments("DP-MERF", tmp_path / "exp", "--data_name", "cifar10_32", *root, *settings)
    outcome = execute("run.py", argv)
    assert outcome.code == 0, outcome.err
    samples = read_samples(outcome.folder / "gen/gen.npz")
    assert samples.images.shape == (100, 3, 32, 32)
    assert "25,000" in outcome.out  # the number found, because the published set has 50,000
