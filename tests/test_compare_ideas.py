"""scripts/benchmarks/compare_ideas.py: its commands compose, and its table compares what differs in one idea."""

import shutil

import pytest
from tiny_runs import call

from models import METHODS
from scripts.benchmarks import compare_ideas
from utils.config import load_config
from utils.files import read_json, write_json


def parsed(tmp_path, *argv: str):
    return compare_ideas.parse_arguments(["--exp_root", str(tmp_path), *argv])


def write_result(tmp_path, name: str, seed: int, accuracy: float, time: str = "2026-01-01-00-00-00") -> None:
    method = compare_ideas.VARIANTS[name].method
    folder = tmp_path / method.lower() / f"digits_8_eps10.0-{compare_ideas.description(name, seed)}-{time}"
    folder.mkdir(parents=True)
    metrics = {compare_ideas.ACCURACY: accuracy, "fid/random_conv": 0.5}
    write_json(folder / "results.json", {"metrics": metrics, "timing": {"train": 60.0}})
    write_json(folder / "environment.json", {"git": "abc"})


@pytest.mark.parametrize("data_name", ["digits_8", "mnist_28"])
@pytest.mark.parametrize("name", compare_ideas.VARIANTS)
def test_every_command_composes(name, data_name, tmp_path):
    command = compare_ideas.command(parsed(tmp_path, "--data_name", data_name), name, 1.0, 2)
    config = load_config(command[2:], METHODS)
    assert (config.method, config.seed) == (compare_ideas.VARIANTS[name].method, 2)
    assert config.preset == "quick"


def test_pairs_are_compared_seed_by_seed(tmp_path):
    for seed, (ours, baseline) in enumerate([(90.0, 80.0), (70.0, 75.0)]):
        write_result(tmp_path, "DP-FETA", seed, ours)
        write_result(tmp_path, "DPDM", seed, baseline)
    write_result(tmp_path, "DPDM", 2, 10.0)  # no partner: left out
    outcome = call(compare_ideas.main, ["--exp_root", str(tmp_path), "--table_only"])
    assert outcome.code == 0, outcome.err
    assert "| DP-FETA | DPDM | 10 | +2.5 ± 10.6 | 1 of 2 |" in outcome.out
    assert "| DP-FETA | 10 | 2 | 80.0 ± 14.1 | 0.500 ± 0.000 | 60 |" in outcome.out


def test_findings_come_first(tmp_path):
    for seed in (0, 1):
        for name, accuracy in (("DP-FETA", 80.0), ("DPDM", 70.0), ("DP-FETA-Pro", 79.0 + 2 * seed)):
            write_result(tmp_path, name, seed, accuracy)
        for name, accuracy in (("DP-LoRA", 60.0), ("DP-LDM", 61.0)):
            write_result(tmp_path, name, seed, accuracy)
    findings = call(compare_ideas.main, ["--exp_root", str(tmp_path), "--table_only"]).out.splitlines()[2]
    outcomes = {"better": "DP-FETA against DPDM", "worse": "DP-LoRA against DP-LDM"}
    better, worse, mixed = findings.removesuffix(".").split(". ")
    for outcome, sentence in (("better", better), ("worse", worse)):
        assert sentence.lower().startswith(outcome) and sentence.endswith(f": {outcomes[outcome]}")
    assert mixed.endswith(": DP-FETA-Pro against DP-FETA") and "2 for each" in better


def test_variants_of_a_method_are_distinguished_and_the_latest_run_counts(tmp_path):
    write_result(tmp_path, "PrivImage", 0, 90.0)
    write_result(tmp_path, "PrivImage", 0, 91.0, time="2026-01-02-00-00-00")
    write_result(tmp_path, "random classes", 0, 50.0)
    rows = compare_ideas.collect(parsed(tmp_path))
    assert {row["variant"]: row["accuracy"] for row in rows} == {"PrivImage": 91.0, "random classes": 50.0}


def test_rows_of_runs_with_deleted_folders_are_kept(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--exp_root", str(tmp_path), "--table_only", "--json", str(file)]
    write_result(tmp_path, "DPDM", 0, 20.0)
    write_result(tmp_path, "DPDM", 1, 30.0)
    assert call(compare_ideas.main, arguments).code == 0
    shutil.rmtree(tmp_path / "dpdm")
    write_result(tmp_path, "DPDM", 0, 40.0)  # replaces its row
    assert "| DPDM | 10 | 2 | 35.0 ± 7.1 |" in call(compare_ideas.main, arguments).out
    assert [row["accuracy"] for row in read_json(file)] == [40.0, 30.0]
