"""Fetch the weights of a feature extractor: python scripts/prepare_weights.py --name inception"""

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.download import RemoteFile, download
from data.prepared import sha256_of
from utils.errors import UserError

# The last part of a file's name is the beginning of its SHA-256.
WEIGHTS = {
    "inception": RemoteFile(
        "weights-inception-2015-12-05-6726825d.pth",
        (
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
        ),
    ),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put the weights that a metric needs where run.py and eval.py look for them. Without --source they "
        "are downloaded from their publisher; with it, a file that you have is checked and copied."
    )
    parser.add_argument("--name", required=True, choices=sorted(WEIGHTS), help="feature extractor")
    parser.add_argument("--source", type=Path, metavar="FILE", help="the weights file, if you have it")
    default_root = os.environ.get("DPIB_WEIGHTS_ROOT") or "~/.cache/dp-image-bench"
    parser.add_argument(
        "--weights_root",
        type=Path,
        default=default_root,
        metavar="DIR",
        help="default: $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        path = prepare(WEIGHTS[arguments.name], arguments.weights_root.expanduser(), arguments.source)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: ready")
    return 0


def prepare(remote: RemoteFile, weights_root: Path, source: Path | None) -> Path:
    """The path of the checked file below `weights_root`; one that is there and intact is kept.

    A new file gets its final name only after its SHA-256 is right. Raises UserError otherwise.
    """
    target = weights_root / remote.name
    if target.is_file() and hash_matches(target, remote.name):
        return target
    incoming = weights_root / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    arrived = download(remote, incoming) if source is None else _copy(source, incoming / remote.name)
    if not hash_matches(arrived, remote.name):
        arrived.unlink()
        origin = source or remote.urls[0]
        raise UserError(
            f"{origin}: its SHA-256 does not start with {expected_hash(remote.name)}; not the published file"
        )
    arrived.replace(target)
    return target


def hash_matches(path: Path, name: str) -> bool:
    return sha256_of(path).startswith(expected_hash(name))


def expected_hash(name: str) -> str:
    """The hex digits at the end of a weights file's name."""
    return Path(name).stem.rsplit("-", 1)[-1]


def _copy(source: Path, target: Path) -> Path:
    if not source.is_file():
        raise UserError(f"--source {source}: there is no such file")
    shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    sys.exit(main())
