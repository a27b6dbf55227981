"""The benchmark of the evaluator: both ways to compute the Frechet distance agree; files and page match."""

import pickle

import pytest
from tiny_runs import call, strict_json

from evaluation.metrics.fid import frechet_distance
from evaluation.metrics.precision_recall import precision_recall
from scripts.benchmarks import bench_eval


def test_the_page_shows_the_numbers_of_the_json_file(tmp_path, monkeypatch):
    kept = (bench_eval.OURS, bench_eval.SCIPY)
    monkeypatch.setattr(bench_eval, "CASES", {name: bench_eval.CASES[name] for name in kept})
    out, page = tmp_path / "results" / "bench.json", tmp_path / "bench.md"
    size = ["--num_images", "200", "--dim", "24", "--threads", "1"]
    outcome = call(bench_eval.main, [*size, "--json", str(out), "--markdown", str(page)])
    assert outcome.code == 0, outcome.err
    rows = {row["name"]: row for row in strict_json(out)["rows"]}
    assert rows[bench_eval.OURS]["value"] == pytest.approx(rows[bench_eval.SCIPY]["value"], rel=1e-9)
    for row in rows.values():
        assert row["inputs_mib"] == pytest.approx(2 * 200 * 24 * 4 / 2**20)
        assert row["peak_mib"] >= row["libraries_mib"] > row["inputs_mib"]
        cells = (f"{row['value']:.6g}", f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}")
        assert " | ".join(("| " + row["name"], *cells, "")) in page.read_text()


def test_cases_compute_the_metrics():
    real, fake = bench_eval.features(200, 8, 0)
    for case, metric in ((bench_eval.frechet, frechet_distance), (bench_eval.precision_recall, share_inside)):
        found = case(real, fake)
        assert found.value == metric(real, fake)


def test_a_case_is_timed_by_both_clocks(monkeypatch):
    clock = iter([10.0, 13.0])
    cpu_clock = iter([1.0, 6.0])
    monkeypatch.setattr(bench_eval.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench_eval.time, "process_time", lambda: next(cpu_clock))
    assert bench_eval.timed(lambda: 7.0) == (7.0, 3.0, 5.0)


def share_inside(real, fake) -> float:
    return precision_recall(real, fake)["precision"]


def test_the_cache_gives_the_same_features():
    images = bench_eval.features(30, 4, 0)[0]
    first, again = bench_eval.feature_pass(images, images), bench_eval.feature_cache(images, images)
    assert first.value == again.value


def test_the_layout_of_memory_does_not_change_the_loss(monkeypatch):
    monkeypatch.setattr(bench_eval, "STEPS", 1)
    monkeypatch.setattr(bench_eval, "STEP_IMAGES", 4)
    cases = (bench_eval.train_channels_last, bench_eval.train_default_layout)
    losses = [case(None, None).value for case in cases]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_every_case_can_be_sent_to_a_process():
    for case in bench_eval.CASES.values():
        assert pickle.loads(pickle.dumps(case)) is case
