"""The benchmark of the votes of Private Evolution: it runs, and what is measured is written."""

import pytest
from tiny_runs import call, strict_json

from scripts.benchmarks import bench_pe_voting


@pytest.mark.parametrize("num_classes", ["1", "3"])
def test_the_benchmark_writes_what_it_measures(num_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_pe_voting, "in_own_process", bench_pe_voting.vote_once)
    size = ["--num_candidates", "50", "--num_records", "70", "--dim", "8", "--num_classes", num_classes]
    out = tmp_path / "bench.json"
    outcome = call(bench_pe_voting.main, [*size, "--backends", "torch", "--rounds", "3", "--json", str(out)])
    assert outcome.code == 0, outcome.err
    results = strict_json(out)
    assert results["size"]["num_classes"] == int(num_classes)
    runs = results["runs"]["torch"]
    assert len(runs) == 3
    assert all(run["seconds"] > 0 and run["peak_mib"] >= run["before_mib"] > 0 for run in runs)
    assert "| torch | " in outcome.out
