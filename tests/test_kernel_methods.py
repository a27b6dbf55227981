"""scripts/benchmarks/kernel_methods.py: each cell runs once; the table shows it next to the published number."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_runs import call

from models import METHODS
from scripts.benchmarks import kernel_methods
from utils.config import load_config
from utils.files import read_json, write_json


def arguments_of(tmp_path) -> list[str]:
    return [
        "--exp_root", str(tmp_path / "runs"), "--json", str(tmp_path / "rows.json"),
        "--markdown", str(tmp_path / "table.md"), "--epsilons", "10",
    ]  # fmt: skip


@pytest.fixture
def commands(tmp_path, monkeypatch) -> list[list[str]]:
    """Of the runs that were started; DP-NTK's fail, the others leave results behind."""
    started = []

    def run(command, cwd):
        started.append(command)
        method, data = command[command.index("--method") + 1], command[command.index("--data_name") + 1]
        if method != "DP-NTK":
            folder = tmp_path / "runs" / method.lower() / f"{data}_eps10.0-2026-01-01-00-00-00"
            folder.mkdir(parents=True)
            accuracies = {"accuracy/small_cnn/syn_val": 61.84, "accuracy/logistic_regression/syn_val": 72.5}
            metrics = {**accuracies, "fid/random_conv": 0.5}
            write_json(folder / "results.json", {"metrics": metrics, "seed": 0})
            write_json(folder / "environment.json", {"git": "abc"})
        return subprocess.CompletedProcess(command, 1 if method == "DP-NTK" else 0)

    monkeypatch.setattr(kernel_methods.subprocess, "run", run)
    return started


def test_every_cell_of_a_budget_is_run_and_in_the_table(tmp_path, commands):
    outcome = call(kernel_methods.main, arguments_of(tmp_path))
    assert outcome.code == 1 and outcome.err.count("failed: DP-NTK") == 2
    for command in commands:
        config = load_config(command[2:], METHODS)
        assert (config.preset, config.epsilon) == ("quick", 10.0)
    table = Path(tmp_path / "table.md").read_text()
    assert "| DP-Kernel | fmnist_28 | 10 | 61.8 | 72.5 | 70.0 | 0.500 |" in table
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 4 and len(commands) == 6


def test_finished_cells_are_kept(tmp_path, commands):
    for _ in range(2):
        call(kernel_methods.main, arguments_of(tmp_path))
    assert len(commands) == 8  # the second time those alone that failed


def test_runs_that_were_evaluated_again_are_read_again(tmp_path, commands):
    call(kernel_methods.main, arguments_of(tmp_path))
    path = next((tmp_path / "runs/dp-kernel").glob("mnist_28*")) / "results.json"
    results = read_json(path)
    results["metrics"]["accuracy/small_cnn/syn_val"] = 70.0
    write_json(path, results)
    call(kernel_methods.main, [*arguments_of(tmp_path), "--table_only"])
    assert "| DP-Kernel | mnist_28 | 10 | 70.0 | 72.5 |" in (tmp_path / "table.md").read_text()
    shutil.rmtree(tmp_path / "runs")
    call(kernel_methods.main, [*arguments_of(tmp_path), "--table_only"])
    assert "| DP-Kernel | mnist_28 | 10 | 70.0 | 72.5 |" in (tmp_path / "table.md").read_text()


def test_cells_can_be_selected(tmp_path, commands):
    call(kernel_methods.main, [*arguments_of(tmp_path), "--methods", "DP-Kernel", "--data", "mnist_28"])
    assert [command[3:6] for command in commands] == [["DP-Kernel", "--data_name", "mnist_28"]]


def test_published_numbers_cover_every_cell():
    methods, data = ("DP-MERF", "DP-NTK", "DP-Kernel"), ("mnist_28", "fmnist_28")
    assert set(kernel_methods.PUBLISHED) == set(itertools.product(methods, data, (1.0, 10.0)))
