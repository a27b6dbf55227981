"""Turns a source - downloaded, or what the user already has - into the prepared format that the loaders read."""

import itertools
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.apart import require_no_run
from data.cache import CACHE_NAME
from data.convert import COLOURS, conversion_notes, to_channels
from data.download import download
from data.groups import grouped_rows, groups_of, largest, nested_note, numbered, require_apart, summary
from data.labels import composed, resolve
from data.prepared import PreparedMeta, is_prepared, new_prepared, read_meta, read_prepared
from data.readers.layouts import open_source
from data.readers.source import ArrayPart, Part, Source
from data.registry import (
    EMBEDDED_PUBLIC,
    EMBEDDED_SENSITIVE,
    NO_QUIRKS,
    KnownSet,
    canonical_name,
    known_names,
    known_set,
)
from data.splits import random_test_rows, stratified_test_rows
from utils.errors import UserError, unknown
from utils.private_files import readable_by_others
from utils.progress import progress
from utils.text import listed, require_utf8

__all__ = ["Target", "convert_source", "prepare", "read_prepared"]

CUSTOM_RESOLUTION = 32  # pixels, for image files of a custom set; arrays keep their own size
CUSTOM_TEST_SHARE = 1 / 7  # of a custom set without a test part, as in MNIST and digits_8
IMAGES_AT_ONCE = 512  # held in memory while they are converted


@dataclass(frozen=True)
class Target:
    """What a source is converted to. `class_names` None: those that the source states."""

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...] | None
    public: bool  # a public set: the training part and nothing else
    mixed: bool = True  # may grey images and colour images be mixed?


@dataclass(frozen=True)
class Grouping:
    """Which training images belong together: groups (N,) str; `limit`: the declared number of images of one."""

    groups: np.ndarray
    limit: int | None

    def of_rows(self, rows: np.ndarray) -> "Grouping":
        return replace(self, groups=self.groups[rows])

    @property
    def bound(self) -> int:
        return largest(self.groups) if self.limit is None else self.limit

    @property
    def origin(self) -> str:
        return "observed" if self.limit is None else "declared"


def prepare(
    data_name: str,
    data_root: Path,
    *,
    source: Path | None = None,
    test_source: Path | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    class_names: tuple[str, ...] | None = None,
    public: bool = False,
    force: bool = False,
    groups: str | None = None,
    images_per_person: int | None = None,
) -> tuple[Path, PreparedMeta, list[str]]:
    """Write `<data_root>/<data_name>` and return that folder, its meta, and lines to tell the user.

    Without `source` the published files are downloaded. `resolution` (pixels) and `channels` (1 or 3) are for custom
    and public sets; a known public set at another resolution than its usual one goes to `<data_name>_<resolution>`.
    `class_names` name the labels 0, 1, ... of a source that has numbers only.
    `groups` says which images belong together (data/groups.py): a group is on one side of every split, and at most
    `images_per_person` images are declared for one. `public` keeps every image of a custom set for training. A
    prepared set of the same name is replaced with `force` only; without it and without `source` it is kept. Any bad
    input raises UserError and leaves nothing behind.
    """
    data_name = canonical_name(data_name)
    _require_utf8_paths(source, test_source, data_root)
    if class_names is not None and source is None:
        raise UserError("--class_names: they name the labels of --source, which is not given")
    if source is None and not force and is_prepared(data_root / data_name):
        return data_root / data_name, *_kept(data_root / data_name, source, channels)
    known = _known_set(data_name, source)
    if not force:
        folder = data_root / _folder_name(data_name, known, resolution)
        if is_prepared(folder):
            return folder, *_kept(folder, source, channels)
    if source is not None and (public or (known is not None and known.public)):
        require_no_run(source, "--source")
    source = source or _download_all(known, data_root)
    found = open_source(source, known.quirks if known else NO_QUIRKS)
    if test_source is not None:
        found = _with_test_part(
            found, open_source(test_source, known.quirks if known else NO_QUIRKS), test_source
        )
    found = _with_class_names(found, class_names, known)
    target = _target(data_name, known, found, resolution, channels, public)
    notes = list(found.notes)
    grouping = _grouping(found, groups, images_per_person, target)
    if grouping is None and not target.public and (nested := nested_note(found.train)):
        notes.append(nested)
    if not target.public and found.test is None:
        found, note, kept = _split_off_test(found, data_name, known, grouping)
        grouping = grouping and grouping.of_rows(kept)
        notes.append(note)
    folder = data_root / _folder_name(data_name, known, target.resolution)
    # data/sensitive.py compares the path.
    meta, more = convert_source(found, target, folder, str(source.resolve()), grouping)
    if not target.public and readable_by_others(folder):
        more.append(f"warning: others can read the images: the file system of {folder} keeps no rights")
    return folder, meta, [f"{data_name}: {note}" for note in notes + more]


def convert_source(
    source: Source, target: Target, folder: Path, description: str, grouping: Grouping | None = None
) -> tuple[PreparedMeta, list[str]]:
    """Resolve the labels, convert the images and write the prepared folder; its meta, and lines to tell the user."""
    parts = {"train": source.train}
    if source.test is not None and not target.public:
        parts["test"] = source.test
    labelling = resolve(
        [part.labels for part in parts.values()], source.class_names, target.class_names, description
    )
    forms: Counter = Counter()
    shape = (target.channels, target.resolution, target.resolution)
    with new_prepared(folder, shape, private=not target.public) as writer:
        for (name, part), labels in zip(parts.items(), labelling.parts, strict=True):
            images = writer.new_part(name, labels)
            forms += _fill(images, part, f"{target.name}: converting {name}")
            images.flush()
        if not target.mixed:
            _refuse_mixed(forms, target.name)
        if grouping is not None:
            writer.write_groups(numbered(grouping.groups), grouping.bound, grouping.origin)
        meta = writer.finish(target.name, labelling.class_names, description)
    notes = [] if labelling.note is None else [labelling.note]
    if source.test is not None and target.public:
        notes.append(
            f"left out (a public set needs no test part): the {len(source.test):,} images of the test part"
        )
    notes += [] if grouping is None else [summary(grouping.groups, grouping.limit)]
    return meta, notes + conversion_notes(forms, target.resolution, target.channels)


def _refuse_mixed(forms: Counter, name: str) -> None:
    """UserError if some images are grey and others are not: which of both is meant nobody has said."""
    counts = {channels: sum(forms[form] for form in forms if form[2] == channels) for channels in COLOURS}
    if all(counts.values()):
        grey, colour = counts[1], counts[3]
        raise UserError(
            f"{name}: {grey:,} images are grey and {colour:,} are in colour; give --channels 1 or 3"
        )


# ------------------------------------------------------------------------------------------------------ source


def _known_set(data_name: str, source: Path | None) -> KnownSet | None:
    """The table's entry, or None for a custom name, which needs a source."""
    if data_name in EMBEDDED_SENSITIVE or data_name in EMBEDDED_PUBLIC:
        raise UserError(f"{data_name} is embedded: there is nothing to prepare")
    require_allowed_name("--data_name", data_name)
    known = known_set(data_name)
    if known is None and source is None:
        raise UserError(
            f"{unknown('dataset', data_name, known_names())}. For images of your own add --source <path>"
        )
    return known


def require_allowed_name(flag: str, data_name: str) -> None:
    """Raise UserError unless `data_name` is a plain name, which cannot lead out of the data root."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", data_name):
        raise UserError(f"{flag}: '{data_name}' is not allowed; it must be letters, digits, '_', '-' and '.'")


def downloads_folder(name: str, data_root: Path) -> Path:
    return data_root / CACHE_NAME / "downloads" / name


def _download_all(known: KnownSet, data_root: Path) -> Path:
    """Fetch the files of a known set into the cache and return their folder."""
    if not known.downloads:
        raise UserError(f"{known.name} cannot be downloaded: {known.advice}")
    folder = downloads_folder(known.name, data_root)
    for remote in known.downloads:
        download(remote, folder)
    return folder


def _with_test_part(source: Source, other: Source, path: Path) -> Source:
    if (
        other.class_names != source.class_names
        or other.train.labels.dtype.kind != source.train.labels.dtype.kind
    ):
        raise UserError(
            f"{path}: its classes are not stated like those of --source; both must be of the same layout"
        )
    if source.test is not None:
        raise UserError(
            f"{path}: --source has a test part already; leave out --test_source, or give a training part only"
        )
    notes = [*source.notes, *other.notes]
    if other.test is not None:
        notes.append(
            f"left out ({path.name} is the test part): the {len(other.train):,} images of its training part"
        )
    return replace(source, test=other.train if other.test is None else other.test, notes=tuple(notes))


def _with_class_names(source: Source, class_names: tuple[str, ...] | None, known: KnownSet | None) -> Source:
    """The source with the names of --class_names for its labels 0, 1, ...; UserError if they have names already."""
    if class_names is None:
        return source
    names = tuple(composed(np.array(class_names, str))[0].tolist())
    own = known.class_names if known is not None else source.class_names
    if own is None and source.train.labels.dtype.kind == "U":
        own = tuple(np.unique(source.train.labels).tolist())
    if own is not None:
        raise UserError(f"--class_names: the classes have names already: {listed(own, 5)}; leave it out")
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"--class_names: {','.join(names)} is not allowed; it must be one name for each class"
        )
    highest = int(source.train.labels.max())
    if highest + 1 != len(names):
        raise UserError(
            f"--class_names: {len(names)} names for the labels 0 to {highest}; give {highest + 1}"
        )
    return replace(source, class_names=names)


def _require_utf8_paths(*paths: Path | None) -> None:
    """meta.json holds them; a name that it cannot hold would end the preparation after the work."""
    require_utf8([str(path.absolute()) for path in paths if path is not None], "path")


def _grouping(source: Source, how: str | None, limit: int | None, target: Target) -> Grouping | None:
    """The groups of the training part, checked against those of the test part and against the declared limit."""
    if how is None:
        if limit is not None:
            raise UserError(f"--images_per_person: {limit} cannot be checked without --groups; add it")
        return None
    if target.public:
        raise UserError("--groups: a public set has no groups to keep together; leave it out")
    found = groups_of(source.train, how, "the source")
    if source.test is not None:
        require_apart(found, groups_of(source.test, how, "the test part"), "the source")
    most = largest(found)
    if limit is not None and most > limit:
        raise UserError(
            f"--images_per_person: {limit}, but the largest group has {most} images; declare at least {most}, or leave "
            f"images out"
        )
    return Grouping(found, limit)


def _split_off_test(
    source: Source, data_name: str, known: KnownSet | None, grouping: Grouping | None
) -> tuple[Source, str, np.ndarray]:
    """The source with a fixed test part drawn from its training part, the line that says so, and the rows that stay."""
    count = len(source.train)
    if grouping is not None:
        _, labels = np.unique(source.train.labels, return_inverse=True)
        num_test = max(1, round(count * CUSTOM_TEST_SHARE))
        rows = grouped_rows(grouping.groups, num_test, "custom test split", labels)
        how = "about a seventh, in whole groups"
    elif known is None:
        _, labels = np.unique(source.train.labels, return_inverse=True)
        num_test = max(1, round(count * CUSTOM_TEST_SHARE))
        rows = stratified_test_rows(labels, num_test, "custom test split")
        how = "a seventh of each class"
    elif known.split_off_test is not None:
        share, whole = known.split_off_test
        rows = random_test_rows(count, round(count * share / whole), f"{data_name} test split")
        how = "at random"
    else:
        raise UserError(f"{data_name}: the source has no test part; add it as --test_source")
    if len(rows) == 0:
        raise UserError(
            f"{data_name}: {count} images are too few to put a test part aside; add --test_source"
        )
    rest = np.setdiff1d(np.arange(count), rows)
    note = f"the source has no test part: {len(rows):,} of {count:,} images ({how}, fixed seed) are put aside as test. "
    note += "Accuracies are measured on them without noise: test images have no privacy protection"
    return replace(source, train=source.train.take(rest), test=source.train.take(rows)), note, rest


# ------------------------------------------------------------------------------------------------------ target


def _target(
    data_name: str,
    known: KnownSet | None,
    source: Source,
    resolution: int | None,
    channels: int | None,
    public: bool,
) -> Target:
    for flag, value, allowed in (
        ("--resolution", resolution, range(4, 1025)),
        ("--channels", channels, (1, 3)),
    ):
        if value is not None and value not in allowed:
            text = "1 or 3" if flag == "--channels" else "4 to 1024 pixels"
            raise UserError(f"{flag}: {value} is not allowed; it must be {text}")
    if known is None:
        height, width, found_channels = source.train.first_shape()
        own_size = min(height, width) if isinstance(source.train, ArrayPart) else CUSTOM_RESOLUTION
        size, depth = resolution or own_size, channels or found_channels
        return Target(data_name, size, depth, None, public, mixed=channels is not None)
    if not known.public:
        _refuse_change(data_name, "--resolution", resolution, known.resolution)
        _refuse_change(data_name, "--channels", channels, known.channels)
    size, depth = resolution or known.resolution, channels or known.channels
    return Target(data_name, size, depth, known.class_names, known.public)


def _refuse_change(data_name: str, flag: str, value: int | None, fixed: int) -> None:
    if value is not None and value != fixed:
        raise UserError(
            f"{flag}: {data_name} has {fixed} by definition; for {value} choose another --data_name"
        )


def _folder_name(data_name: str, known: KnownSet | None, resolution: int | None) -> str:
    usual = known is None or resolution in (None, known.resolution)
    return data_name if usual else f"{data_name}_{resolution}"


def _kept(folder: Path, source: Path | None, channels: int | None) -> tuple[PreparedMeta, list[str]]:
    """The set that `folder` holds, where it is what is asked for: the published files of a known set."""
    meta = read_meta(folder)
    if source is not None or channels not in (None, meta.channels):
        raise UserError(
            f"{folder} holds a prepared set already, made from {meta.source}; add --force to replace it, or choose "
            f"another --data_name"
        )
    return meta, [f"{meta.name}: prepared already, from {meta.source}; --force makes it again"]


# ------------------------------------------------------------------------------------------------------ pixels


def _fill(images: np.ndarray, part: Part, description: str) -> Counter:
    """Write every image of `part` into `images` (N, C, R, R); how often each form was met."""
    channels, resolution = images.shape[1:3]
    if isinstance(part, ArrayPart) and part.images.shape[1:3] == (resolution, resolution):
        return _copy_array(images, part.images)
    forms: Counter = Counter()
    items = part.items()
    bar = progress(range(0, len(part), IMAGES_AT_ONCE), description, unit="block")
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # Pillow decodes and resizes without the interpreter lock
        for _ in bar:
            rows, block = zip(*itertools.islice(items, IMAGES_AT_ONCE), strict=True)
            converted = pool.map(
                part.convert, block, itertools.repeat(resolution), itertools.repeat(channels)
            )
            for row, (image, form) in zip(rows, converted, strict=True):
                images[row] = image
                forms[form] += 1
    return forms


def _copy_array(images: np.ndarray, source: np.ndarray) -> Counter:
    """(N, R, R) or (N, R, R, 3) -> (N, C, R, R): nothing but channels changes."""
    for start in range(0, len(source), 4096):
        block = source[start : start + 4096]
        block = block[:, None] if block.ndim == 3 else block.transpose(0, 3, 1, 2)
        images[start : start + 4096] = to_channels(block, images.shape[1])
    channels = 1 if source.ndim == 3 else 3
    return Counter({(images.shape[3], images.shape[2], channels): len(source)})
