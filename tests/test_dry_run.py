"""--dry_run: the plan and its cost, which data are missing, and the remaining work of an interrupted run."""

import dataclasses
import re

import pytest
from tiny_runs import arguments, call

import run as run_program
from data.public import num_public_images
from models import METHODS
from pipeline.checkpoints import Checkpoints
from pipeline.compose import compose, ineffective_settings
from pipeline.planning import cost_lines, remaining_work
from utils.config import load_config
from utils.progress import duration
from utils.timing import Cost, seconds_of

# Of 48 public images in 6 classes: the query keeps one public class for each of the 3 private ones.
PUBLIC_COSTS = {
    "PDP-Diffusion": {"pretrain": "3 steps x 16 images"},
    "PrivImage": {
        "semantic query": "3 steps x 16 images, unless it is in the cache, and 60 votes",
        "pretrain": "1 steps x 16 images",
    },
    "DP-LDM": {"autoencoder": "3 steps x 16 images", "pretrain": "3 steps x 16 images"},
    "DP-MERF": {"pretrain": "embedding of 48 images, 4 steps x 10 images"},
    "DPGAN": {
        "semantic query": "3 steps x 16 images, unless it is in the cache, and 60 votes",
        "pretrain": "2 steps x 16 images, 1 x 8 fakes",
    },
    "GS-WGAN": {"pretrain": "2 x 2 critic steps x 8 images"},
    "Noise": {},
}
MORE = {
    "DP-MERF": ["pretrain.epochs=1", "pretrain.batch_size=10"],
    "DPGAN": [
        "public_data.name=glyphs",
        "public_data.selective.ratio=0.5",
        "pretrain.query.n_epochs=1",
        "pretrain.query.batch_size=16",
        "pretrain.n_epochs=2",
        "pretrain.batch_size=16",
        "pretrain.g_batch_size=8",
    ],
    "GS-WGAN": ["public_data.name=glyphs"],
}


@pytest.mark.parametrize("name", sorted(PUBLIC_COSTS))
def test_the_public_stages_have_a_cost(name, make_method):
    method = make_method(name, *MORE.get(name, []))
    costs = method.public_costs(48)
    assert {cost.stage: cost.description for cost in costs} == PUBLIC_COSTS[name]
    assert all(cost.seconds > 0 for cost in costs)


def test_twice_the_images_cost_twice_the_steps(make_method):
    method = make_method("PDP-Diffusion")
    assert method.public_costs(96)[0].description == "6 steps x 16 images"


def test_without_pretraining_public_images_cost_nothing(make_method):
    assert make_method("PrivImage", "pretrain.n_epochs=0").public_costs(48) == []


class FakeClock:
    """A clock that only its steps move: each of them takes the next of `durations`."""

    def __init__(self, *durations: float) -> None:
        self.now, self.durations = 0.0, list(durations)

    def perf_counter(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self.durations.pop(0)


@pytest.mark.parametrize(
    ("durations", "remaining", "expected"),
    [
        (
            (9.0, 0.04, 0.03, 0.02, 0.05, 0.06, 0.01),
            1,
            0.02,
        ),  # the first is a warm-up; then five, of which the fastest
        ((9.0, 0.4, 0.3, 0.01), 1, 0.3),  # a slow step is not repeated after half a second
        ((9.0, 7.0, 0.01), 1, 7.0),
    ],
)
def test_seconds_of_a_step(monkeypatch, durations, remaining, expected):
    clock = FakeClock(*durations)
    monkeypatch.setattr("utils.timing.time", clock)
    assert seconds_of(clock.step) == pytest.approx(expected)
    assert len(clock.durations) == remaining


def dry_run(tmp_path, method: str, *more: str) -> str:
    outcome = call(run_program.main, arguments(method, tmp_path / "exp", *more, "--dry_run"))
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_the_full_plan_is_printed(tmp_path):
    out = dry_run(tmp_path, "PrivImage")
    assert all(part in out for part in ("epsilon 10,", "delta 9.572e-05,", "N = 1,437 "))
    assert "eval.mode=syn" in out
    stages = [line.partition(":")[0] for line in out.splitlines() if line.endswith(" here")]
    classifiers = ("small_cnn", "logistic_regression")
    judging = [f"{kind} {name}" for name in classifiers for kind in ("classifier", "ceiling")]
    judging += ["features random_conv", "neighbours"]
    assert stages == ["semantic query", "pretrain", "train", "generate", *judging, "together"]
    assert "preset=quick" not in out
    assert "missing" not in out and "resume" not in out


def test_held_out_validation_images_are_reported(tmp_path):
    out = dry_run(tmp_path, "Noise", "eval.mode=val", "eval.selection_epsilon=0.5")
    assert "N = 1,300 private" in out
    (line,) = (line for line in out.splitlines() if " 137 " in line)
    assert " epsilon 0.5 " in line and "eval.mode=val" in line


def test_missing_data_are_reported_with_the_command_that_prepares_them(tmp_path):
    root = str(tmp_path / "none")
    names = ["--data_name", "mnist_28", "--data_root", root, "public_data.name=emnist", "eval=none"]
    out = dry_run(tmp_path, "DP-MERF", *names)
    missing = [line for line in out.splitlines() if line.startswith("missing: ")]
    assert len(missing) == 2
    for name, line in zip(("mnist_28", "emnist"), missing, strict=True):
        assert f"scripts/prepare_data.py --data_name {name} --data_root {root}" in line
    assert missing[1].endswith("the time of pretraining is unknown")


def test_a_missing_folder_of_public_images_is_reported_after_the_plan(tmp_path):
    folder = tmp_path / "places365"
    words = ["public_data.name=places365", f"public_data.train_path={folder}", "public_data.n_classes=365"]
    out = dry_run(tmp_path, "DP-MERF", *words, "eval=none")
    assert "mean embedding" in out and "together" in out
    (missing,) = (line for line in out.splitlines() if line.startswith("missing: "))
    assert "public_data.train_path" in missing and str(folder) in missing


def test_a_subset_of_the_images_is_reported(tmp_path):
    out = dry_run(tmp_path, "DP-MERF", "sensitive_data.num_train=1000", "eval=none")
    assert "1,000 of 1,437" in out and "N = 1,000 " in out


def test_missing_weights_of_metrics_are_reported(tmp_path):
    empty = [
        "--weights_root",
        str(tmp_path / "none"),
        "eval.metrics=[accuracy,fid]",
        "eval.extractor=inception",
    ]
    missing = [
        line for line in dry_run(tmp_path, "Noise", *empty).splitlines() if line.startswith("missing: ")
    ]
    assert (
        len(missing) == 1 and missing[0].startswith("missing: fid: ") and "prepare_weights.py" in missing[0]
    )


@pytest.mark.parametrize(
    ("api", "told"),
    [
        ("improved_diffusion", "missing: model.api_params.improved_diffusion.model_path: no weights file"),
        ("openai", "missing: "),  # the library, or the key
        ("glyphs", None),
    ],
)
def test_missing_weights_and_keys_of_generators_are_reported(api, told, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    argv = arguments("PE", tmp_path, f"model.api={api}", "--weights_root", str(tmp_path), "--dry_run")
    outcome = call(run_program.main, argv)
    assert outcome.code == 0, outcome.err
    missing = [line for line in outcome.out.splitlines() if line.startswith("missing: ")]
    assert [line[: len(told or "")] for line in missing] == ([told] if told else [])


def test_pe_sd_reports_the_memory_of_its_network(make_method):
    method = make_method("PE-SD")
    (pretraining,) = method.public_costs(48)
    (votes,) = method.costs()
    assert (pretraining.stage, votes.stage) == ("pretrain", "train")
    assert pretraining.seconds > 0 and votes.seconds > 0


def test_a_run_without_private_data_is_timed_without_a_private_stage(tmp_path):
    out = dry_run(tmp_path, "PDP-Diffusion", "sensitive_data.name=null")
    stages = [line.partition(":")[0] for line in out.splitlines() if line.endswith(" here")]
    assert stages == ["pretrain", "together"]


def test_a_resumed_run_is_timed_as_a_whole_and_a_long_run_suggests_a_shorter_one(tmp_path):
    class Long:
        stage, description, seconds = "train", "many steps", 1e6

    config = load_config(["--method", "Noise", "--data_name", "digits_8"], METHODS)
    lines = cost_lines([Long()], dataclasses.replace(config, preset="paper", resume="some-run"))
    (total,) = (line for line in lines if line.startswith("together"))
    assert "11.6 days" in total
    assert lines[-1].startswith("preset=quick")
    assert "--method DP-MERF" in cost_lines([Long()], config)[-1]  # quick, and longer than it is meant to be
    own = load_config(["--method", "dp-merf", "--data_name", "digits_8", "eval.metrics=[]"], METHODS)
    advice = cost_lines([Long()], own)[-1]
    assert "20 minutes" in advice and "DP-MERF" not in advice and "eval=none" not in advice
    Long.seconds = 1000
    assert not any("20 minutes" in line for line in cost_lines([Long()], config))


def test_public_images_are_counted_without_rendering(tmp_path):
    argv = ["--method", "PrivImage", "--data_name", "digits_8", "public_data.per_class=20"]
    assert num_public_images(load_config(argv, METHODS).public_data, tmp_path) == 62 * 20
    assert not list(tmp_path.iterdir())
    nothing = load_config(["--method", "DPDM", "--data_name", "digits_8"], METHODS).public_data
    assert num_public_images(nothing, tmp_path) is None


def test_the_remaining_work_of_an_interrupted_run(tmp_path, monkeypatch):
    settings = ["eval=none", "train.snapshot_freq=1", "train.n_epochs=3"]
    with monkeypatch.context() as patched:
        patched.setattr("utils.runtime.Runtime.preview", stop_in_training)
        folder = call(run_program.main, arguments("PDP-Diffusion", tmp_path / "exp", *settings)).folder
    resume = [*settings, "--resume_exp", folder.name]
    files = sorted(folder.rglob("*"))
    line = dry_run(tmp_path, "PDP-Diffusion", *resume).splitlines()[-1]
    told, _, left = line.partition("; remaining: about ")
    assert told.startswith(folder.name) and "train (snapshot)" in told
    stages = re.findall(r"(pretrain|train|samples|evaluation) (not )?done", told)
    assert [name for name, is_left in stages if not is_left] == ["pretrain"]
    assert [name for name, is_left in stages if is_left] == ["train", "samples", "evaluation"]
    assert "1 of 3" in told
    assert left.endswith(" here")
    alone = ["--exp_root", str(tmp_path / "exp"), "--resume_exp", folder.name, "--dry_run"]
    refusal = call(run_program.main, [*alone, "train.n_epochs=9"]).refusal
    assert "train.n_epochs=3" in refusal and "now 9" in refusal
    for more in ([], ["setup.omp_n_threads=1", "eval=quick", "train.dp.max_physical_batch_size=64"]):
        outcome = call(run_program.main, [*alone, *more])
        assert outcome.out.splitlines()[-1].startswith(told), outcome.err
        assert "run.py --method PDP-Diffusion " in outcome.out.splitlines()[0]
    assert "setup.omp_n_threads=1" in outcome.out.splitlines()[0]
    assert sorted(folder.rglob("*")) == files
    finished = call(run_program.main, arguments("PDP-Diffusion", tmp_path / "exp", *resume))
    assert finished.code == 0, finished.err
    line = dry_run(tmp_path, "PDP-Diffusion", *resume).splitlines()[-1]
    assert folder.name in line and "is finished" in line


def test_the_remaining_time_counts_finished_steps_and_samples(tmp_path):
    config = load_config(["--method", "PDP-Diffusion", "--data_name", "digits_8", "preset=quick"], METHODS)
    costs = [Cost("pretrain", "", 1000.0, 10), Cost("train", "", 3000.0, 2), Cost("generate", "", 100.0)]

    def remaining(stage: str, step: int, file: str | None) -> str:
        parts = compose(config)
        folder = tmp_path / f"{stage}-{step}-{file}"
        checkpoints = Checkpoints(folder, config.method, parts.synthesizer, parts.ledger)
        if step:
            parts.synthesizer._start_stage(stage)
            parts.synthesizer.step = step
            checkpoints.save(stage, file)
        return remaining_work(compose(config), folder, costs, []).partition("; remaining: about ")[2]

    whole = remaining("pretrain", 0, None)
    assert whole == f"{duration(4100)} here"
    assert remaining("pretrain", 9, "snapshot") == f"{duration(3200)} here"
    assert remaining("pretrain", 10, "final") == f"{duration(3100)} here"
    assert remaining("train", 1, "snapshot") == f"{duration(1600)} here"
    assert remaining("train", 2, "final") == f"{duration(100)} here"


@pytest.mark.parametrize(
    "method", ["PrivImage", "DP-FETA-Pro", "DP-MERF", "DPGAN", "GS-WGAN", "PE", "DP-LDM"]
)
def test_every_stage_that_a_snapshot_counts_has_its_number_of_steps(make_method, method):
    method = make_method(method)
    costs = [*method.public_costs(48), *method.costs()]
    counted = [cost for cost in costs if cost.stage in ("pretrain", "train")]
    assert counted and all(cost.steps > 0 for cost in counted)
    assert [method.remaining_share(cost) for cost in costs] == [1.0] * len(costs)


def test_half_of_the_rounds_of_pe_leave_half_of_the_work(make_method):
    method = make_method("PE")
    (cost,) = method.costs()
    method.iteration = cost.steps / 2
    assert method.remaining_share(cost) == 0.5


def stop_in_training(runtime, stage: str, *_) -> None:
    if stage == "train":
        raise KeyboardInterrupt


NO_PUBLIC_SET = "public_data.selective.ratio: no effect: there is no public set to select from"


@pytest.mark.parametrize(
    "method, setting, told",
    [
        (
            "DP-FETA",
            "pretrain.n_epochs=1",
            "pretrain.n_epochs: no effect: pretrain.warm_up has those of the warm-up",
        ),
        ("DP-FETA", "pretrain.warm_up.n_epochs=1", None),
        ("DP-FETA", "pretrain.n_epochs=0", None),  # takes the warm-up away
        (
            "DPDM",
            "pretrain.batch_size=50",
            "pretrain.batch_size: no effect: this run has no images to pretrain on",
        ),
        ("DPDM", "train.n_epochs=1", None),
        ("PDP-Diffusion", "pretrain.n_epochs=1", None),
        (
            "PDP-Diffusion",
            "pretrain.warm_up.n_epochs=1",
            "pretrain.warm_up.n_epochs: no effect: this run has no warm-up",
        ),
        ("DP-MERF", "pretrain.lr=0.1", "pretrain.lr: no effect: this run has no images to pretrain on"),
        (
            "DPGAN",
            "pretrain.n_epochs=1",
            "pretrain.n_epochs: no effect: this run has no images to pretrain on",
        ),
        ("GS-WGAN", "pretrain.iterations=1", None),  # warms the critics up on private shards
        (
            "GS-WGAN",
            "public_data.name=null pretrain.iterations=1 public_data.selective.ratio=0.5",
            NO_PUBLIC_SET,
        ),
        ("DP-MERF", "public_data.selective.ratio=0.5", NO_PUBLIC_SET),
        ("DPDM", "public_data.selective.ratio=0.5", NO_PUBLIC_SET),
        ("PrivImage", "public_data.selective.ratio=0.5", None),
    ],
)
def test_settings_without_effect_are_reported(method, setting, told):
    argv = [*f"--method {method} --data_name digits_8 --epsilon 10".split(), *setting.split()]
    config = load_config(argv, METHODS)
    lines = ineffective_settings(config.provenance, compose(config).synthesizer.settings_without_effect())
    assert [line[: len(told or "")] for line in lines] == ([told] if told else [])


@pytest.mark.parametrize("mode", ["syn", "val"])
def test_settings_of_held_out_images_do_nothing_where_none_are(mode, caplog):
    argv = [
        "--method",
        "Noise",
        "--data_name",
        "digits_8",
        "eval.selection_epsilon=2",
        "sensitive_data.num_val=100",
    ]
    with caplog.at_level("INFO"):
        compose(load_config([*argv, f"eval.mode={mode}"], METHODS))
    told = {line.partition(":")[0] for line in caplog.messages if ": no effect: " in line}
    assert told == ({"eval.selection_epsilon", "sensitive_data.num_val"} if mode == "syn" else set())
