"""Read local images: recognise the layout by its content and list labelled images, not yet converted.

Layouts: MNIST-style idx files, CIFAR pickles, npz, CelebA, zip with dataset.json, class folders, flat
`<class>_<rest>` files. Folders, zips and tars are searched (data/trees). Every file is used, or a note names it.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from data.labels import compose_names, lookalikes
from data.readers.celeba import read_celeba
from data.readers.cifar import read_cifar
from data.readers.idx import IDX_NAME, read_idx
from data.readers.images import read_dataset_json, read_image_files
from data.readers.npz import read_npz, read_npz_folder, read_npz_images
from data.readers.source import LAYOUTS, FilePart, Part, Source
from data.registry import NO_QUIRKS, SourceQuirks
from data.trees.folder import FolderTree
from data.trees.opening import ARCHIVE_ENDINGS, open_tree
from data.trees.tree import FileTree, is_document, left_out
from utils.errors import UserError
from utils.text import listed

_NO_PART = "no part of this layout"


def open_source(path: Path, quirks: SourceQuirks = NO_QUIRKS) -> Source:
    """Recognise the layout at `path` and list its images. Image files are not opened yet. The notes of the source name
    every file that is not used. UserError for a damaged archive and for whatever cannot be read."""
    if path.suffix.lower() == ".npz" and not path.is_dir():
        source = read_npz(path)
    else:
        source = _open_tree(path, quirks)
    if len(source.train) == 0 or (source.test is not None and len(source.test) == 0):
        raise UserError(f"{path}: there are no images in its training or test part")
    return _with_composed_names(source, path)


def open_unlabelled(path: Path) -> tuple[Part, list[str], list[str]]:
    """All images at `path`, whatever its folders are named: the images, a name for each, and notes about files that are
    not used. The labels of the part are all 0. UserError as for `open_source`."""
    if path.suffix.lower() == ".npz" and not path.is_dir():
        part = read_npz_images(path)
        return part, [str(row) for row in range(len(part))], []
    tree = _unwrapped(open_tree(path))
    names = [name for name in tree.names if not is_document(name)]
    if not names:
        raise UserError(f"{path}: empty, there are no images in it")
    documents = [name for name in tree.names if is_document(name)]
    notes = [*tree.notes, *left_out(documents, "no image")]
    part = FilePart(tree, names, np.zeros(len(names), np.int64))
    return part, names, [f"{path.name}: {note}" for note in notes]


def _open_tree(path: Path, quirks: SourceQuirks) -> Source:
    tree = _unwrapped(open_tree(path))
    names = [name for name in tree.names if quirks.only_members in name]
    images = [name for name in names if not is_document(name)]
    if not images:
        raise UserError(f"{path}: empty, there are no images in it; {LAYOUTS}")
    source = _read_layout(tree, names, images, quirks)
    notes = [
        *tree.notes,
        *left_out(_unread(tree, names, source), _NO_PART),
        *(f"no file in the folder {name}: it is not a class" for name in tree.empty_folders),
    ]
    return replace(source, notes=(*source.notes, *(f"{path.name}: {note}" for note in notes)))


def _unwrapped(tree: FileTree) -> FileTree:
    """The archive in a folder that holds a single archive and only texts besides; else the tree itself."""
    names = [name for name in tree.names if not is_document(name)]
    archives = [name for name in names if name.lower().endswith(ARCHIVE_ENDINGS)]
    if not isinstance(tree, FolderTree) or not archives or archives != names or _is_celeba(tree.names):
        return tree
    if len(archives) > 1:
        raise UserError(
            f"{tree.path}: holds several archives ({listed(archives)}); give one as --source, a test part as "
            f"--test_source"
        )
    inner = open_tree(tree.place(archives[0]))
    inner.notes += [*tree.notes, *left_out([name for name in tree.names if name not in names], _NO_PART)]
    return inner


def _is_celeba(names: list[str]) -> bool:
    return any(PurePosixPath(name).name.startswith("list_attr_celeba") for name in names)


def _read_layout(tree: FileTree, names: list[str], images: list[str], quirks: SourceQuirks) -> Source:
    """Read the tree with the reader of its layout. `images`: the names except texts and tables."""
    base_names = {PurePosixPath(name).name for name in names}
    if all(name.lower().endswith(".npz") for name in images):
        return read_npz_folder(tree, images)
    if any(IDX_NAME.search(name) for name in base_names):
        return read_idx(tree, names, quirks)
    if any(name.startswith("data_batch_") for name in base_names) or {"train", "test", "meta"} <= base_names:
        return read_cifar(tree, names)
    if _is_celeba(names):
        return read_celeba(tree, names)
    if "dataset.json" in base_names:
        return read_dataset_json(tree, names)
    return read_image_files(tree, images, quirks)


def _unread(tree: FileTree, names: list[str], source: Source) -> list[str]:
    parts = (part for part in (source.train, source.test) if isinstance(part, FilePart) and part.tree is tree)
    used = tree.opened.union(*(part.names for part in parts))
    return [name for name in names if name not in used]


# ------------------------------------------------------------------------------------------------------ class names


def _with_composed_names(source: Source, path: Path) -> Source:
    """The source with class names in one form of Unicode, so that equal names from two programs are one class."""
    parts = {"train": source.train, "test": source.test}
    notes: dict[str, None] = {}
    names: set[str] = set()
    for key, part in parts.items():
        if part is None or part.labels.dtype.kind != "U":
            continue
        labels, merged = compose_names(part.labels)
        parts[key] = replace(part, labels=labels)
        names.update(np.unique(labels).tolist())
        notes |= {f"{path.name}: the class {name} is written in two forms of Unicode; both are one class": None
                  for name in merged}  # fmt: skip
    stated = source.class_names
    if stated is not None:
        stated = tuple(compose_names(np.array(stated, str))[0].tolist())
        names.update(stated)
        twice = next((name for name in stated if stated.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two classes are named '{twice}'; each class needs a name of its own")
    notes |= {f"{path.name}: the classes {group} look alike; each is a class of its own": None
              for group in lookalikes(names)}  # fmt: skip
    return replace(source, **parts, class_names=stated, notes=(*source.notes, *notes))
