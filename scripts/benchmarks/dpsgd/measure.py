"""Correctness, time and peak memory of the competitors on one case."""

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from scripts.benchmarks.dpsgd.cases import Case, Problem, load
from scripts.benchmarks.dpsgd.competitors import COMPETITORS, Gradients, Step
from utils.errors import UserError

REFERENCE = "ours"
PEAK_STEPS = 2  # the first one may choose kernels
# What a competitor that cannot run a case raises; out of memory on a GPU is a RuntimeError.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    KeyError,
    IndexError,
    UserError,
)

Facts = dict[str, float | str | None]


def measure(
    case: Case, names: list[str], rounds: int, device: torch.device, autocast: torch.dtype | None
) -> tuple[dict[str, int], dict[str, Facts]]:
    """(parameter counts, name -> facts): `seconds` (median) and `relative_error` against ours, or `error`.

    The competitors take turns, in a new order every round, so that a busy moment of the machine hits all of them.
    """
    problem = load(case, device, autocast)
    facts: dict[str, Facts] = {}
    steps = prepare(problem, names, facts)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            seconds[name].append(_timed(steps[name], device))
    for name, times in seconds.items():
        facts[name]["seconds"] = statistics.median(times)
    counts = {
        "parameters": sum(p.numel() for p in problem.network.parameters()),
        "trained": sum(p.numel() for p in problem.network.parameters() if p.requires_grad),
    }
    return counts, {name: facts[name] for name in names}


def prepare(problem: Problem, names: list[str], facts: dict[str, Facts]) -> dict[str, Step]:
    """Run every competitor once and compare it with ours; returns the steps of those that can run the case."""
    steps: dict[str, Step] = {}
    reference: Gradients | None = None
    for name in sorted(names, key=lambda name: name != REFERENCE):
        try:
            step = COMPETITORS[name](problem)
            gradients = step()
        except FAILURES as error:
            facts[name] = {"error": one_line(error)}
            if problem.images.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if name == REFERENCE:
            reference = gradients
        comparable = gradients is not None and reference is not None
        facts[name] = {"relative_error": relative_error(gradients, reference) if comparable else None}
        steps[name] = step
    return steps


def relative_error(found: Gradients, reference: Gradients) -> float:
    """L2 distance over the L2 norm of the reference, all tensors together; infinite if names or shapes differ."""
    if {name: g.shape for name, g in found.items()} != {name: g.shape for name, g in reference.items()}:
        return float("inf")
    distance = sum((found[name].double() - g.double()).square().sum().item() for name, g in reference.items())
    norm = sum(g.double().square().sum().item() for g in reference.values())
    return (distance / norm) ** 0.5 if norm else float(distance > 0)


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _timed(step: Step, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------ peak memory


def peak_in_fresh_process(program: Path, case_name: str, competitor: str, options: list[str]) -> Facts:
    """`peak_bytes` of the competitor's steps, measured by `program --peak` in a process of its own; or `error`."""
    command = [sys.executable, str(program), "--peak", case_name, competitor, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {done.returncode}: {last}"[:300]}
    return json.loads(done.stdout)


def peak(case: Case, competitor: str, device: torch.device, autocast: torch.dtype | None) -> Facts:
    """`peak_bytes` of network, batch and steps; on a CPU, of this process over the imported program. Or `error`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak_bytes(device)
    problem = load(case, device, autocast)
    try:
        step = COMPETITORS[competitor](problem)
        for _ in range(PEAK_STEPS):
            step()
    except FAILURES as error:
        return {"error": one_line(error)}
    return {"peak_bytes": _peak_bytes(device) - before}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():  # macOS; ru_maxrss is in bytes there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux ru_maxrss starts from the peak of the process that launched this one; VmHWM is our own.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
