"""Log lines for the user: on the terminal, and in <run>/stdout.txt once there is a run folder. Of several processes
only the main one logs."""

import logging
import sys
from pathlib import Path

from utils import distributed
from utils.progress import above_bars
from utils.runtime import log


class _AboveBars(logging.StreamHandler):
    """Writes a line above the progress bars that are on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        with above_bars(self.stream):
            super().emit(record)


def to_terminal() -> None:
    """Send log lines to standard output as they are."""
    logging.raiseExceptions = False  # a full disk under stdout.txt is reported once, by what fails next
    handler = _AboveBars(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: distributed.is_main())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def also_to(path: Path) -> None:
    """Append the lines to a file too, with the time."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
