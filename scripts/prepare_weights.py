"""Fetch the weights that a metric needs: python scripts/prepare_weights.py --name inception"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.download import RemoteFile, download
from data.prepared import sha256_of
from evaluation.metrics import image_reward
from extractors.inception import INCEPTION_WEIGHTS
from extractors.vision_transformer import WEIGHTS_FILES, ClipExtractor, Dinov2Extractor
from extractors.weights import expected_hash
from utils import places
from utils.arguments import Parser, one_of
from utils.errors import UserError
from utils.program import program, run_process

DIGESTS = "SHA256SUMS"  # next to files of the hub: their digests when they were downloaded


@dataclass(frozen=True)
class HubFiles:
    """Files of a repository of the Hugging Face hub; of alternatives, the first that exists."""

    repository: str
    folder: str  # below the weights root
    files: tuple[tuple[str, ...], ...]


def of_transformers(extractor) -> HubFiles:
    return HubFiles(extractor.SOURCE, extractor.SOURCE.rpartition("/")[2], (("config.json",), WEIGHTS_FILES))


WEIGHTS = {
    "inception": RemoteFile(
        INCEPTION_WEIGHTS,
        (f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_WEIGHTS}",),
    ),
    "dinov2": of_transformers(Dinov2Extractor),
    "clip": of_transformers(ClipExtractor),
    "image_reward": HubFiles(
        image_reward.SOURCE, "image-reward", tuple((name,) for name in image_reward.FILES)
    ),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Store the weights that a metric needs where run.py and eval.py read them. Without --source, "
        "download them from their publisher; with it, check and copy your own file."
    )
    parser.add_argument(
        "--name",
        required=True,
        type=one_of(sorted(WEIGHTS)),
        metavar="NAME",
        help=f"the extractor or metric that needs the weights: {', '.join(sorted(WEIGHTS))}",
    )
    parser.add_argument(
        "--source", type=Path, metavar="PATH", help="your copy of the file, or of the folder of files"
    )
    parser.add_argument(
        "--weights_root",
        type=places.weights_root,
        default=places.weights_root(),
        metavar="DIR",
        help="default: $DPIB_WEIGHTS_ROOT, else ~/.cache/dp-image-bench",
    )
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    wanted, root = WEIGHTS[arguments.name], arguments.weights_root
    get = prepare if isinstance(wanted, RemoteFile) else prepare_hub
    path = get(wanted, root, arguments.source)
    print(f"{path}: ready")
    return 0


def prepare(remote: RemoteFile, weights_root: Path, source: Path | None) -> Path:
    """The path of the checked file below `weights_root`; an existing intact file is kept.

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


def prepare_hub(wanted: HubFiles, weights_root: Path, source: Path | None) -> Path:
    """The folder of the files below `weights_root`, downloaded from the hub or copied from the folder `source`.

    The hub publishes no digests: those of the downloaded files are written to SHA256SUMS, and existing files are
    checked against it. Raises UserError for a file that is missing or has changed.
    """
    folder = weights_root / wanted.folder
    sums = folder / DIGESTS
    if sums.is_file():
        for line in sums.read_text().splitlines():
            digest, _, name = line.partition("  ")
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                raise UserError(
                    f"{folder / name}: is not what was fetched; remove {folder} and fetch it again"
                )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = _from_hub(wanted, folder) if source is None else _from_folder(wanted, source, folder)
    sums.write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names))
    return folder


def _from_hub(wanted: HubFiles, folder: Path) -> list[str]:
    try:
        from huggingface_hub import hf_hub_download, list_repo_files
    except ImportError as error:
        raise UserError(
            f"the package huggingface_hub cannot be imported ({error}); install it: pip install huggingface_hub"
        ) from error
    try:
        names = _chosen(wanted, set(list_repo_files(wanted.repository)), wanted.repository)
        for name in names:
            hf_hub_download(wanted.repository, name, local_dir=folder)
    except OSError as error:  # what the package raises without a network, too
        reason = " ".join(str(error).split())
        raise UserError(
            f"{wanted.repository}: cannot be fetched from the hub ({reason}); fetch its files by other means and give "
            f"their folder as --source"
        ) from error
    return names


def _from_folder(wanted: HubFiles, source: Path, folder: Path) -> list[str]:
    names = _chosen(wanted, {path.name for path in source.glob("*")}, str(source))
    for name in names:
        _copy(source / name, folder / name)
    return names


def _chosen(wanted: HubFiles, there: set[str], place: str) -> list[str]:
    names = []
    for alternatives in wanted.files:
        found = [name for name in alternatives if name in there]
        if not found:
            raise UserError(f"{place}: has no {' and no '.join(alternatives)}")
        names.append(found[0])
    return names


def hash_matches(path: Path, name: str) -> bool:
    return sha256_of(path).startswith(expected_hash(name))


def _copy(source: Path, target: Path) -> Path:
    if not source.is_file():
        raise UserError(f"--source {source}: there is no such file")
    shutil.copyfile(source, target)
    return target


if __name__ == "__main__":
    run_process(main)
