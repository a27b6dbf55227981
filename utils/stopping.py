"""How a program ends before its time: Ctrl-C, SIGTERM, or a reader of its output that has gone."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT
TERMINATED = 143  # exit code after SIGTERM
UNREAD = 141  # exit code where standard error is no longer read: 128 + SIGPIPE


class Terminated(KeyboardInterrupt):
    """SIGTERM came: from SLURM, `timeout`, `docker stop`, or a machine that shuts down."""


def exit_code(stop: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within: SIGTERM raises Terminated, once; `timeout` sends it twice. Where it is ignored it stays ignored."""
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN:
        yield
        return

    def terminate(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Around a whole program: what is left for a reader that has gone (`| head`) is dropped without a complaint."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
