"""The benchmark of clipped per-example gradients: its files, and that a wrong competitor is marked."""

import math
import subprocess

import pytest
import torch
from tiny_runs import ROOT, call, execute, strict_json

from scripts.benchmarks import bench_dpsgd
from scripts.benchmarks.dpsgd import competitors
from scripts.benchmarks.dpsgd.cases import CASES, GRADIENTS, load
from scripts.benchmarks.dpsgd.measure import relative_error

SMALL = "digits8-32x4"


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def bench(tmp_path):
    """Run the benchmark on the small case; returns (row of the JSON file, the page)."""

    def launch(*more: str, case: str = SMALL) -> tuple[dict, str]:
        out, page = tmp_path / "results/bench_dpsgd_cpu.json", tmp_path / "page.md"
        files = ["--out", str(out), "--page", str(page)]
        settings = ["--cases", case, "--rounds", "1", "--threads", "1"]
        outcome = call(bench_dpsgd.main, [*files, *settings, *more])
        assert outcome.code == 0, outcome.err
        return strict_json(out)[-1], page.read_text()

    return launch


def cells(page: str, case: str = SMALL) -> dict[str, str]:
    """Column -> cell of the case's row in the first table of the page."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")
    ]
    (row,) = (line for line in lines if line[0] == case)
    return dict(zip(lines[0], row, strict=True))


def refusal(*argv: str) -> str:
    return call(bench_dpsgd.main, list(argv)).refusal


def test_a_row_holds_every_competitor_with_its_time_and_error(bench):
    row, page = bench()
    assert (row["case"], row["threads"], row["examples"], row["rows_per_example"]) == (SMALL, 1, 32, 4)
    assert set(row["competitors"]) == set(GRADIENTS)
    for name in ("ours", "hooks", "vmap", "vmap-chunks", "loop"):
        facts = row["competitors"][name]
        assert facts["relative_error"] < 1e-5, name
    found = cells(page)
    base = row["competitors"]["ordinary"]["seconds"]
    for name in ("ours", "hooks", "vmap", "loop"):
        expected = row["competitors"][name]["seconds"] / base
        assert float(found[name]) == pytest.approx(expected, abs=0.006), name
    assert "K > 1" in row["competitors"]["ghost"]["error"] and found["ghost"] == "-"


def test_competitor_with_another_result_is_marked(bench, monkeypatch):
    def wrong(problem):
        step = competitors.loop(problem)
        return lambda: {name: 2 * gradient for name, gradient in step().items()}

    monkeypatch.setitem(competitors.COMPETITORS, "hooks", wrong)
    row, page = bench("--competitors", "ordinary", "ours", "hooks")
    assert row["competitors"]["hooks"]["relative_error"] == pytest.approx(1.0, abs=1e-4)
    assert "differs: 1e+00" in cells(page)["hooks"]


def test_failing_competitor_is_a_dash_with_its_reason(bench, monkeypatch):
    def failing(problem):
        raise RuntimeError("no such kernel\nand a second line")

    monkeypatch.setitem(competitors.COMPETITORS, "ew", failing)
    row, page = bench("--competitors", "ordinary", "ours", "ew")
    assert row["competitors"]["ew"] == {"error": "RuntimeError: no such kernel"}
    assert cells(page)["ew"] == "-" and cells(page)["vmap"] == ""


def test_measuring_again_replaces_a_row_and_keeps_the_others(bench, tmp_path):
    bench("--competitors", "ordinary")
    bench("--competitors", "ordinary", "ours")
    bench("--competitors", "ordinary", "--dtype", "bf16")
    rows = strict_json(tmp_path / "results/bench_dpsgd_cpu.json")
    assert [row["dtype"] for row in rows] == ["float32", "bf16"]
    assert set(rows[0]["competitors"]) == {"ordinary", "ours"}


def test_peak_memory_comes_from_a_process_of_its_own(bench):
    row, page = bench("--competitors", "ordinary", "--memory")
    assert 0 < row["competitors"]["ordinary"]["peak_bytes"] < 1e9
    assert "Peak memory" in page


def test_list_names_every_case():
    outcome = execute("scripts/benchmarks/bench_dpsgd.py", ["--list"])
    assert outcome.code == 0 and [line.split(":")[0] for line in outcome.out.splitlines()] == list(CASES)


def test_mistakes_are_reported_in_one_line(tmp_path):
    assert "--cases: 'unet29' matches nothing; known: digits8-32x4" in refusal("--cases", "unet29")
    assert "--competitors: 'jax'" in refusal("--competitors", "jax", "--cases", SMALL)
    assert "--rounds: 0" in refusal("--rounds", "0")
    assert "--threads: 0" in refusal("--threads", "0")


# ------------------------------------------------------------------------------------------ cases


@pytest.mark.parametrize(
    ("case", "trained"),
    [
        ("unet28-8x4", 1_485_217),
        ("unet32-8x4", 3_835_619),
        ("dpgan28-16x2", 1_184_163),
        ("dpgan32-16x2", 1_649_127),
        ("subset32-16x1", 286_176),  # published
        ("lora32-16x1", 4 * 4 * 8 * (128 + 128)),
        ("latent8-4M-32x1", 4_167_172),
        ("latent8-17M-32x1", 16_624_644),
        ("noise-4M-64x1", 3_835_619),
    ],
)
def test_cases_train_what_the_published_methods_train(case, trained):
    with torch.device("meta"):
        network, _, _ = CASES[case].build(CASES[case].rows)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trained


def test_some_examples_are_clipped_and_some_are_not():
    problem = load(CASES[SMALL], torch.device("cpu"), None)
    norms = []
    for i in range(len(problem.labels)):
        loss = problem.losses(problem.network, *(part[i : i + 1] for part in problem.batch)).sum()
        gradients = torch.autograd.grad(loss, list(problem.network.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
    clipped = sum(norm > problem.max_grad_norm for norm in norms)
    assert len(norms) // 5 < clipped < len(norms) - len(norms) // 5


def test_every_competitor_sees_the_same_numbers():
    one, other = (load(CASES[SMALL], torch.device("cpu"), None) for _ in range(2))
    for first, second in zip(one.batch, other.batch, strict=True):
        assert len(first) == len(one.labels) and torch.equal(first, second)
    assert one.images.abs().max() <= 1


def test_relative_error():
    reference = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_error(reference, reference) == 0
    assert relative_error({**reference, "b": torch.tensor([4.5])}, reference) == pytest.approx(0.1)
    assert relative_error({"a": torch.tensor([3.0])}, reference) == math.inf
    assert relative_error({**reference, "b": torch.tensor([[4.0]])}, reference) == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run all GPU checks")
def test_the_gpu_script_needs_a_gpu():
    done = subprocess.run([ROOT / "scripts/gpu_checks.sh"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: torch sees no GPU here\n"
