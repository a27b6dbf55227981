"""Time a critic step of GS-WGAN's warm-up.

python scripts/benchmarks/bench_gs_wgan.py --markdown docs/bench_gs_wgan.md

Compares critics trained as one program (models/nn/stack.py) with the same critics trained one by one as plain modules.
The two take turns, so that other load slows both. Reports medians of CPU time (on a GPU: wall time) per critic step.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.arguments import Parser, whole_number
from utils.program import program, run_process

GOAL = 20  # times faster than one by one


@dataclass(frozen=True)
class Case:
    name: str
    image_size: int
    channels: int
    d_conv_dim: int
    batch_size: int
    stacks: tuple[int, ...]  # critics at once


CASES = (
    Case("preset=quick, digits_8", 8, 1, 8, 8, (10, 100)),
    Case("published, mnist_28", 28, 1, 64, 32, (4, 16)),
    Case("published, cifar10_32", 32, 3, 64, 32, (4,)),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=whole_number, default=5, help="turns per way")
    parser.add_argument("--threads", type=whole_number, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--stack", type=whole_number, help="critics at once, in all cases")
    parser.add_argument("--case", help="only the cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table to FILE")
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="add the rows of these files of --json",
    )
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    import torch

    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for case in CASES:
        if arguments.case and arguments.case not in case.name:
            continue
        for count in (arguments.stack,) if arguments.stack else case.stacks:
            rows.append(measured(case, count, arguments.repeats, arguments.device))
            print(row_of(rows[-1]), flush=True)
    results = {
        "machine": machine(arguments.device), "threads": arguments.threads, "device": arguments.device,
        "repeats": arguments.repeats, "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        every = [results, *(json.loads(path.read_text(encoding="utf-8")) for path in arguments.beside)]
        arguments.markdown.write_text(as_markdown(every), encoding="utf-8")
    return 0


def machine(device: str) -> str:
    import torch

    return platform.machine() if device == "cpu" else torch.cuda.get_device_name()


def measured(case: Case, count: int, repeats: int, device: str) -> dict:
    """Median milliseconds per critic step of both ways, and the relative difference of their weights."""
    import torch

    steps, weights = both_ways(case, count, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):  # the first also allocates and chooses kernels
        for name, step in steps.items():
            seconds = timed(step, turn, device)
            if turn:
                times[name].append(1e3 * seconds / count)
    stacked, alone = weights()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [one / both for one, both in zip(times["one by one"], times["stacked"], strict=True)]
    return {
        "case": case.name,
        "critics": count,
        **medians,
        "ratio": statistics.median(ratios),
        "difference": float((stacked - alone).norm() / torch.linalg.vector_norm(alone)),
    }


def both_ways(case: Case, count: int, device: str):
    """({name: step of all critics on the same images}, a function that returns the weights of both ways)."""
    import torch

    from models.nn.shard_critics import CriticLoss
    from models.nn.sn_gan import ConvCritic
    from models.nn.stack import Stack
    from utils.draws import Draws

    torch.manual_seed(0)
    loss = CriticLoss(L_gp=10.0, L_epsilon=1e-3, lr=1e-4)
    shape = (case.image_size, case.channels, 10, case.d_conv_dim)
    networks = [ConvCritic(*shape).to(device) for _ in range(count)]
    stack = Stack.copies(ConvCritic(*shape).to(device), count)
    for position, network in enumerate(networks):
        stack.put(position, Stack.copies(network, 1))
        network.requires_grad_(True)
    size = (count, case.batch_size, case.channels, case.image_size, case.image_size)
    real, fake = torch.rand(size, device=device), torch.rand(size, device=device)
    labels = torch.randint(0, 10, size[:2], device=device)
    filled = torch.ones(count, device=device)
    optimizer = loss.optimizer(stack.parameters())
    optimizers = [loss.optimizer(network.parameters()) for network in networks]

    def stacked(turn: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        draws = Draws(str(turn).encode().ljust(32), 0, count, device)
        loss(stack, real, fake, labels, filled, draws).backward()
        optimizer.step()

    def one_by_one(turn: int) -> None:
        for i, network in enumerate(networks):
            part = slice(i, i + 1)

            def alone(images, classes, network=network):
                return network(images[0], classes[0])[None]

            optimizers[i].zero_grad(set_to_none=True)
            draws = Draws(str(turn).encode().ljust(32), i, i + 1, device)
            loss(alone, real[part], fake[part], labels[part], filled[part], draws).backward()
            optimizers[i].step()

    def weights() -> tuple[torch.Tensor, torch.Tensor]:
        plain = torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])
        names = [name for name, _ in networks[0].named_parameters()]
        rows = [torch.cat([state[name].flatten() for name in names]) for state in stack]
        return torch.cat(rows), plain

    return {"stacked": stacked, "one by one": one_by_one}, weights


def timed(step, turn: int, device: str) -> float:
    """Seconds of one step of all critics: CPU time, or wall time on a GPU."""
    if device == "cpu":
        start = time.process_time()
        step(turn)
        return time.process_time() - start
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    step(turn)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def row_of(row: dict) -> str:
    return (
        f"| {row['case']} | {row['critics']} | {row['stacked']:.3f} | {row['one by one']:.3f} | {row['ratio']:.2f} | "
        f"{row['difference']:.1g} |"
    )


def as_markdown(every: list[dict]) -> str:
    lines = [
        "# Benchmark of GS-WGAN's critics",
        "",
        "Generated by `python scripts/benchmarks/bench_gs_wgan.py`; do not edit. A step is one update of one critic on "
        "a batch, with the gradient penalty and without generating the fakes. The two ways take turns; times are "
        "medians, the ratio is the median of the ratios per turn. The last column is the relative difference of the "
        "weights of both ways at the end. "
        f"Goal: {GOAL} times faster.",
        "",
    ]
    for results in every:
        clock = "CPU time" if results["device"] == "cpu" else "wall time"
        lines += [
            f"## {results['machine']}, torch {results['torch']}",
            "",
            f"CPU threads: {results['threads']}; {results['repeats']} turns; {clock}.",
            "",
            "| critics | at once | stacked (ms) | one by one (ms) | times faster | difference |",
            "|---|---:|---:|---:|---:|---:|",
            *(row_of(row) for row in results["rows"]),
            "",
            verdict(results),
            "",
        ]
    return "\n".join(lines)


def verdict(results: dict) -> str:
    met = [row for row in results["rows"] if row["ratio"] >= GOAL]
    if len(met) == len(results["rows"]):
        return "The goal is met."
    where = f"The goal is met by {len(met)} of {len(results['rows'])} cases. "
    return where + (
        "Stacking saves the overhead of small operations, but no arithmetic. If one critic already keeps the device "
        "busy, as a critic of the published size does on a CPU, there is no gain."
    )


if __name__ == "__main__":
    run_process(main)
