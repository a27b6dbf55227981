"""Time and memory of the metrics that cost most: python scripts/bench_eval.py --markdown docs/bench_eval.md

Side by side, in processes of their own: the Frechet distance as the toolkit computes it and by scipy.linalg.sqrtm, and
precision and recall, whose distances do not fit into memory at once. Also what the cache of features saves.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIB = 2**20


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=50_000, help="images in each of the two sets")
    parser.add_argument("--dim", type=int, default=2048, help="features of an image")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
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
    return [
        np.maximum(rng.standard_normal((num_images, dim), dtype=np.float32) @ mixing + shift, 0)
        for shift in (0, 0.05)
    ]


def frechet_ours(real, fake):
    from evaluation.metrics.fid import frechet_distance

    return frechet_distance(real, fake)


def frechet_sqrtm(real, fake):
    """The usual way: means and covariances by NumPy, then scipy.linalg.sqrtm of their product."""
    import numpy as np
    from scipy.linalg import sqrtm

    means = [features.mean(axis=0, dtype=np.float64) for features in (real, fake)]
    covariances = [np.cov(features, rowvar=False, dtype=np.float64) for features in (real, fake)]
    root = sqrtm(covariances[0] @ covariances[1])
    return float(
        ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    )


def precision_recall(real, fake):
    from evaluation.metrics.precision_recall import precision_recall

    return precision_recall(real, fake)["precision"]


def first_pass(real, fake):
    """Features of images by random_conv, without and with a cache that has them; returns the time of the second."""
    import numpy as np

    from data.spec import DataSpec
    from evaluation.features import RandomConvExtractor, extract

    images = np.random.default_rng(0).integers(0, 256, (len(real), 3, 32, 32), dtype=np.uint8)
    extractor = RandomConvExtractor(DataSpec("bench", 32, 3, 2, 2, ("a", "b")), Path(), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            start = time.perf_counter()
            extract(extractor, images, batch_size=256, description="features", cache_dir=Path(folder))
            taken = time.perf_counter() - start
    return taken


CASES = {
    "Frechet distance": frechet_ours,
    "Frechet distance, scipy.linalg.sqrtm": frechet_sqrtm,
    "precision and recall": precision_recall,
    "random_conv features of 32 px images (value: seconds from the cache)": first_pass,
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
    return {"name": name, **row}


def _measure(sender, case, num_images: int, dim: int, seed: int, threads: int | None) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    if threads is not None:
        torch.set_num_threads(threads)
    with threadpool_limits(threads):
        real, fake = features(num_images, dim, seed)
        start = time.perf_counter()
        value = case(real, fake)
        seconds = time.perf_counter() - start
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    inputs = real.nbytes + fake.nbytes
    sender.send({"value": value, "seconds": seconds, "peak_mib": peak / MIB, "inputs_mib": inputs / MIB})


def as_markdown(results: dict) -> str:
    rows = results["rows"]
    threads = results["threads"] or "all"
    lines = [
        "# Benchmark of the evaluator",
        "",
        f"Two sets of {results['num_images']:,} x {results['dim']:,} features, {results['machine']}, {threads} CPU threads. "
        "Memory is the highest of the process, inputs and libraries included. Written by `scripts/bench_eval.py`.",
        "",
        "| case | value | seconds | memory (MiB) | of it inputs (MiB) |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['name']} | {row['value']:.6g} | {row['seconds']:.2f} | {row['peak_mib']:,.0f} | {row['inputs_mib']:,.0f} |"
        for row in rows
    ]
    ours, other = rows[0], rows[1]
    lines += [
        "",
        f"The Frechet distance is {other['seconds'] / ours['seconds']:.1f} times faster than by `scipy.linalg.sqrtm`, and "
        f"differs from it by {abs(ours['value'] / other['value'] - 1):.1g} of its value.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
