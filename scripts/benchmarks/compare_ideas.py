"""Compare methods that differ in one idea: python scripts/benchmarks/compare_ideas.py --markdown docs/comparison.md

Runs each variant with several seeds and budgets, and compares the pairs seed by seed. Finished runs are skipped, so the
script can be stopped and started again. --table_only writes the table of the finished runs. The file of --json keeps
its rows of runs whose folder no longer exists.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.arguments import Parser, decimal_number, one_of, whole_number
from utils.artefacts import ENVIRONMENT, RESULTS
from utils.files import read_json, write_text
from utils.program import program, run_process

ROOT = Path(__file__).resolve().parents[2]
# Accuracy of the classifier that all runs of the tables have in common. Its epoch is chosen on samples, which costs no
# epsilon and uses no test image.
ACCURACY = "accuracy/small_cnn/syn_val"


@dataclass(frozen=True)
class Variant:
    method: str
    settings: tuple[str, ...] = ()


# With this much noise, the query reveals nothing about the private images: a random selection of the same size.
RANDOM = "public_data.selective.sigma=1e6"

VARIANTS = {
    "DPDM": Variant("DPDM"),
    "PDP-Diffusion": Variant("PDP-Diffusion"),
    "PrivImage": Variant("PrivImage"),
    "random classes": Variant("PrivImage", (RANDOM,)),
    "DP-FETA": Variant("DP-FETA"),
    "DP-FETA-Pro": Variant("DP-FETA-Pro"),
    "DP-LDM-SD": Variant("DP-LDM-SD"),
    "DP-LoRA": Variant("DP-LoRA"),
    "DP-LDM": Variant("DP-LDM"),
}

# (variant, baseline, what the pair differs in)
CLAIMS = (
    ("DP-FETA", "DPDM", "a warm-up on noisy central images"),
    ("PDP-Diffusion", "DPDM", "pretraining on a public set"),
    ("PrivImage", "DPDM", "pretraining on selected public classes"),
    ("PrivImage", "random classes", "the semantic query against a random selection of the same size"),
    ("PrivImage", "PDP-Diffusion", "selected classes against the whole public set"),
    ("DP-FETA-Pro", "DP-FETA", "a second warm-up on images of a noisy mean embedding"),
    ("DP-LDM-SD", "PDP-Diffusion", "DP-SGD on a few percent of the weights against all"),
    ("DP-LoRA", "DP-LDM", "DP-SGD on adapters against attention blocks, both in latent space"),
)

# Datasets whose public set is not the glyphs of the quick preset: 42 handwritten letters, which must be prepared.
LETTERS = ("public_data.name=kazakh_letters",)
PUBLIC = {"mnist_28": LETTERS, "fmnist_28": LETTERS}
# What a reader must know about how the presets and the runs of a table came about: <page>.md in this folder.
CAVEATS = Path(__file__).resolve().parent / "caveats"
TEN_LETTERS = "public_data.selective.ratio=0.25"  # PrivImage: one for each private class
WITHOUT_PUBLIC_SET = ("DPDM", "DP-FETA", "DP-FETA-Pro")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_name", default="digits_8")
    parser.add_argument("--epsilons", type=decimal_number, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--seeds", type=whole_number, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants", nargs="+", type=one_of(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--exp_root", type=Path, default=Path("exp/ideas"), metavar="DIR")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all runs")
    parser.add_argument("--table_only", action="store_true", help="run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of every run to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    failed = [] if arguments.table_only else run_all(arguments)
    rows = with_kept(arguments.json, collect(arguments))
    text = as_markdown(rows, arguments.data_name)
    print(text)
    if arguments.json:
        write_text(arguments.json, json.dumps(rows, indent=2) + "\n")
    if arguments.markdown:
        write_text(arguments.markdown, text)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def run_all(arguments: argparse.Namespace) -> list[str]:
    """Run all cells and return the failed ones; seed by seed, so that a stopped script leaves complete comparisons."""
    failed = []
    for seed in arguments.seeds:
        for epsilon in arguments.epsilons:
            for name in arguments.variants:
                label = f"{name}, {arguments.data_name}, epsilon {epsilon:g}, seed {seed}"
                if finished(arguments, name, epsilon, seed):
                    print(f"finished already: {label}", flush=True)
                    continue
                print(f"running: {label}", flush=True)
                code = subprocess.run(command(arguments, name, epsilon, seed), cwd=ROOT).returncode
                if code not in (0, 3):  # 3: a metric is missing
                    failed.append(f"{label} (exit code {code})")
    return failed


def command(arguments: argparse.Namespace, name: str, epsilon: float, seed: int) -> list[str]:
    variant, data = VARIANTS[name], arguments.data_name
    public = [] if name in WITHOUT_PUBLIC_SET else [*PUBLIC.get(data, ())]
    if public and variant.method == "PrivImage":
        public.append(TEN_LETTERS)
    return [
        sys.executable, "run.py", "--method", variant.method, "--data_name", data, "--epsilon", str(epsilon),
        "--exp_description", description(name, seed), "--exp_root", str(arguments.exp_root.resolve()),
        "preset=quick", f"seed={seed}", *public, *variant.settings, *arguments.settings,
    ]  # fmt: skip


def description(name: str, seed: int) -> str:
    return f"{name.lower().replace(' ', '-')}-seed{seed}"


def finished(arguments: argparse.Namespace, name: str, epsilon: float, seed: int) -> list[Path]:
    """Result files of this cell, oldest first."""
    cell = f"{arguments.data_name}_eps{epsilon}*{description(name, seed)}-[0-9]*"
    return sorted(arguments.exp_root.glob(f"{VARIANTS[name].method.lower()}/{cell}/{RESULTS}"))


def collect(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for name in VARIANTS:
        for epsilon in arguments.epsilons:
            for seed in arguments.seeds:
                for path in finished(arguments, name, epsilon, seed)[-1:]:
                    results = read_json(path)
                    metrics, seconds = results["metrics"], sum(results["timing"].values())
                    fid = next((value for key, value in metrics.items() if key.startswith("fid/")), None)
                    rows.append(
                        {"variant": name, "epsilon": epsilon, "seed": seed, "accuracy": metrics[ACCURACY],
                         "fid": fid, "seconds": seconds, "git": read_json(path.parent / ENVIRONMENT)["git"]}
                    )  # fmt: skip
    return rows


def with_kept(path: Path | None, rows: list[dict]) -> list[dict]:
    """The rows, plus the rows of an earlier file that they do not replace, in the order of the table."""
    earlier = read_json(path) if path is not None and path.exists() else []
    merged = {(row["variant"], row["epsilon"], row["seed"]): row for row in [*earlier, *rows]}
    order = list(VARIANTS)
    return sorted(
        merged.values(), key=lambda row: (order.index(row["variant"]), -row["epsilon"], row["seed"])
    )


def as_markdown(rows: list[dict], data_name: str) -> str:
    cells: dict[tuple[str, float], dict[int, dict]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["epsilon"]), {})[row["seed"]] = row
    compared = gains_of(cells)
    lines = [
        f"# What the ideas of the methods gain: {data_name}, quick preset",
        "",
        *findings(compared),
        "Generated by `python scripts/benchmarks/compare_ideas.py`; do not edit. Accuracy: percent on the real test "
        "images, of a small classifier trained only on the samples; mean and standard deviation over the seeds. "
        "Frechet distance: with the extractor of the quick preset. Seconds: whole runs on a shared machine.",
        *caveats_of(f"comparison_{data_name}"),
        "",
        "| variant | epsilon | seeds | accuracy | Frechet distance | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (name, epsilon), cell in cells.items():
        accuracy, fid, seconds = (
            [row[key] for row in cell.values()] for key in ("accuracy", "fid", "seconds")
        )
        distance = spread(fid, 3) if None not in fid else ""
        time = f"{statistics.median(seconds):.0f}"
        lines.append(f"| {name} | {epsilon:g} | {len(cell)} | {spread(accuracy, 1)} | {distance} | {time} |")
    lines += [
        "",
        "Differences in accuracy, seed by seed:",
        "",
        "| idea | with it | without it | epsilon | difference (points) | seeds with a gain |",
        "|---|---|---|---:|---:|---:|",
    ]
    for (ours, baseline, idea), by_epsilon in compared.items():
        for epsilon, gains in by_epsilon.items():
            wins = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            difference = spread(gains, 1, "+")
            lines.append(f"| {idea} | {ours} | {baseline} | {epsilon:g} | {difference} | {wins} |")
    return "\n".join(lines) + "\n"


def gains_of(cells: dict) -> dict[tuple[str, str, str], dict[float, list[float]]]:
    """Claim -> epsilon, largest first -> points gained, per seed that both variants of the pair have."""
    epsilons = sorted({epsilon for _, epsilon in cells}, reverse=True)
    compared: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    for claim in CLAIMS:
        for epsilon in epsilons:
            one, other = (cells.get((name, epsilon), {}) for name in claim[:2])
            gains = [one[seed]["accuracy"] - other[seed]["accuracy"] for seed in one if seed in other]
            if gains:
                compared.setdefault(claim, {})[epsilon] = gains
    return compared


def caveats_of(page: str) -> list[str]:
    """The lines of caveats/<page>.md after an empty one; none if there is no such file."""
    path = CAVEATS / f"{page}.md"
    return ["", *path.read_text(encoding="utf-8").rstrip().splitlines()] if path.exists() else []


def findings(compared: dict) -> list[str]:
    """One sentence per outcome: an idea wins or loses if it does so with every seed and budget."""
    outcomes: dict[str, list[str]] = {}
    numbers = set()  # of pairs
    for (ours, baseline, _), by_epsilon in compared.items():
        gains = [gain for values in by_epsilon.values() for gain in values]
        outcome = "won" if min(gains) > 0 else "lost" if max(gains) < 0 else "mixed"
        outcomes.setdefault(outcome, []).append(f"{ours} against {baseline}")
        numbers.add(len(gains))
    each = " to ".join(map(str, sorted({min(numbers), max(numbers)}))) if numbers else ""
    texts = {
        "won": f"Better in every pair of runs with the same seed and budget ({each} for each idea):",
        "lost": "Worse in every such pair:",
        "mixed": "Sometimes better, sometimes worse:",
    }
    sentences = [
        f"{text} {', '.join(outcomes[outcome])}." for outcome, text in texts.items() if outcome in outcomes
    ]
    return [" ".join(sentences), ""] if sentences else []


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean, with the standard deviation if there are several values."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    run_process(main)
