"""Folders of prepared data and weights: from a flag, else an environment variable, else a default."""

import os
from pathlib import Path

from utils.errors import UserError
from utils.text import require_utf8


def data_root(given: str | None = None) -> Path:
    """Prepared datasets: --data_root, else $DPIB_DATA_ROOT, else ./dataset."""
    return _place(given, "DPIB_DATA_ROOT") or Path("dataset")


def weights_root(given: str | None = None) -> Path:
    """Fetched weights: --weights_root, else $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench; ./weights for a user
    without a home folder, as in some containers."""
    return _place(given, "DPIB_WEIGHTS_ROOT") or user_cache() or Path("weights")


def user_cache() -> Path | None:
    """The user's cache folder; None for a user without a home folder."""
    try:
        return Path.home() / ".cache" / "dp-image-bench"
    except RuntimeError:
        return None


def path_of(text: str, key: str) -> Path:
    """The value `text` of `key` as a path; "~" and "~user" are expanded to home folders."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: {text} names the home folder of an unknown user") from error


def _place(given: str | None, variable: str) -> Path | None:
    """The folder of a flag or an environment variable; None if both are empty or missing."""
    found = os.environ.get(variable)
    require_utf8([given or found or ""], f"${variable}")
    if given:
        return path_of(given, "folder")
    return path_of(found, f"${variable}") if found else None
