"""Load public data at the shape of the private data. Converted copies are kept in the public cache."""

import hashlib
import re
from pathlib import Path

import numpy as np

from data.cache import CACHE_NAME, public_cache
from data.convert import resized, to_channels
from data.locations import has_public_images, is_in_distribution, public_folders
from data.prepare import Target, convert_source
from data.prepared import Prepared, is_prepared, new_prepared, read_meta, read_prepared, sha256_of
from data.readers.layouts import open_source
from data.registry import EMBEDDED_PUBLIC, prepare_command
from data.spec import DataSpec, PublicData, Samples
from data.trees.folder import FolderTree
from utils.errors import UserError
from utils.memory import require_memory
from utils.progress import progress
from utils.runtime import log
from utils.sections import PublicSetConfig

GLYPH_SEED = 0  # the public set is the same in every run
ROWS_AT_ONCE = 4096  # converted at a time
# A class name that stands for a letter or digit.
_CHARACTER = re.compile(
    r"(digit|letter|character|number)?[\s_-]*\w{1,2}|zero|one|two|three|four|five|six|seven|eight|nine",
    re.IGNORECASE,
)
CONVERSION_VERSION = 2  # part of every cache key: increase it when converted pixels change


def load_public(section: PublicSetConfig, spec: DataSpec, data_root: Path) -> PublicData | None:
    """The public set with images (N, C, H, W) uint8 of the spec's shape, or None if there are no public images.

    Grey is made with PIL's "L" weights, RGB from grey by repetition; resizing is antialiased. UserError if the set is
    missing (with the command that prepares it) or does not have public_data.n_classes classes.
    """
    if not has_public_images(section):
        return None
    require_public(section, data_root)
    num_public_classes(section, data_root)  # checks the number of classes before long work
    load = _load_glyphs if section.name in EMBEDDED_PUBLIC else _load_stored
    return load(section, spec, data_root)


def misfit(section: PublicSetConfig, spec: DataSpec, data_root: Path) -> str | None:
    """One line if names and numbers indicate that the public set is of another kind than the private images."""
    if not has_public_images(section) or is_in_distribution(section):
        return None
    reasons = []
    if section.name in EMBEDDED_PUBLIC:
        channels = 1
        strange = [name for name in spec.class_names if not _CHARACTER.fullmatch(name)]
        if strange:
            reasons.append(f"it has letters and digits; the private class '{strange[0]}' is not a character")
    else:
        stored = public_folders(section, data_root)
        channels = read_meta(stored[0]).channels if stored else spec.channels
    if channels != spec.channels:
        kinds = {1: "grey", 3: "in colour"}
        reasons.append(f"it is {kinds[channels]}, the private images are {kinds[spec.channels]}")
    if not reasons:
        return None
    return (
        f"public_data.name={section.name} may fit badly: {'; '.join(reasons)}. Pretraining helps on images of the same "
        f"kind: give public_data.name=<such a set>, or a method that needs none, such as --method DP-MERF"
    )


def require_public(section: PublicSetConfig, data_root: Path) -> None:
    """Raise UserError, with the command that helps, if public images are missing. Opens no image."""
    if (
        not has_public_images(section)
        or is_in_distribution(section)
        or section.name in EMBEDDED_PUBLIC
        or public_folders(section, data_root)
    ):
        return
    if section.train_path is None:
        command = prepare_command(section.name, data_root)
        raise UserError(
            f"public_data.name: '{section.name}' is not prepared ({data_root / section.name}); run: {command}"
        )
    if not Path(section.train_path).exists():
        raise UserError(f"public_data.train_path: {section.train_path} does not exist")


def num_public_images(section: PublicSetConfig, data_root: Path) -> int | None:
    """About how many public images there are, without decoding one; None if there are none, or not yet."""
    if not has_public_images(section):
        return None
    per_class = section.per_class
    if section.name in EMBEDDED_PUBLIC:
        from data.glyphs import DEFAULT_PER_CLASS

        return num_public_classes(section, data_root) * (
            DEFAULT_PER_CLASS if per_class is None else per_class
        )
    stored = public_folders(section, data_root)
    if stored:
        count = read_meta(stored[0]).num_train
    elif section.train_path is not None and Path(section.train_path).exists():
        count = len(open_source(Path(section.train_path)).train)
    else:
        return None
    return count if per_class is None else min(count, per_class * num_public_classes(section, data_root))


def num_public_classes(section: PublicSetConfig, data_root: Path) -> int | None:
    """The number of public classes without decoding an image; None if there are no public images.

    Before the set is prepared it is the number in the configuration, which may be None.
    """
    if not has_public_images(section):
        return None
    count = _count_classes(section, data_root)
    if count is None:
        return section.n_classes
    _check_class_count(section, count)
    return count


def _count_classes(section: PublicSetConfig, data_root: Path) -> int | None:
    if section.name in EMBEDDED_PUBLIC:
        from data.glyphs import CHARACTERS

        return len(CHARACTERS)
    if section.train_path is not None and not is_prepared(Path(section.train_path)):
        if not Path(section.train_path).exists():
            return None
        source = open_source(Path(section.train_path))
        return len(source.class_names or np.unique(source.train.labels))
    stored = public_folders(section, data_root)
    return len(read_meta(stored[0]).class_names) if stored else None


def _check_class_count(section: PublicSetConfig, count: int) -> None:
    if section.n_classes is not None and section.n_classes != count:
        raise UserError(
            f"public_data.n_classes: {section.n_classes}, but {section.train_path or section.name} has {count} "
            f"classes; set public_data.n_classes={count}, or choose another public set"
        )


# ------------------------------------------------------------------------------------------------------ glyphs


def _load_glyphs(section: PublicSetConfig, spec: DataSpec, data_root: Path) -> PublicData:
    from data.glyphs import CHARACTERS, DEFAULT_PER_CLASS, rendering_key

    per_class = DEFAULT_PER_CLASS if section.per_class is None else section.per_class
    require_memory("public_data.per_class", per_class * len(CHARACTERS), (1, *spec.image_shape[1:]))
    key = rendering_key(spec.resolution, per_class, GLYPH_SEED)
    folder = public_cache(data_root / CACHE_NAME, f"glyphs-{spec.resolution}-{key}")
    if not is_prepared(folder):
        rendered = EMBEDDED_PUBLIC.resolve(section.name)(spec.resolution, per_class, GLYPH_SEED)
        with new_prepared(folder, (1, spec.resolution, spec.resolution), private=False) as writer:
            writer.new_part("train", rendered.samples.labels)[:] = rendered.samples.images
            writer.finish("glyphs", tuple(CHARACTERS), "rendered from the fonts of matplotlib")
    grey = read_prepared(folder).train
    samples = Samples(to_channels(grey.images, spec.channels), grey.labels)
    return PublicData(section.name, samples, tuple(CHARACTERS))


# ------------------------------------------------------------------------------------------------------ stored sets


def _load_stored(section: PublicSetConfig, spec: DataSpec, data_root: Path) -> PublicData:
    prepared = _prepared_from_path(section, spec, data_root) or _prepared_by_name(section, spec, data_root)
    meta = prepared.meta
    as_wanted = (meta.channels, meta.resolution) == (
        spec.channels,
        spec.resolution,
    ) and section.per_class is None
    train = prepared.train if as_wanted else _converted_copy(prepared, section, spec, data_root)
    return PublicData(section.name, train, meta.class_names)


def _prepared_by_name(section: PublicSetConfig, spec: DataSpec, data_root: Path) -> Prepared:
    """The smallest stored size that is large enough, else the largest, which is then enlarged."""
    stored = public_folders(section, data_root)
    sizes = {read_meta(folder).resolution: folder for folder in reversed(stored)}
    enough = [size for size in sizes if size >= spec.resolution]
    if not enough:
        log.info(
            f"public_data: {section.name} is stored at {max(sizes)} px and enlarged to {spec.resolution}"
        )
    return read_prepared(sizes[min(enough) if enough else max(sizes)])


def _prepared_from_path(section: PublicSetConfig, spec: DataSpec, data_root: Path) -> Prepared | None:
    """A folder of class folders, an archive or an npz at train_path, converted once; None for a prepared folder."""
    if section.train_path is None or is_prepared(Path(section.train_path)):
        return None
    path = Path(section.train_path)
    key = _key(_path_hash(path), spec.resolution, spec.channels)
    folder = public_cache(data_root / CACHE_NAME, f"{section.name}-{spec.resolution}-{key}")
    if not is_prepared(folder):
        target = Target(section.name, spec.resolution, spec.channels, None, public=True)
        source = open_source(path)
        _, notes = convert_source(source, target, folder, str(path))
        for note in (*source.notes, *notes):
            log.info(f"public_data: {section.name}: {note}")
    return read_prepared(folder)


def _path_hash(path: Path) -> str:
    """A hash of the content: the bytes of a file; the names, sizes and times of the files in a folder."""
    if path.is_file():
        return sha256_of(path)
    tree = FolderTree(path)
    files = ((name, tree.place(name).stat()) for name in tree.names)
    return _key(*((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((CONVERSION_VERSION, parts)).encode()).hexdigest()[:16]


def _converted_copy(prepared: Prepared, section: PublicSetConfig, spec: DataSpec, data_root: Path) -> Samples:
    """The first per_class training images of each class at the shape of `spec`; computed once, then cached."""
    meta = prepared.meta
    key = _key(meta.content_hash, spec.resolution, spec.channels, section.per_class)
    folder = public_cache(data_root / CACHE_NAME, f"{meta.name}-{spec.resolution}-{key}")
    if not is_prepared(folder):
        rows = _first_rows(prepared.train.labels, section.per_class)
        with new_prepared(folder, spec.image_shape, private=False) as writer:
            images = writer.new_part("train", prepared.train.labels[rows])
            for start in progress(range(0, len(rows), ROWS_AT_ONCE), f"resizing {meta.name}", unit="block"):
                block = prepared.train.images[rows[start : start + ROWS_AT_ONCE]]
                images[start : start + ROWS_AT_ONCE] = resized(
                    to_channels(block, spec.channels), spec.resolution
                )
            images.flush()
            writer.finish(meta.name, meta.class_names, meta.source)
    return read_prepared(folder).train


def _first_rows(labels: np.ndarray, per_class: int | None) -> np.ndarray:
    """Sorted indices of the first `per_class` records of every class; of all records if it is None."""
    if per_class is None:
        return np.arange(len(labels))
    return np.sort(
        np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)])
    )
