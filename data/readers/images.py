"""Image files: class folders, flat <class>_<rest> files, and files that a dataset.json lists."""

import json
import posixpath
from collections import Counter
from pathlib import PurePosixPath

import numpy as np

from data.readers.source import LAYOUTS, FilePart, Source, part_of, read_one, with_parts
from data.registry import SourceQuirks
from data.trees.tree import FileTree, is_document
from utils.errors import UserError
from utils.text import listed

_MOST_LABEL = 1 << 31  # far above any label; larger numbers do not fit into an array


def read_dataset_json(tree: FileTree, names: list[str]) -> Source:
    """The StyleGAN convention: dataset.json {"labels": [[file, integer], ...]} next to the images. If there are
    several, the folder of each names its part."""
    listings = [name for name in names if PurePosixPath(name).name == "dataset.json"]
    if len(listings) == 1:
        _require_listed(tree, names, listings)
        return Source(_listed_files(tree, names, listings[0]))
    parts = [part_of(PurePosixPath(name).parent.name) for name in listings]
    if None in parts or len(set(parts)) < len(parts) or "train" not in parts:
        raise UserError(
            f"{tree.path}: holds {', '.join(listings[:4])}; allowed: one dataset.json, or one in each of the folders "
            f"train, test and val"
        )
    _require_listed(tree, names, listings)
    found = zip(parts, listings, strict=True)
    return with_parts(tree.path, {part: _listed_files(tree, names, listing) for part, listing in found})


def _require_listed(tree: FileTree, names: list[str], listings: list[str]) -> None:
    """UserError for images outside of the folders that have a listing."""
    folders = tuple(listing.removesuffix("dataset.json") for listing in listings)
    stray = [name for name in names if not name.startswith(folders) and not is_document(name)]
    if stray:
        raise UserError(f"{tree.path}: no dataset.json lists {listed(stray)}; list every image, or remove it")


def _listed_files(tree: FileTree, names: list[str], listing: str) -> FilePart:
    """The files that one dataset.json lists, which must be all images of its folder."""
    where = f"{tree.path}: {listing}"
    folder = listing.removesuffix("dataset.json")
    try:
        entries = json.loads(read_one(tree, listing))["labels"]
        pairs = [(posixpath.normpath(folder + file.replace("\\", "/")), label) for file, label in entries]
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{where} is not valid JSON") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{where} has no list 'labels' of [file, integer] pairs") from None
    wrong = next(
        ((file, label) for file, label in pairs if type(label) is not int or abs(label) > _MOST_LABEL), None
    )
    if wrong is not None:
        raise UserError(f"{where} labels {wrong[0]} with {str(wrong[1])[:40]}; allowed: one integer, from 0")
    labels = dict(pairs)
    if len(labels) < len(pairs):
        twice = Counter(file for file, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{where} lists {twice} more than once; allowed: once, with one label")
    there = {name for name in names if name.startswith(folder) and not is_document(name)}
    missing = sorted(labels.keys() - there)
    if missing:
        raise UserError(f"{where} lists {listed(missing)}, which is missing")
    unlisted = sorted(there - labels.keys())
    if unlisted and labels:
        raise UserError(
            f"{where} does not list {listed(unlisted)}; list every image, or remove it from there"
        )
    files = sorted(labels)
    if not files:
        raise UserError(f"{where} lists no images")
    return FilePart(tree, files, np.array([labels[file] for file in files], np.int64))


def read_image_files(tree: FileTree, names: list[str], quirks: SourceQuirks) -> Source:
    """Class folders or flat <class>_<rest> files, below train/ and test/ (or val/) folders if there are such."""
    depth = _shared_depth(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = PurePosixPath(name).parts[depth:]
        groups.setdefault((part_of(parts[0]) if len(parts) > 1 else None) or "", []).append(name)
    if "train" not in groups:
        if len(groups) > 1 and "" not in groups:
            raise UserError(
                f"{tree.path}: its folders are named like the parts {' and '.join(sorted(groups))}, and none like "
                f"train; rename one, or give only one of them"
            )
        only_one_part = len(groups) == 1 and "" not in groups  # a test folder passed on its own
        return Source(_labelled_files(tree, names, depth + only_one_part, quirks))
    if "" in groups:
        raise UserError(
            f"{tree.path}: {groups[''][0]} is outside the train, val and test folders; move it into one of them, or "
            f"remove it"
        )
    found = {part: _labelled_files(tree, files, depth + 1, quirks) for part, files in groups.items()}
    return with_parts(tree.path, found)


def _shared_depth(names: list[str]) -> int:
    """How many leading folders all files share, not counting a folder that names a part (train, test, val)."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    depth = 0
    while all(len(parts) > depth for parts in folders) and len({parts[depth] for parts in folders}) == 1:
        if part_of(folders[0][depth]) is not None:
            break
        depth += 1
    return depth


def _labelled_files(tree: FileTree, names: list[str], depth: int, quirks: SourceQuirks) -> FilePart:
    """Each file's class: its folder below `depth`, or for files without one the name up to the first underscore."""
    folders = [PurePosixPath(name).parts[depth:-1] for name in names]
    if not any(folders):
        if depth and not any("_" in PurePosixPath(name).name for name in names):
            only = PurePosixPath(names[0]).parts[depth - 1]
            if quirks.one_class:
                return FilePart(tree, names, np.array([only] * len(names)))
            raise UserError(f"{tree.path}: there is one class, '{only}'; at least 2 class folders are needed")
        labels = [_class_of_flat_file(tree, name) for name in names]
    elif all(folders):
        if not quirks.nested_classes:
            _refuse_parts_as_classes(tree, folders)
        labels = ["/".join(parts[1:] or parts) if quirks.nested_classes else parts[0] for parts in folders]
    else:
        stray = names[folders.index(())]
        raise UserError(
            f"{tree.path}: {stray} is outside the class folders; move it into one of them, or remove it if it is no "
            f"image"
        )
    return FilePart(tree, names, np.array(labels))


def _refuse_parts_as_classes(tree: FileTree, folders: list[tuple[str, ...]]) -> None:
    """UserError if train_set/cat and test_set/cat would become the classes train_set and test_set."""
    tops = sorted({parts[0] for parts in folders})
    like_parts = [name for name in tops if name.casefold().startswith(("train", "test", "val"))]
    if like_parts and all(len(parts) > 1 for parts in folders):
        raise UserError(
            f"{tree.path}: holds {', '.join(tops[:4])}, each with folders in it; name the parts train, test and val, "
            f"with a folder per class in each, or rename these classes"
        )


def _class_of_flat_file(tree: FileTree, name: str) -> str:
    label, underscore, _ = PurePosixPath(name).name.partition("_")
    if not underscore or not label:
        raise UserError(f"{tree.path}: {name} is in no class folder and not named <class>_<rest>; {LAYOUTS}")
    return label
