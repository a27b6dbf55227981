"""Where prepared data and fetched weights lie: as a flag says, else an environment variable, else a usual folder."""

import os
from pathlib import Path

from utils.text import require_utf8


def data_root(given: str | None = None) -> Path:
    """Prepared datasets: --data_root, else $DPIB_DATA_ROOT, else ./dataset."""
    return _place(given, "DPIB_DATA_ROOT", "dataset")


def weights_root(given: str | None = None) -> Path:
    """Fetched weights: --weights_root, else $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench."""
    return _place(given, "DPIB_WEIGHTS_ROOT", "~/.cache/dp-image-bench")


def _place(given: str | None, variable: str, usual: str) -> Path:
    """An empty flag or variable counts as absent; "~" is the home folder."""
    path = given or os.environ.get(variable) or usual
    require_utf8([path], f"${variable}")
    return Path(path).expanduser()
