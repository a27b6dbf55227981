"""Measure the most expensive metrics: python scripts/benchmarks/bench_eval.py --markdown docs/bench_eval.md

Each case runs in its own process: the most expensive term of the Frechet distance, computed by this toolkit and by
scipy.linalg.sqrtm; precision and recall, whose distances do not fit into memory at once; the feature cache; training
steps of a classifier in both memory layouts. The whole benchmark takes about ten minutes on one core.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.arguments import Parser, whole_number
from utils.program import program, run_process

MIB = 2**20
MOST_IMAGES = 2000  # upper limit for the pass through an extractor
STEPS, STEP_IMAGES = 5, 64  # training of a classifier


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--num_images", type=whole_number, default=50_000, help="images in each of the two sets"
    )
    parser.add_argument("--dim", type=whole_number, default=2048, help="features per image")
    parser.add_argument("--threads", type=whole_number, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=whole_number, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table to FILE")
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    size = (arguments.num_images, arguments.dim, arguments.seed, arguments.threads)
    rows = [measured(name, case, *size) for name, case in CASES.items()]
    results = {
        "num_images": arguments.num_images, "dim": arguments.dim, "machine": platform.machine(),
        "threads": arguments.threads, "rows": rows,
    }  # fmt: skip
    text = as_markdown(results)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    return 0


def features(num_images: int, dim: int, seed: int):
    """Real and fake features (N, D) float32: ReLU of correlated normals, as pooled activations are."""
    import numpy as np

    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim), dtype=np.float32) / np.float32(dim) ** 0.5
    sets = [np.empty((num_images, dim), np.float32) for _ in range(2)]
    for points, shift in zip(sets, (np.float32(0), np.float32(0.05)), strict=True):
        for start in range(0, num_images, 4096):  # in parts, so that the metric determines the peak of memory
            part = points[start : start + 4096]
            part[:] = np.maximum(rng.standard_normal(part.shape, dtype=np.float32) @ mixing + shift, 0)
    return sets


class Timed(NamedTuple):
    """The value that a case computes, its wall time, and the CPU time of all threads of the process."""

    value: float
    seconds: float
    cpu_seconds: float


def timed(function) -> Timed:
    start, cpu_start = time.perf_counter(), time.process_time()
    value = function()
    return Timed(value, time.perf_counter() - start, time.process_time() - cpu_start)


def trace_ours(real, fake) -> Timed:
    import scipy.linalg  # noqa: F401  # loaded before both ways are timed

    from evaluation.metrics.fid import trace_sqrt

    first, second = _covariances(real, fake)
    return timed(lambda: trace_sqrt(first, second))


def trace_scipy(real, fake) -> Timed:
    import numpy as np
    from scipy.linalg import sqrtm

    first, second = _covariances(real, fake)
    return timed(lambda: float(np.trace(sqrtm(first @ second).real)))


def frechet(real, fake) -> Timed:
    from evaluation.metrics.fid import frechet_distance

    return timed(lambda: frechet_distance(real, fake))


def precision_recall(real, fake) -> Timed:
    from evaluation.metrics.precision_recall import precision_recall

    return timed(lambda: precision_recall(real, fake)["precision"])


def feature_pass(real, fake) -> Timed:
    return _features(min(len(real), MOST_IMAGES), passes=1)


def feature_cache(real, fake) -> Timed:
    return _features(min(len(real), MOST_IMAGES), passes=2)


def train_channels_last(real, fake) -> Timed:
    return _training("channels_last")


def train_default_layout(real, fake) -> Timed:
    return _training("contiguous_format")


def _training(layout: str) -> Timed:
    """Steps of the published ResNet with images and weights in this memory layout; the value is the first loss."""
    import torch

    from data.spec import DataSpec
    from evaluation.registry import CLASSIFIERS

    torch.manual_seed(0)
    memory_format = getattr(torch, layout)
    network = CLASSIFIERS.resolve("resnet")(DataSpec("bench", 32, 3, 10, 10, tuple("0123456789")))
    network.to(memory_format=memory_format)
    images = torch.randn(STEP_IMAGES, 3, 32, 32).contiguous(memory_format=memory_format)
    labels = torch.arange(STEP_IMAGES) % 10
    optimizer = torch.optim.Adam(network.parameters())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()  # untimed, since it also chooses the kernels
    return timed(lambda: [step() for _ in range(STEPS)])._replace(value=first)


def _covariances(real, fake):
    """(D, D) float64 of each set, from at most 10,000 points, since their number does not affect the root."""
    import numpy as np

    return [np.cov(points[:10_000], rowvar=False, dtype=np.float64) for points in (real, fake)]


def _features(num_images: int, passes: int) -> Timed:
    """The last of `passes` over 32-pixel images; a second one reads the cache. The value is the mean feature."""
    import numpy as np

    from data.cache import PrivateCache
    from data.spec import DataSpec
    from evaluation.features import extract
    from extractors.random_conv import RandomConvExtractor

    images = np.random.default_rng(0).integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
    extractor = RandomConvExtractor(DataSpec("bench", 32, 3, 2, 2, ("a", "b")), Path(), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        options = {"batch_size": 256, "description": "features", "cache": PrivateCache(Path(folder))}
        for _ in range(passes):
            found = timed(lambda: float(extract(extractor, images, **options).features.mean()))
    return found


OURS, SCIPY = "tr (C1 C2)^(1/2), this toolkit", "tr (C1 C2)^(1/2), scipy.linalg.sqrtm"
CASES = {
    OURS: trace_ours,
    SCIPY: trace_scipy,
    "Frechet distance, covariances included": frechet,
    "precision and recall": precision_recall,
    f"random_conv features of {MOST_IMAGES:,} images, 32 pixels": feature_pass,
    "the same again, from the cache": feature_cache,
    f"ResNet-110, {STEPS} steps of {STEP_IMAGES} images (loss of the first), channels last": train_channels_last,
    "the same, PyTorch's default layout": train_default_layout,
}


def measured(name: str, case, *size) -> dict:
    """Value, seconds and memory of one case, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, case, *size))
    process.start()
    sender.close()
    row = receiver.recv()
    process.join()
    print(
        f"{name}: {row['value']:.6g}, {row['cpu_seconds']:.1f} CPU seconds, {row['peak_mib']:,.0f} MiB",
        flush=True,
    )
    return {"name": name, **row}


def _measure(sender, case, num_images: int, dim: int, seed: int, threads: int | None) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    if threads is not None:
        torch.set_num_threads(threads)
    libraries = _peak_mib()
    with threadpool_limits(threads):
        real, fake = features(num_images, dim, seed)
        found = case(real, fake)
    inputs = (real.nbytes + fake.nbytes) / MIB
    sender.send(found._asdict() | {"peak_mib": _peak_mib(), "inputs_mib": inputs, "libraries_mib": libraries})


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def as_markdown(results: dict) -> str:
    rows = results["rows"]
    lines = [
        "# Benchmark of the evaluator",
        "",
        f"Generated by `python scripts/benchmarks/bench_eval.py`; do not edit. Two sets of {results['num_images']:,} x "
        f"{results['dim']:,} features on {results['machine']}, CPU threads: {results['threads'] or 'all'}. CPU seconds "
        "do not depend on other processes. Memory is the peak of the process, with its inputs and libraries.",
        "",
        "| case | value | seconds | CPU seconds | memory (MiB) | inputs (MiB) | libraries (MiB) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['value']:.6g} | {row['seconds']:.3f} | {row['cpu_seconds']:.3f} | "
            f"{row['peak_mib']:,.0f} | {row['inputs_mib']:,.0f} | {row['libraries_mib']:,.0f} |"
        )
    ours, other = ({row["name"]: row for row in rows}[name] for name in (OURS, SCIPY))
    ratio, difference = other["cpu_seconds"] / ours["cpu_seconds"], abs(ours["value"] / other["value"] - 1)
    lines += [
        "",
        f"The most expensive term of the Frechet distance takes {ratio:.1f} times less CPU time than with "
        f"`scipy.linalg.sqrtm`; the relative difference of the values is {difference:.1g}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_process(main)
