"""Weights files that carry their hash in their names."""

import shlex
from pathlib import Path

from data.prepared import sha256_of
from utils.errors import MissingWeights


def find_weights(name: str, file_name: str, weights_root: Path) -> Path:
    """The path of the weights file, if its SHA-256 starts with the hex digits at the end of its name.

    Otherwise raises MissingWeights with the command that fetches it; downloads nothing.
    """
    path = weights_root / file_name
    root = shlex.quote(str(weights_root))
    command = f"python scripts/prepare_weights.py --name {name} --weights_root {root}"
    if not path.is_file():
        raise MissingWeights(f"no weights file {path}; fetch it: {command}")
    expected, found = expected_hash(file_name), sha256_of(path)
    if not found.startswith(expected):
        raise MissingWeights(
            f"{path} is damaged: SHA-256 {found[:8]}, expected {expected}; fetch it: {command}"
        )
    return path


def expected_hash(file_name: str) -> str:
    """The first hex digits of the SHA-256, which a weights file carries at the end of its name."""
    return Path(file_name).stem.rsplit("-", 1)[-1]
