"""Where prepared data and fetched weights lie: as a flag says, else an environment variable, else a usual folder."""

import os
from pathlib import Path

from utils.errors import UserError


def data_root(given: str | None = None) -> Path:
    """Prepared datasets: --data_root, else $DPIB_DATA_ROOT, else ./dataset."""
    return _place(given, "DPIB_DATA_ROOT") or Path("dataset")


def weights_root(given: str | None = None) -> Path:
    """Fetched weights: --weights_root, else $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench; ./weights for a user
    without a home folder, as in some containers."""
    return _place(given, "DPIB_WEIGHTS_ROOT") or user_cache() or Path("weights")


def user_cache() -> Path | None:
    """The user's own folder for what can be computed again; None for a user without a home folder."""
    try:
        return Path.home() / ".cache" / "dp-image-bench"
    except RuntimeError:
        return None


def path_of(text: str, key: str) -> Path:
    """The path that `text`, the value of `key`, names; "~" and "~user" are home folders."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: {text} names the home folder of a user that is not known here") from error


def _place(given: str | None, variable: str) -> Path | None:
    """An empty flag or variable counts as absent."""
    found = os.environ.get(variable)
    if given:
        return path_of(given, "folder")
    return path_of(found, f"${variable}") if found else None
