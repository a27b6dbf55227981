"""CelebA as it is published: aligned images, a list of attributes and a list of parts."""

from pathlib import PurePosixPath

import numpy as np

from data.readers.source import FilePart, Source, find_one, read_one
from data.trees import FileTree, open_tree
from utils.errors import UserError

CELEBA_LABEL = "Male"  # of CelebA's 40 attributes the one that is the label


def read_celeba(tree: FileTree, names: list[str]) -> Source:
    """Aligned CelebA with one attribute as the label; official parts 0 (train) and 2 (test), 1 is unused."""
    labels = _celeba_labels(tree, names)
    partition = _celeba_rows(read_one(tree, find_one(tree, names, r"^list_eval_partition\.(txt|csv)$")))
    archive = next((name for name in names if PurePosixPath(name).name == "img_align_celeba.zip"), None)
    images = tree if archive is None else open_tree(tree.path / archive)
    path_of = {
        PurePosixPath(name).name: name for name in images.names if name.lower().endswith((".jpg", ".png"))
    }

    def part(code: str) -> FilePart:
        files = [file for file, fields in partition.items() if fields[-1] == code]
        missing = next((file for file in files if file not in path_of or file not in labels), None)
        if missing is not None:
            raise UserError(f"{images.path}: lacks the image {missing}, or list_attr_celeba its attributes")
        return FilePart(
            images, [path_of[file] for file in files], np.array([labels[file] for file in files], np.int64)
        )

    return Source(part("0"), part("2"))


def _celeba_labels(tree: FileTree, names: list[str]) -> dict[str, int]:
    name = find_one(tree, names, r"^list_attr_celeba\.(txt|csv)$")
    content = read_one(tree, name)
    header = next(
        (line for line in content.decode().splitlines() if CELEBA_LABEL in line.replace(",", " ").split()), ""
    )
    columns = header.replace(",", " ").split()
    if CELEBA_LABEL not in columns:
        raise UserError(f"{tree.path}: {name} has no attribute '{CELEBA_LABEL}'")
    # Counted from the end: the txt header does not name the first column, the csv header does.
    column = columns.index(CELEBA_LABEL) - len(columns)
    return {file: int(int(fields[column]) > 0) for file, fields in _celeba_rows(content).items()}


def _celeba_rows(content: bytes) -> dict[str, list[str]]:
    """File name -> the other fields of its line; header lines are skipped."""
    rows = (line.replace(",", " ").split() for line in content.decode().splitlines())
    return {row[0]: row[1:] for row in rows if row and row[0].lower().endswith((".jpg", ".png"))}
