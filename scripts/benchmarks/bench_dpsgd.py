"""Compare clipped per-example gradients with the ordinary step and with other ways to compute them.

python scripts/benchmarks/bench_dpsgd.py                          all cases on the CPU, 1 and 2 threads
python scripts/benchmarks/bench_dpsgd.py --cases 'unet28-*' --rounds 5
python scripts/benchmarks/bench_dpsgd.py --device cuda            larger cases on a GPU

Writes a JSON file, which keeps its rows of other cases, and the page docs/bench_dpsgd.md.
"""

import argparse
import fnmatch
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import opacus
import torch

from scripts.benchmarks.dpsgd.cases import CASES, Case
from scripts.benchmarks.dpsgd.competitors import COMPETITORS
from scripts.benchmarks.dpsgd.measure import measure, peak, peak_in_fresh_process
from scripts.benchmarks.dpsgd.report import merge, time_table, write_page
from utils.arguments import Parser, one_of, whole_number
from utils.errors import UserError
from utils.program import program, run_process

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": None, "bf16": torch.bfloat16}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=one_of(("cpu", "cuda")), default="cpu")
    parser.add_argument(
        "--dtype", type=one_of(tuple(DTYPES)), help="bf16: autocast (default: float32; on cuda bf16)"
    )
    parser.add_argument(
        "--threads", type=whole_number, nargs="+", metavar="N", help="default: 1 2; on cuda 1"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        help="names or patterns (default: all; on cuda: those for a GPU)",
    )
    parser.add_argument("--competitors", nargs="+", default=["*"], metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=whole_number, default=9, metavar="N", help="default: 9")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure peak memory; on a CPU in a fresh process per competitor",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: docs/results/bench_dpsgd_<device>.json"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: docs/bench_dpsgd.md")
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "COMPETITOR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bf16" if on_gpu else "float32")
    arguments.threads = arguments.threads or ([1] if on_gpu else [1, 2])
    arguments.out = arguments.out or ROOT / f"docs/results/bench_dpsgd_{arguments.device}.json"
    arguments.page = arguments.page or ROOT / "docs/bench_dpsgd.md"
    return arguments


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    check(arguments)
    if arguments.list:
        print("\n".join(description(name, case) for name, case in CASES.items()))
    elif arguments.peak:
        print(json.dumps(peak_of(arguments)))
    else:
        run(arguments)
    return 0


def check(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1:
        raise UserError(f"--rounds: {arguments.rounds} is not allowed; give at least 1")
    if min(arguments.threads) < 1:
        raise UserError(f"--threads: {min(arguments.threads)} is not allowed; give at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda is not available here; give cpu")


def run(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings(
        "ignore", message="Full backward hook is firing"
    )  # from Opacus, at the first layer
    on_gpu = arguments.device == "cuda"
    known = {name: case for name, case in CASES.items() if on_gpu or not case.gpu_only}
    names = [name for name, case in known.items() if case.gpu_only == on_gpu]
    if arguments.cases:
        names = select("--cases", arguments.cases, list(known))
    competitors = select("--competitors", arguments.competitors, list(COMPETITORS))
    prepare_backend(arguments)
    for name in names:
        chosen = [one for one in competitors if one in known[name].competitors]
        for threads in arguments.threads:
            row = measure_row(arguments, name, chosen, threads)
            merge(arguments.out, [row])
            write_page(arguments.page, arguments.out.parent)
            print(time_table([row]), flush=True)
    print(f"{arguments.out}\n{arguments.page}")


def measure_row(arguments: argparse.Namespace, name: str, competitors: list[str], threads: int) -> dict:
    """All measurements of one case at one number of threads; memory only at the first number."""
    torch.set_num_threads(threads)
    case, device, autocast = CASES[name], torch.device(arguments.device), DTYPES[arguments.dtype]
    counts, facts = measure(case, competitors, arguments.rounds, device, autocast)
    if arguments.memory and threads == arguments.threads[0]:
        options = ["--device", arguments.device, "--dtype", arguments.dtype, "--threads", str(threads)]
        for competitor in competitors:
            if device.type == "cuda":  # which counts its own memory
                found = peak(case, competitor, device, autocast)
            else:
                found = peak_in_fresh_process(Path(__file__), name, competitor, options)
            facts[competitor] |= {
                "peak_error" if key == "error" else key: value for key, value in found.items()
            }
    return {
        "case": name,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": threads,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "opacus": opacus.__version__,
        "rounds": arguments.rounds,
        "examples": case.examples,
        "rows_per_example": case.rows,
        **counts,
        "goal": {"competitor": case.goal_of, "ratio": case.goal},
        "competitors": facts,
    }


def peak_of(arguments: argparse.Namespace) -> dict:
    prepare_backend(arguments)
    torch.set_num_threads(arguments.threads[0])
    name, competitor = arguments.peak
    return peak(CASES[name], competitor, torch.device(arguments.device), DTYPES[arguments.dtype])


def prepare_backend(arguments: argparse.Namespace) -> None:
    """On a GPU, use TF32 for float32 operations and let cuDNN search for convolution kernels."""
    if arguments.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def select(flag: str, patterns: list[str], known: list[str]) -> list[str]:
    """The known names that match one of the patterns, in the order of `known`."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise UserError(f"{flag}: '{pattern}' matches nothing; known: {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def description(name: str, case: Case) -> str:
    goal = "no goal" if case.goal is None else f"goal {case.goal_of} {case.goal:.2f}"
    where = ", GPU only" if case.gpu_only else ""
    return f"{name}: {case.examples} examples x {case.rows} rows, {goal}{where}"


if __name__ == "__main__":
    run_process(main)
