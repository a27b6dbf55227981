"""Download a dataset, or convert your own, to the prepared format:

    python scripts/prepare_data.py --data_name mnist_28

--forget NAME removes a prepared set, with its private cache and all copies.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.forget import forget
from data.odd_classes import counts_line
from data.prepare import prepare
from data.prepared import PreparedMeta, read_labels
from data.registry import Facts, canonical_name, known_names, known_set
from utils.arguments import Parser, whole_number
from utils.config_files import CONFIG_FOLDER, read_yaml
from utils.errors import UserError
from utils.places import data_root
from utils.program import program, run_process

# Arguments of a preparation, which --forget does not take.
FORGET_EXCLUDES = (
    "source", "test_source", "class_names", "resolution", "channels", "public", "force", "groups", "images_per_person",
)  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Convert a dataset to the form that run.py reads. Without --source the published files are "
        "downloaded; with it, the given images are converted, whatever their layout (docs/datasets.md).",
        epilog=f"Known names: {', '.join(known_names())}. Any other name is a set of your own and needs --source.",
    )
    parser.add_argument("--data_name", metavar="NAME", help="a known name, or a name for your own set")
    parser.add_argument(
        "--forget", metavar="NAME", help="remove this prepared set, its private cache, copies and downloads"
    )
    parser.add_argument(
        "--data_root",
        type=data_root,
        default=data_root(),
        metavar="DIR",
        help="default: $DPIB_DATA_ROOT or dataset",
    )
    add_source_arguments(parser)
    add_group_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace a prepared set of this name")
    parser.add_argument(
        "--exp_root",
        type=Path,
        metavar="DIR",
        help="with --forget: where to look for runs, which are listed and not removed (default: exp)",
    )
    arguments = parser.parse_args(argv)
    check_combination(arguments)
    return arguments


def add_source_arguments(parser: Parser) -> None:
    """Where the images are, and what they are converted to."""
    parser.add_argument("--source", type=Path, metavar="PATH", help="folder, npz, zip or tar of your images")
    parser.add_argument("--test_source", type=Path, metavar="PATH", help="test part, if it is separate")
    parser.add_argument(
        "--resolution",
        type=whole_number,
        metavar="R",
        help="pixels; own and public sets only (default of an own set: 32)",
    )
    parser.add_argument(
        "--channels", type=whole_number, metavar="C", help="1 grey, 3 RGB; own and public sets only"
    )
    parser.add_argument(
        "--class_names",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        metavar="A,B",
        help="names of the labels 0, 1, ... of a source that has numbers only, such as an npz",
    )
    parser.add_argument(
        "--public", action="store_true", help="a public set of your own: no test part is split off"
    )


def add_group_arguments(parser: Parser) -> None:
    """Which images belong together, and how many at most."""
    parser.add_argument(
        "--groups",
        metavar="HOW",
        help="keep images that belong together, such as a patient's, on one side of every split: 'folder' for "
        "<class>/<patient>/<file>, <file>.csv:<column>, or a regular expression on the path with the group in "
        "parentheses",
    )
    parser.add_argument(
        "--images_per_person",
        type=whole_number,
        metavar="K",
        help="with --groups: no group has more images; the privacy card states what this means for a person",
    )


def check_combination(arguments: argparse.Namespace) -> None:
    """Refuse arguments of a preparation next to --forget, and those of --forget without it."""
    if (arguments.forget is None) == (arguments.data_name is None):
        raise UserError("give either --data_name NAME, to prepare a set, or --forget NAME, to remove one")
    if arguments.forget is not None:
        for flag in FORGET_EXCLUDES:
            if getattr(arguments, flag) not in (None, False):
                raise UserError(f"--{flag}: is not used with --forget; remove it")
    elif arguments.exp_root is not None:
        raise UserError("--exp_root: is used only with --forget; remove it")


def facts_of(data_name: str) -> Facts | None:
    """What configs/data states about a published sensitive set; None for any other name."""
    known = known_set(canonical_name(data_name))
    if known is None or known.public:
        return None
    section = read_yaml(CONFIG_FOLDER / "data" / f"{known.name}.yaml")
    return Facts(section["resolution"], section["num_channels"], tuple(section["class_names"]))


@program
def main(argv: list[str]) -> int:
    arguments = vars(parse_arguments(argv))
    forgotten, exp_root = arguments.pop("forget"), arguments.pop("exp_root")
    try:
        if forgotten is not None:
            for line in forget(forgotten, arguments["data_root"], exp_root or Path("exp")):
                print(line)
            return 0
        folder, meta, notes = prepare(**arguments, facts=facts_of(arguments["data_name"]))
    except KeyboardInterrupt:
        advice = (
            "no prepared set was written" if forgotten is None else "repeat the command to remove the rest"
        )
        print(f"\n{advice}", file=sys.stderr)
        raise
    for note in notes:
        print(note)
    print(
        f"{folder}: {meta.num_train:,} training and {meta.num_test:,} test images, {len(meta.class_names)} classes, "
        f"{meta.resolution}x{meta.resolution}, {'grey' if meta.channels == 1 else 'RGB'}"
    )
    if known_set(meta.name) is None:
        print(counts_line(*read_labels(folder, meta), meta.class_names))
        print(usage_line(folder, meta, arguments["public"], data_root()))
    return 0


def usage_line(folder: Path, meta: PreparedMeta, public: bool, usual_root: Path) -> str:
    """The command that runs a method on a custom set."""
    if public:
        return f"use it: python run.py ... public_data.name={meta.name} public_data.train_path={folder}"
    place = "" if folder.parent == usual_root else f" --data_root {folder.parent}"
    return f"use it: python run.py --data_name {meta.name}{place} ..."


if __name__ == "__main__":
    run_process(main)
