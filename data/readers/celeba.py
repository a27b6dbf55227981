"""Read CelebA in its published form: aligned images, a list of attributes and a list of parts."""

from pathlib import PurePosixPath

import numpy as np

from data.readers.source import FilePart, Source, find_one, read_one
from data.trees.opening import open_tree
from data.trees.tree import FileTree
from utils.errors import UserError
from utils.text import listed

CELEBA_LABEL = "Male"  # the one of the 40 attributes that is the label

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")


def read_celeba(tree: FileTree, names: list[str]) -> Source:
    """Aligned CelebA with one attribute as the label; official parts 0 (train) and 2 (test), 1 is unused. UserError if
    the two lists and the images do not name the same files."""
    attributes = find_one(tree, names, r"^list_attr_celeba\.(txt|csv)$")
    labels = _labels(read_one(tree, attributes), f"{tree.path}: {attributes}")
    partition = find_one(tree, names, r"^list_eval_partition\.(txt|csv)$")
    parts = _parts(read_one(tree, partition), f"{tree.path}: {partition}")
    archive = next((name for name in names if PurePosixPath(name).name == "img_align_celeba.zip"), None)
    images = tree
    if archive is not None:
        tree.opened.add(archive)
        images = open_tree(tree.path / archive)
    path_of = _images_by_name(images)
    for one, other in ((parts, labels), (labels, path_of), (path_of, parts)):
        missing = [name for name in one if name not in other]
        if missing:
            where = {id(labels): attributes, id(parts): partition, id(path_of): images.path.name}[id(other)]
            raise UserError(f"{tree.path}: {where} does not name {listed(missing)}")

    def part(code: str) -> FilePart:
        files = [name for name, found in parts.items() if found == code]
        return FilePart(
            images, [path_of[name] for name in files], np.array([labels[name] for name in files], np.int64)
        )

    unused = [path_of[name] for name, found in parts.items() if found == "1"]
    images.opened.update(unused)
    notes = [f"left out (the official validation part): {listed(unused)}"] if unused else []
    notes += images.notes if images is not tree else []
    return Source(part("0"), part("2"), notes=tuple(notes))


def _images_by_name(images: FileTree) -> dict[str, str]:
    """Base name -> path of every image."""
    found: dict[str, str] = {}
    for path in images.names:
        name = PurePosixPath(path).name
        if name.lower().endswith(_IMAGE_ENDINGS):
            if name in found:
                raise UserError(f"{images.path}: holds {found[name]} and {path}; keep one of them")
            found[name] = path
    return found


def _labels(content: bytes, where: str) -> dict[str, int]:
    """File name -> 0 or 1. A txt begins with the number of images and the names of the attributes, a csv with names."""
    lines = _lines(content, where)
    count = None
    if lines and len(lines[0][1]) == 1 and lines[0][1][0].isdecimal():
        count = int(lines.pop(0)[1][0])
    columns = lines.pop(0)[1] if lines else []
    if CELEBA_LABEL not in columns:
        raise UserError(f"{where} has no attribute '{CELEBA_LABEL}'")
    columns = columns[columns[0] == "image_id" :]
    rows = _rows(lines, len(columns), ("-1", "0", "1"), where)
    if count is not None and count != len(rows):
        raise UserError(f"{where} lists {len(rows):,} images and states {count:,}: truncated or damaged")
    column = columns.index(CELEBA_LABEL)
    return {name: int(int(values[column]) > 0) for name, values in rows.items()}


def _parts(content: bytes, where: str) -> dict[str, str]:
    """File name -> "0" (train), "1" (validation) or "2" (test)."""
    lines = _lines(content, where)
    if lines and lines[0][1][0] == "image_id":
        lines = lines[1:]
    return {name: values[0] for name, values in _rows(lines, 1, ("0", "1", "2"), where).items()}


def _lines(content: bytes, where: str) -> list[tuple[int, list[str]]]:
    """Number and fields of every line that is not empty."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not text in UTF-8 ({error.reason} at byte {error.start:,})") from error
    numbered = ((number, line.replace(",", " ").split()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, fields) for number, fields in numbered if fields]


def _rows(
    lines: list[tuple[int, list[str]]], num_values: int, allowed: tuple[str, ...], where: str
) -> dict[str, list[str]]:
    """File name -> values; every line must be whole."""
    rows: dict[str, list[str]] = {}
    for number, (name, *values) in lines:
        if (
            not name.lower().endswith(_IMAGE_ENDINGS)
            or len(values) != num_values
            or not set(values) <= {*allowed}
        ):
            raise UserError(
                f"{where}: line {number} is not a file name with {num_values} values of {', '.join(allowed)}; "
                f"it is damaged or truncated"
            )
        if name in rows:
            raise UserError(f"{where}: line {number} lists {name} again")
        rows[name] = values
    return rows
