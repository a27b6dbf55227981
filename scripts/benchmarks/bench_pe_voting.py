"""Measure one round of votes of Private Evolution: python scripts/benchmarks/bench_pe_voting.py

The backends take turns. Each round runs in its own process and reports its peak memory: private features that are
embedded during the query, candidates, search, and the noisy histogram. --num_classes 1 is the unconditional case, in
which every record is compared with all candidates.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.arguments import Parser, one_of, whole_number
from utils.program import program, run_process

MIB = 2**20


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--num_candidates", type=whole_number, default=60_000, help="candidates of all classes together"
    )
    parser.add_argument("--num_records", type=whole_number, default=55_000, help="private images")
    parser.add_argument("--dim", type=whole_number, default=2048, help="features per image")
    parser.add_argument("--num_classes", type=whole_number, default=10)
    parser.add_argument("--num_neighbors", type=whole_number, default=1, help="votes per record")
    parser.add_argument("--backends", nargs="+", default=["torch", "faiss"], type=one_of(("torch", "faiss")))
    parser.add_argument("--rounds", type=whole_number, default=2, help="runs per backend")
    parser.add_argument("--threads", type=whole_number, help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    backends = [name for name in arguments.backends if name == "torch" or importlib.util.find_spec(name)]
    for name in set(arguments.backends) - set(backends):
        print(f"{name} is not installed; skipped")
    runs = {name: [] for name in backends}
    for _ in range(arguments.rounds):
        for name in backends:
            runs[name].append(in_own_process(name, arguments))
    results = {"machine": platform.machine(), "size": size(arguments), "runs": runs}
    print(as_markdown(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def size(arguments: argparse.Namespace) -> dict[str, int | None]:
    names = ("num_candidates", "num_records", "dim", "num_classes", "num_neighbors", "threads")
    return {name: getattr(arguments, name) for name in names}


def in_own_process(backend: str, arguments: argparse.Namespace) -> dict[str, float]:
    """{"seconds", "peak_mib", "before_mib"} of one round of votes in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(vote_once, backend, arguments).result()


def vote_once(backend: str, arguments: argparse.Namespace) -> dict[str, float]:
    import numpy as np
    import torch

    from models.evolution.population import class_sizes, consecutive
    from models.evolution.voting import NearestCandidates, ballots

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if backend == "faiss":
        import faiss  # noqa: F401 - so that its memory counts as used before the votes
    records = private_records(arguments)
    before = peak_mib()
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((arguments.num_candidates, arguments.dim), np.float32))
    sizes = class_sizes(arguments.num_candidates, arguments.num_classes)
    start = time.perf_counter()
    nearest = [
        NearestCandidates(features[block], "L2", arguments.num_neighbors, backend)
        for block in consecutive(sizes)
    ]
    records.noisy_histogram(
        "votes", ballots(nearest, arguments.num_neighbors), int(sizes.max()), arguments.num_neighbors,
        by_class=arguments.num_classes > 1,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib(), "before_mib": before}


def private_records(arguments: argparse.Namespace):
    """PrivateData of tiny images with random features: cosines of projections."""
    import numpy as np
    import torch

    from data.spec import DataSpec, Samples
    from opacus_ext.accounting import Release
    from opacus_ext.ledger import Budget, Ledger
    from opacus_ext.private_data import PrivateData

    count, classes = arguments.num_records, arguments.num_classes
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    samples = Samples(images, np.arange(count, dtype=np.int64) % classes)
    spec = DataSpec("benchmark", 4, 1, classes, count, tuple(map(str, range(classes))))
    ledger = Ledger(Budget(float("inf"), 1e-6))
    ledger.adopt([Release("votes", None)])
    mixing = torch.from_numpy(rng.standard_normal((16, arguments.dim), np.float32))
    return PrivateData(samples, spec, ledger).map(lambda batch: torch.cos(batch.flatten(1) @ mixing))


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def as_markdown(results: dict) -> str:
    shown = ", ".join(f"{name} {value}" for name, value in results["size"].items())
    lines = [shown, "", "| backend | seconds (median) | all runs | peak MiB | MiB before the votes |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, runs in results["runs"].items():
        seconds = [run["seconds"] for run in runs]
        peak, before = (max(run[key] for run in runs) for key in ("peak_mib", "before_mib"))
        every = " ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {name} | {statistics.median(seconds):.1f} | {every} | {peak:.0f} | {before:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_process(main)
