"""Convert a source, downloaded or the user's own, to the prepared format that the loaders read."""

import itertools
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.apart import require_not_from_run
from data.cache import CACHE_NAME
from data.convert import COLOURS, conversion_notes, to_channels
from data.download import download
from data.groups import (
    group_numbers,
    grouped_rows,
    groups_note,
    groups_of,
    largest_size,
    nested_note,
    require_disjoint_groups,
    require_form,
)
from data.labels import compose_names, resolve
from data.locations import IN_DISTRIBUTION
from data.odd_classes import class_warnings
from data.prepared import PreparedMeta, is_prepared, new_prepared, read_meta
from data.readers.layouts import open_source
from data.readers.source import ArrayPart, Part, Source
from data.registry import (
    EMBEDDED_PUBLIC,
    EMBEDDED_SENSITIVE,
    NO_QUIRKS,
    Facts,
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

CUSTOM_RESOLUTION = 32  # pixels, for image files of a custom set; arrays keep their own size
CUSTOM_TEST_SHARE = 1 / 7  # of a custom set without a test part, as in MNIST and digits_8
IMAGES_AT_ONCE = 512  # held in memory while they are converted


@dataclass(frozen=True)
class Target:
    """The form to which a source is converted. `class_names` None: those that the source states."""

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...] | None
    public: bool  # only the training part is kept
    mixed: bool = True  # grey and colour images may be mixed


@dataclass(frozen=True)
class Grouping:
    """Which training images belong together: groups (N,) str; `limit`: declared images per group."""

    groups: np.ndarray
    limit: int | None

    def take(self, rows: np.ndarray) -> "Grouping":
        return replace(self, groups=self.groups[rows])

    @property
    def bound(self) -> int:
        return largest_size(self.groups) if self.limit is None else self.limit

    @property
    def origin(self) -> str:
        return "observed" if self.limit is None else "declared"


def prepare(
    data_name: str,
    data_root: Path,
    *,
    facts: Facts | None = None,
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
    """Write `<data_root>/<data_name>`; return that folder, its meta, and notes for the user.

    Without `source` the published files are downloaded. `facts` are required for a published sensitive set.
    `resolution` (pixels) and `channels` (1 or 3) are for custom and public sets; a published public set at a resolution
    other than its usual one goes to `<data_name>_<resolution>`. `class_names` name the labels 0, 1, ... of a source
    that has only numbers. `groups` states which images belong together (data/groups.py): a group is on one side of
    every split, and has at most `images_per_person` images. `public` keeps every image of a custom set for training. A
    prepared set of the same name is replaced only with `force`; without `force` and `source` it is kept. Any bad input
    raises UserError and leaves nothing behind.
    """
    data_name = canonical_name(data_name)
    _require_utf8_paths(source, test_source, data_root)
    _require_preparable(data_name)
    known = _with_facts(known_set(data_name), facts)
    # Before a look at what is prepared, which would hide these mistakes.
    _require_source(source, test_source, class_names)
    _require_shape(data_name, known, resolution, channels)
    _require_groups(groups, images_per_person, public or (known is not None and known.public))
    folder = data_root / _folder_name(data_name, known, resolution)
    if is_prepared(folder) and not force:
        return folder, *_kept(folder, source, resolution, channels)
    if source is not None and (public or (known is not None and known.public)):
        require_not_from_run(source, "--source")
    source = source or _download_all(data_name, known, data_root)
    found = _open_parts(source, test_source, known)
    found = _with_class_names(found, class_names, known)
    target = _target(data_name, known, found, resolution, channels, public)
    notes = list(found.notes)
    grouping = _grouping(found, groups, images_per_person)
    if grouping is None and not target.public and (nested := nested_note(found.train)):
        notes.append(nested)
    if not target.public and found.test is None:
        found, note, kept = _split_off_test(found, data_name, known, grouping)
        grouping = grouping and grouping.take(kept)
        notes.append(note)
    # data/apart.py compares the path of the source.
    meta, more = convert_source(found, target, folder, str(source.resolve()), grouping)
    if known is None:
        more += _class_notes(source, found, meta)
    if not target.public and readable_by_others(folder):
        more.append(f"warning: others can read the images: the file system of {folder} keeps no permissions")
    return folder, meta, [f"{data_name}: {note}" for note in notes + more]


def _class_notes(path: Path, source: Source, meta: PreparedMeta) -> list[str]:
    """What the user should know about the classes of a custom set."""
    test = source.test if meta.num_test else None  # a public set has none
    notes = class_warnings(path.resolve().name, source.train, test, meta.class_names)
    if source.class_names is None and source.train.labels.dtype.kind != "U":
        names = ",".join(f"<name of {label}>" for label in meta.class_names[:2])
        more = ",..." if len(meta.class_names) > 2 else ""
        notes.append(
            f"the source has no class names, so the classes are called by their numbers; to name them, repeat with "
            f"--force --class_names {names}{more}"
        )
    return notes


def convert_source(
    source: Source, target: Target, folder: Path, description: str, grouping: Grouping | None = None
) -> tuple[PreparedMeta, list[str]]:
    """Resolve the labels, convert the images and write the prepared folder; return its meta, and notes for the user."""
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
            writer.write_groups(group_numbers(grouping.groups), grouping.bound, grouping.origin)
        meta = writer.finish(target.name, labelling.class_names, description)
    notes = [] if labelling.note is None else [labelling.note]
    if source.test is not None and target.public:
        notes.append(
            f"left out (a public set needs no test part): the {len(source.test):,} images of the test part"
        )
    notes += [] if grouping is None else [groups_note(grouping.groups, grouping.limit)]
    return meta, notes + conversion_notes(forms, target.resolution, target.channels)


def _refuse_mixed(forms: Counter, name: str) -> None:
    """Raise UserError if some images are grey and others are in colour, since either may be intended."""
    counts = {channels: sum(forms[form] for form in forms if form[2] == channels) for channels in COLOURS}
    if all(counts.values()):
        grey, colour = counts[1], counts[3]
        raise UserError(
            f"{name}: {grey:,} images are grey and {colour:,} are in colour; give --channels 1 or 3"
        )


# ------------------------------------------------------------------------------------------------------ source


def _require_preparable(data_name: str) -> None:
    if data_name in EMBEDDED_SENSITIVE or data_name in EMBEDDED_PUBLIC:
        raise UserError(f"{data_name} is embedded: there is nothing to prepare")
    if data_name == IN_DISTRIBUTION:
        raise UserError(
            f"--data_name: {data_name} stands for the images that sensitive_data.num_public declares public; give "
            f"another name"
        )
    require_allowed_name("--data_name", data_name)


def _require_source(
    source: Path | None, test_source: Path | None, class_names: tuple[str, ...] | None
) -> None:
    if class_names is not None and source is None:
        raise UserError("--class_names: name the labels of --source; add --source <path>")
    if test_source is not None and source is None:
        raise UserError("--test_source: is the test part of --source; add --source <path>")
    for flag, path in (("--source", source), ("--test_source", test_source)):
        if path is not None and not path.exists():
            raise UserError(f"{flag}: {path}: no such file or folder")


def _require_shape(
    data_name: str, known: KnownSet | None, resolution: int | None, channels: int | None
) -> None:
    for flag, value, allowed in (
        ("--resolution", resolution, range(4, 1025)),
        ("--channels", channels, (1, 3)),
    ):
        if value is not None and value not in allowed:
            text = "1 or 3" if flag == "--channels" else "4 to 1024 pixels"
            raise UserError(f"{flag}: {value} is not allowed; it must be {text}")
    if known is not None and not known.public:
        _refuse_change(data_name, "--resolution", resolution, known.facts.resolution)
        _refuse_change(data_name, "--channels", channels, known.facts.channels)


def _require_groups(how: str | None, limit: int | None, public: bool) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"--images_per_person: {limit} is not allowed; it must be at least 1")
    if limit is not None and how is None:
        raise UserError(f"--images_per_person: {limit} cannot be checked without --groups; add it")
    if how is not None and public:
        raise UserError("--groups: a public set has no groups to keep together; remove it")
    if how is not None:
        require_form(how)


def _with_facts(known: KnownSet | None, facts: Facts | None) -> KnownSet | None:
    """The entry of the table with the facts of the set; None for a custom set."""
    if known is None or known.facts is not None:
        return known
    assert facts is not None, known.name
    return replace(known, facts=facts)


def require_allowed_name(flag: str, data_name: str) -> None:
    """Raise UserError unless `data_name` is a plain name, which cannot lead out of the data root."""
    if not re.fullmatch(r"[^\W_][\w.-]*", data_name):
        raise UserError(
            f"{flag}: '{data_name}' is not allowed; it must be letters, digits, '_', '-' and '.', and begin with a "
            f"letter or a digit"
        )


def downloads_folder(name: str, data_root: Path) -> Path:
    return data_root / CACHE_NAME / "downloads" / name


def _download_all(data_name: str, known: KnownSet | None, data_root: Path) -> Path:
    """Download the files of a published set into the cache and return their folder."""
    if known is None:
        raise UserError(
            f"{unknown('dataset', data_name, known_names())}. For images of your own add --source <path>"
        )
    if not known.downloads:
        raise UserError(f"{known.name} cannot be downloaded: {known.advice}")
    folder = downloads_folder(known.name, data_root)
    for remote in known.downloads:
        download(remote, folder)
    return folder


def _open_parts(source: Path, test_source: Path | None, known: KnownSet | None) -> Source:
    quirks = NO_QUIRKS if known is None else known.quirks
    found = open_source(source, quirks)
    if test_source is None:
        return found
    return _with_test_part(found, open_source(test_source, quirks), test_source)


def _with_test_part(source: Source, other: Source, path: Path) -> Source:
    if (
        other.class_names != source.class_names
        or other.train.labels.dtype.kind != source.train.labels.dtype.kind
    ):
        raise UserError(
            f"{path}: its classes are given in another form than those of --source; both must have the same layout"
        )
    if source.test is not None:
        raise UserError(
            f"{path}: --source already has a test part; remove --test_source, or give only a training part"
        )
    notes = [*source.notes, *other.notes]
    if other.test is not None:
        notes.append(
            f"left out ({path.name} is the test part): the {len(other.train):,} images of its training part"
        )
    return replace(source, test=other.train if other.test is None else other.test, notes=tuple(notes))


def _with_class_names(source: Source, class_names: tuple[str, ...] | None, known: KnownSet | None) -> Source:
    """The source with --class_names for its labels 0, 1, ...; UserError if the classes already have names."""
    if class_names is None:
        return source
    names = tuple(compose_names(np.array(class_names, str))[0].tolist())
    own = known.facts.class_names if known is not None else source.class_names
    if own is None and source.train.labels.dtype.kind == "U":
        own = tuple(np.unique(source.train.labels).tolist())
    if own is not None:
        raise UserError(f"--class_names: the classes already have names: {listed(own, 5)}; remove it")
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
    """meta.json holds the paths, so a path that is not UTF-8 is refused before the conversion."""
    require_utf8([str(path.absolute()) for path in paths if path is not None], "path")


def _grouping(source: Source, how: str | None, limit: int | None) -> Grouping | None:
    """The groups of the training part; UserError if the test part shares one, or one exceeds the declared limit."""
    if how is None:
        return None
    found = groups_of(source.train, how, "the source")
    if source.test is not None:
        require_disjoint_groups(found, groups_of(source.test, how, "the test part"), "the source")
    most = largest_size(found)
    if limit is not None and most > limit:
        raise UserError(
            f"--images_per_person: {limit}, but the largest group has {most} images; declare at least {most}, or "
            f"remove images"
        )
    return Grouping(found, limit)


def _split_off_test(
    source: Source, data_name: str, known: KnownSet | None, grouping: Grouping | None
) -> tuple[Source, str, np.ndarray]:
    """The source with a fixed test part drawn from its training part, a note about it, and the remaining rows."""
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
        raise UserError(f"{data_name}: the source has no test part; add --test_source <path>")
    if len(rows) == 0:
        raise UserError(
            f"{data_name}: {count} images are too few to split off a test part; add --test_source"
        )
    rest = np.setdiff1d(np.arange(count), rows)
    note = f"the source has no test part: {len(rows):,} of {count:,} images ({how}, fixed seed) are split off as test. "
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
    if known is None:
        height, width, found_channels = source.train.first_shape()
        own_size = min(height, width) if isinstance(source.train, ArrayPart) else CUSTOM_RESOLUTION
        size, depth = resolution or own_size, channels or found_channels
        return Target(data_name, size, depth, None, public, mixed=channels is not None)
    size, depth = resolution or known.facts.resolution, channels or known.facts.channels
    return Target(data_name, size, depth, known.facts.class_names, known.public)


def _refuse_change(data_name: str, flag: str, value: int | None, fixed: int) -> None:
    if value is not None and value != fixed:
        raise UserError(
            f"{flag}: {data_name} has {fixed} by definition; for {value} choose another --data_name"
        )


def _folder_name(data_name: str, known: KnownSet | None, resolution: int | None) -> str:
    usual = known is None or resolution in (None, known.facts.resolution)
    return data_name if usual else f"{data_name}_{resolution}"


def _kept(
    folder: Path, source: Path | None, resolution: int | None, channels: int | None
) -> tuple[PreparedMeta, list[str]]:
    """The set that `folder` holds; UserError if the arguments describe another one."""
    meta = read_meta(folder)
    same = resolution in (None, meta.resolution) and channels in (None, meta.channels)
    if source is not None or not same:
        raise UserError(
            f"{folder} already holds a prepared set, made from {meta.source}; add --force to replace it, or choose "
            f"another --data_name"
        )
    return meta, [f"{meta.name}: already prepared from {meta.source}; add --force to prepare it again"]


# ------------------------------------------------------------------------------------------------------ pixels


def _fill(images: np.ndarray, part: Part, description: str) -> Counter:
    """Write every image of `part` into `images` (N, C, R, R); return the number of images of each form."""
    channels, resolution = images.shape[1:3]
    if isinstance(part, ArrayPart) and part.images.shape[1:3] == (resolution, resolution):
        return _copy_array(images, part.images)
    forms: Counter = Counter()
    items = part.items()
    bar = progress(range(0, len(part), IMAGES_AT_ONCE), description, unit="block")
    # Pillow decodes and resizes without the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
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
    """(N, R, R) or (N, R, R, 3) -> (N, C, R, R): only the channels are converted."""
    for start in range(0, len(source), 4096):
        block = source[start : start + 4096]
        block = block[:, None] if block.ndim == 3 else block.transpose(0, 3, 1, 2)
        images[start : start + 4096] = to_channels(block, images.shape[1])
    channels = 1 if source.ndim == 3 else 3
    return Counter({(images.shape[3], images.shape[2], channels): len(source)})
