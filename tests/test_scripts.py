"""The scripts around run.py: the upper bound on real images, the table of all runs, and the grid."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT, arguments, call, data_root, strict_json

import run as run_program
from models import METHODS
from models.nn.generator import Generator, GeneratorConfig
from models.nn.sn_gan import ResNetGenerator
from scripts import collect, grid_cells, test_classifier
from utils.config import load_config
from utils.files import write_json


def write_run(folder: Path, metrics: dict, **facts) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    write_json(
        folder / "results.json", {"method": "Noise", "epsilon": 10.0, "metrics": metrics, **JUDGED, **facts}
    )


JUDGED = {
    "evaluation": {"recipe": "quick", "seed": 0},
    "metric_info": {"fid": {"evaluation": {"recipe": "paper", "seed": 0}}, "kid": {}},
}


def table(path: Path) -> dict[str, dict]:
    with path.open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------- test_classifier


def test_the_upper_bound_is_high_and_stamped_non_private(tmp_path):
    argv = ["--method", "PDP-Diffusion", "--data_name", "digits_8", "--epsilon", "10.0", "-ed", "no-dp"]
    more = ["--exp_root", str(tmp_path), "--data_root", str(data_root())]
    outcome = call(test_classifier.main, [*argv, *more])
    assert outcome.code == 0, outcome.err
    assert outcome.folder.parent == tmp_path / "real"
    assert outcome.folder.name.startswith("digits_8-no-dp-")
    results = strict_json(outcome.folder / "results.json")
    assert results["metrics"]["accuracy/mean/syn_val"] > 90
    assert {name.split("/")[0] for name in results["metrics"]} == {"accuracy"}
    assert (results["method"], results["epsilon"], results["spent_epsilon"]) == ("real", "inf", "inf")
    assert results["private"] is False and "NOT private" in outcome.out


def test_the_published_command_composes(tmp_path):
    argv = [
        "--method",
        "PDP-Diffusion",
        "--data_name",
        "mnist_28",
        "--epsilon",
        "10.0",
        "-ed",
        "no-dp-mnist_28",
    ]
    outcome = call(test_classifier.main, [*argv, "--exp_root", str(tmp_path / "exp"), "--dry_run"])
    assert outcome.code == 0, outcome.err
    assert "60,000" in outcome.out
    assert not (tmp_path / "exp").exists()


def test_upper_bound_reports_mistakes_in_one_line(tmp_path):
    argv = ["--exp_root", str(tmp_path / "exp"), "eval.classifiers=[wrm]"]
    assert "wrm" in call(test_classifier.main, argv).refusal
    assert not (tmp_path / "exp").exists()


# ------------------------------------------------------------------------------------------------- collect


def test_collect_writes_one_row_per_run(tmp_path):
    write_run(tmp_path / "noise/a", {"fid/inception": 3.0}, spent_epsilon=float("inf"), borrowed=True)
    write_run(tmp_path / "dpdm/b", {"accuracy/mean/syn_val": 81.25}, method="DPDM")
    outcome = call(collect.main, ["--exp_root", str(tmp_path)])
    assert (outcome.code, outcome.err) == (0, "")
    rows = table(tmp_path / "table.csv")
    assert set(rows) == {"noise/a", "dpdm/b"}
    assert rows["noise/a"]["fid/inception"] == "3.0" and rows["noise/a"]["accuracy/mean/syn_val"] == ""
    assert rows["noise/a"]["spent_epsilon"] == "inf" and rows["noise/a"]["borrowed"] == "True"
    assert float(rows["dpdm/b"]["accuracy/mean/syn_val"]) == 81.25
    assert (rows["dpdm/b"]["recipe"], rows["dpdm/b"]["eval_seed"]) == ("quick+paper", "0")


def test_collect_lists_skipped_runs(tmp_path):
    write_run(tmp_path / "noise/whole", {})
    write_run(tmp_path / "noise/cut", {})
    (tmp_path / "noise/cut/results.json").write_text('{"method": ')
    write_run(tmp_path / "noise/list", {})
    (tmp_path / "noise/list/results.json").write_text("[]")
    write_run(tmp_path / "noise/running", {})
    (tmp_path / "noise/running/results.json").unlink()
    outcome = call(collect.main, ["--exp_root", str(tmp_path)])
    assert outcome.code == 1
    assert set(table(tmp_path / "table.csv")) == {"noise/whole"}
    assert f"unreadable: {tmp_path / 'noise/cut/results.json'}" in outcome.err
    assert f"unreadable: {tmp_path / 'noise/list/results.json'}" in outcome.err
    assert f"unfinished: {tmp_path / 'noise/running'}" in outcome.err


def test_collecting_again_replaces_rows_and_keeps_others(tmp_path):
    write_run(tmp_path / "noise/a", {"fid/inception": 3.0})
    write_run(tmp_path / "noise/b", {"is/inception": 2.0})
    call(collect.main, ["--exp_root", str(tmp_path)])
    (tmp_path / "noise/b").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    write_json(tmp_path / "noise/a/results.json", {"metrics": {"fid/inception": 4.0}, **JUDGED})
    outcome = call(collect.main, ["--exp_root", str(tmp_path)])
    rows = table(tmp_path / "table.csv")
    assert rows["noise/a"]["fid/inception"] == "4.0"
    assert rows["noise/b"]["is/inception"] == "2.0"
    assert "noise/b" in outcome.err


def test_collect_does_not_overwrite_another_table(tmp_path):
    (tmp_path / "table.csv").write_text("name,age\nada,36\n")
    refusal = call(collect.main, ["--exp_root", str(tmp_path)]).refusal
    assert "table.csv" in refusal
    assert (tmp_path / "table.csv").read_text() == "name,age\nada,36\n"


def test_collect_reads_what_run_writes(tmp_path):
    outcome = call(run_program.main, arguments("Noise", tmp_path, "eval.metrics=[fid]"))
    call(collect.main, ["--exp_root", str(tmp_path)])
    row = table(tmp_path / "table.csv")[f"noise/{outcome.folder.name}"]
    assert all(row[name] for name in ("method", "data", "epsilon", "delta", "spent_epsilon", "seed", "git"))
    assert float(row["fid/random_conv"]) > 0
    assert (row["precision"], row["eval_mode"]) == ("float32", "syn")
    assert row["overrides"] == "preset=quick gen.data_num=100 eval.metrics=[fid]"


# ------------------------------------------------------------------------------------------------- grids of runs


@pytest.fixture()
def grid(tmp_path):
    """Runs rq1.sh on tiny cells; returns (exit code, stdout, stderr)."""

    def launch(*arguments: str, **variables: str) -> tuple[int, str, str]:
        defaults = {
            "PYTHON": sys.executable, "METHODS": "Noise", "DATA": "digits_8", "EPSILONS": "10", "NAME": "grid",
            "SETTINGS": "eval=none gen.data_num=100", "EXP_ROOT": str(tmp_path), "DPIB_DATA_ROOT": str(data_root()),
        }  # fmt: skip
        environment = {**os.environ, **defaults, **variables}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts/rq1.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return launch


def test_grid_continues_after_a_failed_cell_and_skips_finished_ones(grid, tmp_path):
    code, out, err = grid(DATA="nonsense digits_8")
    assert code == 1
    assert "failed: Noise nonsense epsilon 10 (exit code 2)" in err
    assert [row["method"] for row in table(tmp_path / "table.csv").values()] == ["Noise"]
    code, out, err = grid(METHODS="Noise")
    assert code == 0, err
    assert "done already: Noise digits_8 epsilon 10" in out
    assert len(list(tmp_path.glob("noise/*"))) == 1


def test_started_cell_is_resumed_in_its_folder(grid, tmp_path):
    """Its private data are not asked a second time."""
    assert grid()[0] == 0
    (results,) = tmp_path.glob("noise/*/results.json")
    results.unlink()
    code, out, err = grid("--dry_run")
    assert code == 0 and f"begun in {results.parent.name}" in out, err
    code, out, err = grid()
    assert code == 0, err
    assert f"running: Noise digits_8 epsilon 10, begun in {results.parent.name}" in out
    assert list(tmp_path.glob("noise/*/results.json")) == [results]
    assert "done already" in grid()[1]


@pytest.mark.parametrize("finished", [False, True])
def test_cell_with_other_arguments_is_not_run_again(finished, tmp_path):
    folder = tmp_path / "noise" / "digits_8_eps10.0grid-2026-01-01-00-00-00"
    folder.mkdir(parents=True)
    write_json(folder / "environment.json", {"command": ["run.py", "--exp_root", "exp", "seed=1"]})
    if finished:
        write_json(folder / "results.json", {})
    cell = (str(tmp_path), "Noise", "digits_8", "10", "grid")
    how = "done" if finished else "begun"
    assert grid_cells.state(*cell, "seed=2") == (
        grid_cells.DIFFERENT,
        f"was {how} with seed=1, now seed=2; another NAME runs it too",
    )
    expected = (grid_cells.DONE, "") if finished else (grid_cells.BEGUN, folder.name)
    assert grid_cells.state(*cell, "seed=1") == expected


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["what"], 2)])
def test_grid_cells_prints_its_usage(argv, code, capsys):
    assert grid_cells.main(argv) == code
    assert "done EXP_ROOT" in capsys.readouterr().out


def test_grid_sh_is_not_a_program():
    outcome = subprocess.run(["bash", "scripts/grid.sh"], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 2 and "one of" in outcome.stderr


@pytest.mark.parametrize("command", [None, ["run.py", 1], ["run.py", "--exp_root=exp"]])
def test_cell_with_damaged_record_is_not_run_again(command, tmp_path):
    folder = tmp_path / "noise" / "digits_8_eps10.0grid-2026-01-01-00-00-00"
    folder.mkdir(parents=True)
    write_json(folder / "environment.json", {"command": command})
    code, text = grid_cells.state(str(tmp_path), "Noise", "digits_8", "10", "grid")
    assert code == grid_cells.DIFFERENT
    assert text.startswith(f"{folder / 'environment.json'}: ")


def test_cell_of_unknown_state_is_not_run(grid, tmp_path):
    """Python's own failure is no answer."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[ $1 = scripts/grid_cells.py ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    code, out, err = grid(PYTHON=str(python))
    assert code == 1 and "running" not in out
    assert "failed: Noise digits_8 epsilon 10 (grid_cells.py: exit code 1)" in err


def test_parallel_cells_have_a_log_each(grid, tmp_path):
    code, _, err = grid(DATA="nonsense digits_8", JOBS="2")
    assert code == 1
    (failed,) = (line for line in err.splitlines() if line.startswith("failed: "))
    log = failed.removeprefix("failed: Noise nonsense epsilon 10, see ").removesuffix(" (exit code 2)")
    assert "nonsense" in Path(log).read_text()
    assert [row["method"] for row in table(tmp_path / "table.csv").values()] == ["Noise"]


@pytest.mark.parametrize("jobs", ["0", "two", "-1"])
def test_a_wrong_number_of_jobs_is_refused(grid, jobs):
    code, _, err = grid(JOBS=jobs)
    assert (code, err.strip()) == (2, f"error: JOBS: {jobs} is not allowed; give at least 1")


def test_parallel_cells_stop_with_the_grid(tmp_path):
    """Ctrl-C does not reach processes in the background of a script, so it must pass the word on."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\nif [ $1 = run.py ]; then echo $$ >>{tmp_path}/pids; exec sleep 100; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "EXP_ROOT": str(tmp_path / "exp"), "JOBS": "2", "METHODS": "Noise DPDM",
                 "DATA": "digits_8", "EPSILONS": "10"}  # fmt: skip
    grid = subprocess.Popen(["bash", str(ROOT / "scripts/rq1.sh")], env={**os.environ, **variables})
    pids = tmp_path / "pids"
    while grid.poll() is None and (not pids.exists() or len(pids.read_text().split()) < 2):
        time.sleep(0.1)
    grid.send_signal(signal.SIGTERM)
    assert grid.wait(timeout=60) == 130
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# Stands for Python in a grid: lists what run.py is given, one by one or in a dry run all at once.
LISTING_PYTHON = f"""
import os, sys
words = sys.argv[1:]
if words[0] == "run.py":
    print("CELL", *words[1:])
elif words[:2] == ["scripts/grid_cells.py", "dry_run"]:
    for cell in " ".join(words[2:]).split(" ;"):
        print("CELL --method" + cell.partition("--method")[2] if cell else "")
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *words])
"""


@pytest.fixture()
def commands(tmp_path):
    """commands("rq2", **variables) -> the words after run.py of every cell, which are not run."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{LISTING_PYTHON}")
    python.chmod(0o755)

    def listed(script: str, *arguments: str, **variables: str) -> list[list[str]]:
        environment = {**os.environ, "PYTHON": str(python), "EXP_ROOT": str(tmp_path / "exp"), **variables}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CELL ")]

    return listed


def of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_grid_covers_all_methods(commands):
    cells = commands("rq1", DATA="mnist_28", EPSILONS="1 10")
    assert [(of(cell, "--method"), of(cell, "--epsilon")) for cell in cells] == [
        (method, epsilon) for epsilon in ("1", "10") for method in METHODS
    ]
    assert all("--dry_run" not in cell and of(cell, "--exp_description") == "rq1" for cell in cells)


@pytest.mark.parametrize(
    ("script", "variables", "count"),
    [
        ("rq1", {"DATA": "celeba_male_128", "EPSILONS": "10"}, len(list(METHODS))),
        ("rq2", {"METHODS": "DPDM DP-LoRA DPGAN GS-WGAN", "EPSILONS": "0.2"}, 4 + 4 * 5),
        ("rq3", {"METHODS": "DPGAN PDP-Diffusion", "DATA": "fmnist_28"}, 2 * 5),
        ("rq4", {"SELECTIVE": "DPDM", "CENTRAL": "DP-MERF", "CKPT": "some/where.pth"}, 3),
        ("gpu_methods", {}, 5 * 2),
    ],
)
def test_grids_compose(commands, script, variables, count):
    """Every command line is one that run.py understands, and has a name of its own."""
    cells = commands(script, "--dry_run", SETTINGS="seed=3", **variables)
    names = {
        tuple(of(cell, flag) for flag in ("--method", "--data_name", "--exp_description")) for cell in cells
    }
    assert len(names) == len(cells) == count
    for cell in cells:
        config = load_config(cell, METHODS)
        assert config.snapshot["seed"] == 3
        assert of(cell, "--exp_description").startswith(script)


def test_the_grid_has_the_published_datasets(commands):
    cells = commands("rq1", METHODS="Noise", EPSILONS="10")
    published = {path.stem for path in (ROOT / "configs/data").glob("*.yaml")} - {"custom", "digits_8"}
    assert {of(cell, "--data_name") for cell in cells} == published


def test_generators_have_the_published_sizes(commands):
    """Millions of parameters at 32 pixels and 10 classes."""
    own = {"DPGAN": lambda g: Generator(GeneratorConfig(60, 128, g, True, [2]), 32, 3, 10),
           "GS-WGAN": lambda g: ResNetGenerator(32, 3, 10, 10, g)}  # fmt: skip
    for method, make in own.items():
        cells = commands("rq2", METHODS=method, DATA=" ")
        widths = [int(cell[-1].partition("g_conv_dim=")[2]) for cell in cells]
        with torch.device("meta"):
            sizes = [sum(weight.numel() for weight in make(width).parameters()) / 1e6 for width in widths]
        assert sizes == pytest.approx([3.8, 6.6, 10.1, 14.4, 19.4], abs=0.1), method


@pytest.mark.slow
@pytest.mark.parametrize("script", ["rq2", "rq3", "rq4"])
def test_whole_grids_compose(commands, script):
    for cell in commands(script, EPSILONS="10", CKPT="some/where.pth"):
        load_config(cell, METHODS)


def test_grid_prints_help_and_refuses_other_arguments(grid):
    code, out, err = grid("--help")
    assert code == 0 and out.startswith("Which method is best") and "EPSILONS=" in out and "SETTINGS, " in out
    assert "#" not in out and "METHODS=$" not in out
    code, out, err = grid("--dryrun")
    assert code == 2 and "--dryrun" in err and "--dry_run" in err


def test_a_grid_refuses_an_unknown_method_before_any_cell(grid, tmp_path):
    code, out, err = grid(METHODS="Noise DPDN")
    assert code == 2 and "'DPDN'" in err and "did you mean 'DPDM'" in err
    assert not out and not list(tmp_path.iterdir())


def test_dry_run_of_a_grid_writes_nothing_and_lists_missing_data_once(grid, tmp_path):
    data = {"DPIB_DATA_ROOT": str(tmp_path / "none"), "DPIB_WEIGHTS_ROOT": str(tmp_path / "none")}
    settings = "preset=quick eval.extractor=inception"
    code, out, err = grid("--dry_run", EPSILONS="3 10", DATA="mnist_28", SETTINGS=settings, **data)
    assert code == 0, err
    assert (
        "\nNoise mnist_28 epsilon 3\n" in out and "budget: epsilon 10" in out and not list(tmp_path.iterdir())
    )
    assert out.count("missing: mnist_28") == 1 and out.count("missing: fid") == 1
    code, out, err = grid("--dry_run", DATA="nonsense digits_8")
    assert code == 1 and "error: unknown dataset 'nonsense'" in err and "budget: epsilon 10" in out


def test_cell_finished_with_other_settings_does_not_count_as_finished(grid, tmp_path):
    assert grid()[0] == 0
    code, out, err = grid(SETTINGS="gen.data_num=200 eval=none")
    assert code == 1 and "done already" not in out
    outputs = (
        "was done with eval=none gen.data_num=100, now gen.data_num=200 eval=none; another NAME runs it too"
    )
    assert f"failed: Noise digits_8 epsilon 10 ({outputs})" in err
    assert grid(SETTINGS="gen.data_num=100 eval=none")[0] == 0, "the same settings in another order"
    assert len(list(tmp_path.glob("noise/*"))) == 1


def test_cell_is_identified_by_its_whole_name_and_readable_results(grid, tmp_path):
    assert grid(NAME="grid-2")[0] == 0
    assert "running: Noise digits_8 epsilon 10" in grid()[1]
    assert "\ndone already\n" in grid("--dry_run")[1]
    results = next(tmp_path.glob("noise/digits_8_eps10.0grid-20*/results.json"))
    results.write_text("{")
    code, out, err = grid()
    assert (
        code == 1
        and f"failed: Noise digits_8 epsilon 10 ({results}: damaged" in err
        and "done already" not in out
    )
    assert "kept from the table, its results cannot be read: noise/" in err


def test_collect_leaves_a_file_that_is_no_table_alone(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for output in (tmp_path, tmp_path / "binary"):
        refusal = call(collect.main, ["--exp_root", str(tmp_path), "--output", str(output)]).refusal
        assert str(output) in refusal
    assert (tmp_path / "binary").read_bytes() == b"\xff\xfe\x00"
