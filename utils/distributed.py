"""Several processes that train one model: their ranks, how they start and end, and how they communicate.

There are two ways to start them. `setup.n_gpus_per_node` and `setup.n_nodes` make run.py start the other processes of
its machine; under torchrun, which sets RANK and WORLD_SIZE, they already exist. All processes run the same program,
each on its share of the work. Only process 0, the main one, writes files and prints to the terminal. With one process,
every function here does nothing or returns its input, so that callers need no case distinction.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, TypeVar

from utils.errors import UserError
from utils.sections import SetupConfig
from utils.stopping import STOP_SIGNALS
from utils.streams import protect_standard_streams

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

T = TypeVar("T")
Program = Callable[[list[str]], object]

MEETING = timedelta(minutes=30)  # how long processes wait for each other at the start
PATIENCE = timedelta(
    days=1
)  # later: they wait while the main one computes alone; a dead one is noticed otherwise
GRACE = 5.0  # seconds by which the main process's error comes before that of another
LAST_CALL = 20.0  # seconds that the main thread has to notice by itself that a process has died
LOST = 4  # exit code of a process that ended because another one had


class LostProcess(RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1
    address: str = "127.0.0.1"  # of the machine of process 0
    port: int = 0
    is_started: bool = (
        False  # by torchrun or another run.py; else this process starts the others of its machine
    )


def _place_in_environment() -> Place | None:
    """The place that torchrun, or the run.py that started this process, has given to it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    world_size = int(os.environ["WORLD_SIZE"])
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "0")),
        is_started=True,
    )


_place = _place_in_environment() or Place()
_group = None  # the process group, between `processes` and `leave`


def determine_place(setup: SetupConfig) -> None:
    """Find out which process this is, from the environment or else from `setup`. Starts nothing."""
    global _place
    per_node, nodes = setup.n_gpus_per_node, setup.n_nodes
    on_one_machine = nodes == 1 and per_node > 1
    _place = _place_in_environment() or Place(
        rank=setup.node_rank * per_node,
        world_size=nodes * per_node,
        local_size=per_node,
        address="127.0.0.1" if on_one_machine else setup.master_address,
        port=_free_port() if on_one_machine else setup.master_port,
    )


def place() -> Place:
    return _place


def is_main() -> bool:
    return _place.rank == 0


def world_size() -> int:
    """How many processes work together at this moment: 1 before `processes` and after `leave`."""
    return 1 if _group is None else _place.world_size


# ------------------------------------------------------------------------------------------------ start and end


@contextlib.contextmanager
def processes(device: str, program: Program, argv: list[str]) -> Iterator[None]:
    """Within: all processes of the run work together; those of this machine that are not running yet run program(argv).

    `device` is what this process computes on. When the block ends without `leave`, the processes it started are
    ended; LostProcess names the one that has failed.
    """
    global _group
    if _place.world_size == 1:
        yield
        return
    _require_devices(device)
    followers = [] if _place.is_started else _start_followers(program, argv)
    ending = threading.Event()
    threading.Thread(target=_watch, args=(followers, ending), daemon=True).start()
    completed = False
    try:
        _join_group(device)
        yield
        completed = _group is None
    except LostProcess as error:
        raise LostProcess(_first_failure(followers) or str(error)) from error
    finally:
        ending.set()
        _group = None
        _end(followers, patience=60.0 if completed else 0.0)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Wrap a whole program: the main process reports its error first and ends the others before they report the same
    error. An error of another process alone is reported after a few seconds."""
    completed = False
    try:
        yield
        completed = True
    finally:
        if not completed and not is_main():
            time.sleep(GRACE)


def leave() -> None:
    """End the common work: the main process continues alone, and the others have no more work."""
    global _group
    if _group is None:
        return
    import torch.distributed as dist

    with _noticing_loss():
        dist.barrier(_group)
        dist.destroy_process_group()
    _group = None


def _require_devices(device: str) -> None:
    """Raise UserError if the processes compute on GPUs and there is less than one GPU per process."""
    import torch

    if device.startswith("cuda") and torch.cuda.device_count() < _place.local_size:
        raise UserError(
            f"setup.n_gpus_per_node: {_place.local_size} processes on this machine need a GPU each, but torch sees "
            f"{torch.cuda.device_count()}; set a smaller number, or set setup.device=cpu"
        )


def _join_group(device: str) -> None:
    """Join the process group: NCCL between GPUs, gloo for everything else."""
    global _group
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(_place.local_rank)
    if _place.world_size == _place.local_size:
        # By default gloo listens on the machine's network address, but the data that it transfers are private.
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"tcp://{_place.address}:{_place.port}",
            rank=_place.rank,
            world_size=_place.world_size,
            timeout=MEETING,
        )
        _group = dist.new_group(timeout=PATIENCE)
        # NCCL connects at its first use, and then waits MEETING for a process that is still computing alone.
        dist.all_reduce(torch.zeros(1, device=device), group=_group)
    except RuntimeError as error:
        raise UserError(
            f"setup.master_address, setup.master_port: the {_place.world_size} processes did not meet at "
            f"{_place.address}:{_place.port} ({_first_line(error)})"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_followers(program: Program, argv: list[str]) -> list[BaseProcess]:
    """The other processes of this machine, each a fresh interpreter."""
    context = multiprocessing.get_context("spawn")
    followers = []
    for local_rank in range(1, _place.local_size):
        environment = {
            "RANK": str(_place.rank + local_rank),
            "WORLD_SIZE": str(_place.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(_place.local_size),
            "MASTER_ADDR": _place.address,
            "MASTER_PORT": str(_place.port),
        }
        name = f"process {_place.rank + local_rank} of {_place.world_size}"
        follower = context.Process(target=_follow, args=(program, argv, environment), name=name)
        follower.start()
        followers.append(follower)
    return followers


def _follow(program: Program, argv: list[str], environment: dict[str, str]) -> None:
    """The main function of a process that this module starts."""
    global _place
    # These signals may reach all processes; the process that started this one handles them.
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    protect_standard_streams()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    _place = _place_in_environment()
    sys.exit(program(argv))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(LOST)


def _watch(followers: list[BaseProcess], ending: threading.Event) -> None:
    """End this process if another one has died and the main thread does not notice because it waits for that one."""
    alive = list(followers)
    while alive and not any(follower.exitcode for follower in followers):
        multiprocessing.connection.wait([follower.sentinel for follower in alive])
        alive = [follower for follower in alive if follower.exitcode is None]
    if not any(follower.exitcode for follower in followers) or ending.wait(LAST_CALL):
        return
    print(f"error: {_first_failure(followers)}", file=sys.stderr, flush=True)
    _end(followers, patience=0.0)
    os._exit(1)


def _first_failure(followers: list[BaseProcess]) -> str | None:
    """The name of the started process that failed, and how it failed; None if none fails within some seconds."""
    deadline = time.monotonic() + 2 * GRACE
    while followers and time.monotonic() < deadline:
        for follower in followers:
            if follower.exitcode not in (None, 0, LOST):
                killed = f"was killed by signal {-follower.exitcode}"
                return f"{follower.name} {killed if follower.exitcode < 0 else 'failed; its error is above'}"
        time.sleep(0.1)
    return None


def _end(followers: list[BaseProcess], patience: float) -> None:
    """Wait `patience` seconds for each, then end it."""
    for follower in followers:
        follower.join(patience)
        follower.kill()
    for follower in followers:
        follower.join(GRACE)


# ------------------------------------------------------------------------------------------------ shares


def share(count: int) -> slice:
    """This process's part of `count` positions: contiguous, ordered like the processes, nearly equal, maybe empty. The
    main process's part is empty only if all parts are."""
    if _group is None:
        return slice(0, count)
    return slice(*(-(-count * border // _place.world_size) for border in (_place.rank, _place.rank + 1)))


# ------------------------------------------------------------------------------------------------ collectives
# Every process must call these in the same order.


@contextlib.contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no error of its own
        raise LostProcess(
            f"process {_place.rank} lost contact with the others ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def from_main(compute: Callable[[], T]) -> T:
    """Return the main process's compute() in every process; the others do not call it. The value is pickled, so it must
    not contain a tensor on a GPU."""
    value = compute() if is_main() else None
    if _group is None:
        return value
    import torch
    import torch.distributed as dist

    box = [value]
    with _noticing_loss():
        dist.broadcast_object_list(box, 0, _group, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def main_goes_first() -> Iterator[None]:
    """The main process runs the block first, and then the others run it, so that they find what it has written."""
    if not is_main():
        from_main(bool)
    yield
    if is_main():
        from_main(bool)


def copy_from_main(tensors: "Iterable[Tensor]") -> None:
    """Overwrite each of `tensors` with the main process's."""
    if _group is None:
        return
    import torch.distributed as dist

    with _noticing_loss():
        for tensor in tensors:
            dist.broadcast(tensor, 0, _group)


def sum_on_main(part: "Tensor", release: "Callable[[Tensor], Tensor]") -> "Tensor":
    """release(sum of all parts), computed by the main process alone and handed to every process.

    part: one tensor of the same shape and dtype in every process; release gives float32 of that shape. This is how a
    private sum becomes public: noise is drawn once, all get the same bits, and only the main process sees the sum
    itself; the others see their own part and what is released.
    """
    if _group is None:
        return release(part)
    import torch
    import torch.distributed as dist

    with _noticing_loss():
        # In the other processes, the reduction may leave partial sums in `total`; nothing reads them.
        total = part.clone()
        dist.reduce(total, 0, group=_group)
    released = release(total) if is_main() else torch.empty_like(part, dtype=torch.float32)
    with _noticing_loss():
        dist.broadcast(released, 0, _group)
    return released


def sum_gradients(parameters: "Iterable[Parameter]") -> None:
    """Replace every gradient by its sum over all processes, in one message; a missing one counts as zero."""
    if _group is None:
        return
    import torch
    import torch.distributed as dist

    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.flatten() for part in parts])
    with _noticing_loss():
        dist.all_reduce(flat, group=_group)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter)


def concatenate(rows: "Tensor") -> "Tensor":
    """(n, ...) of each process -> all rows in the order of the processes, in every process. n may differ, and be 0."""
    if _group is None:
        return rows
    import torch
    import torch.distributed as dist

    counts = [0] * _place.world_size
    with _noticing_loss():
        dist.all_gather_object(counts, len(rows), _group)
        parts = [rows.new_empty((count, *rows.shape[1:])) for count in counts]
        parts[_place.rank] = rows.contiguous()
        for source, part in enumerate(parts):
            if len(part):
                dist.broadcast(part, source, _group)
    return torch.cat(parts)
