"""Reads what the user already has: recognises the layout by content and lists labelled images, not yet converted.

Layouts: MNIST-style idx files, CIFAR pickles, npz, CelebA, zip with dataset.json, class folders, flat
`<class>_<rest>` files. Folders, zips and tars are all looked into (data/trees.py).
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from data.readers.celeba import read_celeba
from data.readers.cifar import read_cifar
from data.readers.idx import IDX_NAME, read_idx
from data.readers.images import read_dataset_json, read_image_files
from data.readers.npz import read_npz, read_npz_folder
from data.readers.source import LAYOUTS, Source
from data.registry import NO_QUIRKS, SourceQuirks
from data.trees import FolderTree, open_tree
from utils.errors import UserError


def open_source(path: Path, quirks: SourceQuirks = NO_QUIRKS) -> Source:
    """Find out what lies at `path` and list its images. Image files are not opened yet."""
    source = _open_by_layout(path, quirks)
    if len(source.train) == 0 or (source.test is not None and len(source.test) == 0):
        raise UserError(f"{path}: there are no images in its training or test part")
    return source


def _open_by_layout(path: Path, quirks: SourceQuirks) -> Source:
    if path.suffix == ".npz":
        return read_npz(path)
    tree = open_tree(path)
    names = [name for name in tree.names if quirks.only_members in name]
    if not names:
        raise UserError(f"{path}: empty, there are no images in it; {LAYOUTS}")
    base_names = {PurePosixPath(name).name for name in names}
    if all(name.endswith(".npz") for name in names):
        return read_npz_folder(tree)
    if any(IDX_NAME.search(name) for name in base_names):
        return read_idx(tree, names, quirks)
    if "data_batch_1" in base_names or {"train", "test", "meta"} <= base_names:
        return read_cifar(tree, names)
    if any(name.startswith("list_attr_celeba") for name in base_names):
        return read_celeba(tree, names)
    if "dataset.json" in base_names:
        return read_dataset_json(tree, names)
    source = read_image_files(tree, names, quirks)
    empty = tree.empty_folders if isinstance(tree, FolderTree) else []
    notes = (f"no file in the folder {name}: it is no class" for name in empty)
    return replace(source, notes=(*source.notes, *notes))
