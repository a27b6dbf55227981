"""Compare DP-MERF, DP-NTK and DP-Kernel with their published numbers: python scripts/benchmarks/kernel_methods.py

Runs the quick preset of each method on 28-pixel images and writes a table next to the published numbers. Cells of the
JSON file are kept, so the script can be stopped and started again. --table_only runs nothing. If the run folder of a
kept cell still exists, its numbers are read again, since eval.py may have evaluated it again.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.compare_ideas import ROOT, caveats_of
from utils.arguments import Parser, decimal_number
from utils.artefacts import ENVIRONMENT, RESULTS
from utils.files import read_json, write_text
from utils.program import program, run_process

CLASSIFIERS = ("small_cnn", "logistic_regression")
SETTINGS = (
    "preset=quick",
    "eval.extractor=random_conv",
    "eval.metrics=[accuracy,fid]",
    f"eval.classifiers=[{','.join(CLASSIFIERS)}]",
)

# (method, data, epsilon): percent, the mean of three large classifiers on 60,000 samples (DPImageBench)
PUBLISHED = {
    ("DP-MERF", "mnist_28", 10.0): 81.3,
    ("DP-NTK", "mnist_28", 10.0): 91.3,
    ("DP-Kernel", "mnist_28", 10.0): 93.6,
    ("DP-MERF", "fmnist_28", 10.0): 62.2,
    ("DP-NTK", "fmnist_28", 10.0): 76.3,
    ("DP-Kernel", "fmnist_28", 10.0): 70.0,
    ("DP-MERF", "mnist_28", 1.0): 80.3,
    ("DP-NTK", "mnist_28", 1.0): 50.0,
    ("DP-Kernel", "mnist_28", 1.0): 94.0,
    ("DP-MERF", "fmnist_28", 1.0): 62.2,
    ("DP-NTK", "fmnist_28", 1.0): 64.4,
    ("DP-Kernel", "fmnist_28", 1.0): 68.4,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--exp_root", type=Path, default=Path("exp/kernel_methods"), metavar="DIR")
    parser.add_argument("--epsilons", type=decimal_number, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--methods", nargs="+", default=["DP-MERF", "DP-NTK", "DP-Kernel"])
    parser.add_argument("--data", nargs="+", default=["mnist_28", "fmnist_28"])
    parser.add_argument(
        "--json", type=Path, default=ROOT / "docs/results/kernel_methods.json", metavar="FILE"
    )
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/kernel_methods.md", metavar="FILE")
    parser.add_argument("--table_only", action="store_true", help="run nothing")
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    exp_root = arguments.exp_root.resolve()
    earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    rows = {(row["method"], row["data"], row["epsilon"]): row for row in earlier}
    failed = []
    for cell in PUBLISHED:
        method, data, epsilon = cell
        if method not in arguments.methods or data not in arguments.data or epsilon not in arguments.epsilons:
            continue
        if cell not in rows and not arguments.table_only:
            print("running:", *cell, flush=True)
            seconds = run(*cell, exp_root)
            if seconds is None:
                failed.append(cell)
            else:
                rows[cell] = {"method": method, "data": data, "epsilon": epsilon, "cpu_seconds": seconds}
        if cell in rows:
            rows[cell] |= numbers_of(*cell, exp_root)
            write_text(arguments.json, json.dumps(list(rows.values()), indent=2) + "\n")
    write_text(arguments.markdown, as_markdown(rows))
    for cell in failed:
        print("failed:", *cell, file=sys.stderr)
    return 1 if failed else 0


def run(method: str, data: str, epsilon: float, exp_root: Path) -> int | None:
    """CPU seconds of one run with its evaluation, which depend little on other load; None if the run failed."""
    command = [sys.executable, "run.py", "--method", method, "--data_name", data, "--epsilon", str(epsilon)]
    before = cpu_seconds()
    code = subprocess.run([*command, "--exp_root", str(exp_root), *SETTINGS], cwd=ROOT).returncode
    return None if code else round(cpu_seconds() - before)


def numbers_of(method: str, data: str, epsilon: float, exp_root: Path) -> dict:
    """The numbers of the latest finished run of this cell; empty if its folder no longer exists."""
    paths = sorted(exp_root.glob(f"{method.lower()}/{data}_eps{epsilon}-[0-9]*/{RESULTS}"))
    if not paths:
        return {}
    results, environment = read_json(paths[-1]), read_json(paths[-1].parent / ENVIRONMENT)
    metrics = results["metrics"]
    accuracies = {name: metrics.get(f"accuracy/{name}/syn_val") for name in CLASSIFIERS}
    known = {name: value for name, value in accuracies.items() if value is not None}
    return {
        "seed": results["seed"],
        "accuracy": known,
        "fid": metrics["fid/random_conv"],
        "git": environment["git"],
    }


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def as_markdown(rows: dict[tuple[str, str, float], dict]) -> str:
    lines = [
        "# DP-MERF, DP-NTK and DP-Kernel, quick preset",
        "",
        "Generated by `python scripts/benchmarks/kernel_methods.py`; do not edit. Accuracy: percent on the real test "
        "images, of two classifiers trained on 10,000 samples: the small convolutional network of the quick preset, "
        "and a logistic regression on the pixels; one seed. Published: DPImageBench, with a larger generator and the "
        "mean of three large convolutional networks on 60,000 samples. Frechet distance: with random convolutional "
        "features. CPU seconds: whole runs. A missing row was measured only with an earlier classifier or preset.",
        *caveats_of("kernel_methods"),
        "",
        "| method | data | epsilon | small network | regression | published | Frechet distance | CPU seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell, published in PUBLISHED.items():
        if cell in rows:
            row = rows[cell]
            accuracies = [row["accuracy"].get(name) for name in CLASSIFIERS]
            shown = " | ".join("" if value is None else f"{value:.1f}" for value in accuracies)
            lines.append(
                f"| {cell[0]} | {cell[1]} | {cell[2]:g} | {shown} | {published:.1f} | {row['fid']:.3f} "
                f"| {row['cpu_seconds']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_process(main)
