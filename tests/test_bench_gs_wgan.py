"""The benchmark of critics: both ways learn the same, and what is measured is written."""

import pytest
from tiny_runs import call, strict_json

from scripts.benchmarks import bench_gs_wgan


def test_the_benchmark_writes_what_it_measures(tmp_path):
    out, page = tmp_path / "bench.json", tmp_path / "bench.md"
    size = ["--case", "quick", "--stack", "3", "--repeats", "2"]
    outcome = call(bench_gs_wgan.main, [*size, "--json", str(out), "--markdown", str(page)])
    assert outcome.code == 0, outcome.err
    (row,) = strict_json(out)["rows"]
    assert row["critics"] == 3 and row["stacked"] > 0 and row["one by one"] > 0 and row["ratio"] > 0
    assert row["difference"] == pytest.approx(0, abs=1e-4)
    assert bench_gs_wgan.row_of(row) in page.read_text()
    assert bench_gs_wgan.as_markdown([strict_json(out)] * 2).count(bench_gs_wgan.row_of(row)) == 2


@pytest.mark.parametrize(
    ("ratios", "said"), [((25.0, 21.0), "The goal is met."), ((25.0, 0.7), "met by 1 of 2")]
)
def test_a_missed_goal_is_told(ratios, said):
    assert said in bench_gs_wgan.verdict({"rows": [{"ratio": ratio} for ratio in ratios]})
