"""External reasons for which a program ends early: a signal, a full or protected disk, too little memory."""

import contextlib
import errno
import signal
from collections.abc import Iterator

# From SLURM and other schedulers, `timeout`, `docker stop`, a machine that shuts down, a terminal that closes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, file larger than allowed
PROTECTED = (errno.EACCES, errno.EPERM, errno.EROFS)
FAILING = (errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE)
NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed", "ALLOC_FAILED")


class StoppedBySignal(KeyboardInterrupt):
    """One of STOP_SIGNALS came; `args` holds its number."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 plus the number of the signal, as a shell reports it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (stop.args[0] if isinstance(stop, StoppedBySignal) else signal.SIGINT)


_raised: list[int] = []  # the first signal that raised an exception, until the program ends


def raise_swallowed() -> None:
    """Raise StoppedBySignal again if a signal was received and the program still runs: a library has swallowed the
    exception. Training loops call this between steps."""
    if _raised:
        raise StoppedBySignal(_raised[0])


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within: the first of STOP_SIGNALS raises StoppedBySignal, and later ones do nothing (`timeout` sends two; SLURM
    sends a SIGTERM after the requested signal). An ignored signal, such as SIGHUP under nohup, stays ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def stop(number: int, _: object) -> None:
        for (
            other
        ) in handled:  # not SIG_IGN: Python complains about a signal that has come and is ignored since
            signal.signal(other, lambda *_: None)
        _raised.append(number)
        raise StoppedBySignal(number)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        _raised.clear()
        for number in handled:
            signal.signal(number, before[number])


def failure_of_storage(error: OSError) -> str | None:
    """A description of a problem with a disk or a folder, with advice; None for any other error."""
    place = error.filename or "a file"
    if error.errno in DISK_FULL:
        return f"disk full at {place} ({error.strerror}); free space"
    if error.errno in PROTECTED:
        return f"{place}: {error.strerror}; give yourself access to it, or another folder"
    return f"{place}: {error.strerror}" if error.errno in FAILING else None


def describe_shortage(error: Exception) -> str | None:
    """One line about a missing resource or right of the machine, with advice; None for any other error."""
    if isinstance(error, OSError):
        return failure_of_storage(error)
    # PyTorch has a class of its own for GPUs, and none for the CPU.
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        # The requested size is left out, because it may reveal the size of a secret sample of private images.
        return (
            "out of memory; use smaller batches (train.dp.max_physical_batch_size, gen.batch_size, "
            "eval.batch_size), a smaller network, or fewer images"
        )
    return None
