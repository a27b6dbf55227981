"""The benchmark of critics: both ways learn the same weights; files and page match."""

import pytest
from tiny_runs import call, strict_json

from scripts.benchmarks import bench_gs_wgan


def test_the_page_shows_the_numbers_of_the_json_file(tmp_path, monkeypatch):
    seconds = iter([9.0, 9.0, 0.3, 3.0, 0.6, 15.0])  # the first turn of both ways does not count
    timed = bench_gs_wgan.timed

    def counted(step, turn: int, device: str) -> float:
        timed(step, turn, device)
        return next(seconds)

    monkeypatch.setattr(bench_gs_wgan, "timed", counted)
    out, page = tmp_path / "bench.json", tmp_path / "bench.md"
    size = ["--case", "quick", "--stack", "3", "--repeats", "2"]
    outcome = call(bench_gs_wgan.main, [*size, "--json", str(out), "--markdown", str(page)])
    assert outcome.code == 0, outcome.err
    (row,) = strict_json(out)["rows"]
    assert row["critics"] == 3
    # milliseconds per critic: medians of 100 and 200, of 1000 and 5000; ratios 10 and 25
    assert [row[key] for key in ("stacked", "one by one", "ratio")] == pytest.approx([150.0, 3000.0, 17.5])
    assert row["difference"] == pytest.approx(0, abs=1e-4)
    assert bench_gs_wgan.row_of(row) in page.read_text()
    assert bench_gs_wgan.as_markdown([strict_json(out)] * 2).count(bench_gs_wgan.row_of(row)) == 2


@pytest.mark.parametrize(("ratios", "expected"), [((25.0, 21.0), "goal is met."), ((25.0, 0.7), "1 of 2")])
def test_the_verdict_counts_the_cases_that_meet_the_goal(ratios, expected):
    assert expected in bench_gs_wgan.verdict({"rows": [{"ratio": ratio} for ratio in ratios]})
