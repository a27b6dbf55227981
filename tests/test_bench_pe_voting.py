"""The benchmark of the votes of Private Evolution: file and table match."""

import pytest
from tiny_runs import call, strict_json

from scripts.benchmarks import bench_pe_voting


@pytest.mark.parametrize("num_classes", ["1", "3"])
def test_the_table_shows_the_numbers_of_the_json_file(num_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_pe_voting, "in_own_process", bench_pe_voting.vote_once)
    size = ["--num_candidates", "50", "--num_records", "70", "--dim", "8", "--num_classes", num_classes]
    out = tmp_path / "bench.json"
    outcome = call(bench_pe_voting.main, [*size, "--backends", "torch", "--rounds", "3", "--json", str(out)])
    assert outcome.code == 0, outcome.err
    results = strict_json(out)
    assert results["size"]["num_classes"] == int(num_classes)
    runs = results["runs"]["torch"]
    assert len(runs) == 3
    assert all(run["peak_mib"] >= run["before_mib"] > 10 for run in runs)
    median = sorted(run["seconds"] for run in runs)[1]
    peak = max(run["peak_mib"] for run in runs)
    (row,) = (line for line in outcome.out.splitlines() if line.startswith("| torch | "))
    assert f"| torch | {median:.1f} |" in row and f" {peak:.0f} | " in row
