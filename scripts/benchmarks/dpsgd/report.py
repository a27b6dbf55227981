"""The measurements as JSON, and as tables of ratios in Markdown."""

from pathlib import Path

from scripts.benchmarks.dpsgd.cases import GRADIENTS
from utils.files import read_json, write_json, write_text

KEY = ("case", "device", "dtype", "threads")  # a new row takes the place of the one with the same key
TOLERANCE = {"float32": 1e-4, "bf16": 0.1}  # relative error from which a competitor computes something else
COLUMNS = (*GRADIENTS[1:], "noise")
PATTERN = "bench_dpsgd_*.json"
HEAD = """# Clipped per-example gradients: time and memory

Made by `python scripts/benchmarks/bench_dpsgd.py`; do not edit. Every number is a median over rounds in which the competitors
take turns in one process, clipping and summing included, divided by that of the ordinary step: forward and backward of
the same rows without privacy. Only ratios mean something beyond the machine. A dash is a competitor that cannot run the
case (the reason is in the JSON file); "differs" marks one whose result is not ours.

ours: `opacus_ext.gradients.per_example.clipped_sum`; hooks, ghost, ew: Opacus (`GradSampleModule`, ghost clipping, expanded
weights); vmap: `torch.func`; loop: plain autograd, one example at a time; noise: the Gaussian noise of one step.

A case is named after its network, the side of its images where it has several, and B examples x K rows of each.
digits8: the quick preset's UNet for `digits_8`; unet: the published UNet, all weights (K noise draws); subset: its part
that DP-LDM-SD trains; lora: adapters of rank 8 in it; latent: a latent UNet of 4 or 17 million weights; wrn16-4: a
Wide-ResNet (K augmented views); dpgan: DPGAN's critic (a real and a fake image).
"""


def merge(path: Path, rows: list[dict]) -> list[dict]:
    """Write `rows` to the JSON file; earlier rows of other cases, devices, types and threads are kept."""
    earlier = read_json(path) if path.exists() else []
    new = {tuple(row[key] for key in KEY) for row in rows}
    merged = [row for row in earlier if tuple(row[key] for key in KEY) not in new] + rows
    write_json(path, merged)
    return merged


def write_page(path: Path, results: Path) -> None:
    """One section for every results file of the folder `results`."""
    parts = [HEAD]
    for file in sorted(results.glob(PATTERN)):
        rows = read_json(file)
        parts.append(f"## {file.stem}\n\n{versions(rows)}\n\n{time_table(rows)}\n")
        if any("peak_bytes" in facts for row in rows for facts in row["competitors"].values()):
            parts.append(f"Peak memory in MB over the imported program.\n\n{memory_table(rows)}\n")
    write_text(path, "\n".join(parts))


def versions(rows: list[dict]) -> str:
    return "; ".join(
        sorted({f"{row['machine']}, PyTorch {row['torch']}, Opacus {row['opacus']}" for row in rows})
    )


def time_table(rows: list[dict]) -> str:
    head = ["case", "B x K", "trained", "dtype", "threads", "ordinary (s)", *COLUMNS, "goal"]
    body = []
    for row in rows:
        base = row["competitors"].get("ordinary", {}).get("seconds")
        cells = [ratio(row["competitors"].get(name), base, TOLERANCE[row["dtype"]]) for name in COLUMNS]
        base_cell = "" if base is None else f"{base:.4f}"
        body.append([*_facts(row), str(row["threads"]), base_cell, *cells, _goal(row["goal"])])
    return _markdown(head, body)


def memory_table(rows: list[dict]) -> str:
    names = (*GRADIENTS, "noise")
    head = ["case", "B x K", "trained", "dtype", *names, "B x P floats"]
    body = []
    for row in rows:
        peaks = [megabytes(row["competitors"].get(name)) for name in names]
        if any(peaks):
            body.append([*_facts(row), *peaks, f"{4 * row['examples'] * row['trained'] / 1e6:.0f}"])
    return _markdown(head, body)


def ratio(facts: dict | None, base: float | None, tolerance: float) -> str:
    """A competitor's cell: its time over `base`, "-" if it cannot run, empty if it was not asked."""
    if facts is None:
        return ""
    if facts.get("seconds") is None:
        return "-" if "error" in facts else ""
    if base is None:
        text = f"{facts['seconds']:.4f} s"
    else:
        text = f"{facts['seconds'] / base:.{2 if facts['seconds'] > 0.1 * base else 4}f}"
    error = facts.get("relative_error")
    return text if error is None or error <= tolerance else f"{text} (differs: {error:.0e})"


def megabytes(facts: dict | None) -> str:
    if facts is None or facts.get("peak_bytes") is None:
        return "-" if facts and ("error" in facts or "peak_error" in facts) else ""
    return f"{facts['peak_bytes'] / 1e6:.0f}"


def _facts(row: dict) -> list[str]:
    return [
        row["case"],
        f"{row['examples']} x {row['rows_per_example']}",
        f"{row['trained']:,}",
        row["dtype"],
    ]


def _goal(goal: dict) -> str:
    return "" if goal["ratio"] is None else f"{goal['competitor']} <= {goal['ratio']:.2f}"


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
