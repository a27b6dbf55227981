"""Groups of images that belong together, such as those of one patient: a group is on one side of every split.

In `<class>/<group>/<file>` the class is the folder that gives the label, and the group is the path between it and the
file. A group may have images of several classes.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from data.group_tables import groups_in_table, read_groups_table, table_of
from data.readers.source import Part
from utils.errors import UserError
from utils.seeding import numpy_rng

FOLDER = "folder"
FORMS = "allowed: 'folder' (<class>/<group>/<file>), <file>.csv:<column>, or a regular expression on the path"


def groups_of(part: Part, how: str, where: str) -> np.ndarray:
    """The group of every image of `part` (a part of a source, with `names` and `labels`), (N,) str.

    how: one of FORMS. UserError with the first image that has no group, and for images without names, such as those of
    an npz.
    """
    names = getattr(part, "names", None)
    if names is None:
        raise UserError(f"--groups: {where} holds arrays, whose images have no paths; give image files")
    if how.casefold() == FOLDER:
        found = [_folder_group(name, str(label)) for name, label in zip(names, part.labels, strict=True)]
        need = "is in no folder below its class folder; give <class>/<group>/<file>, or another form"
    elif (place := table_of(how)) is not None:
        found = groups_in_table(read_groups_table(*place), names, place[0])
        need = f"is in no line of {place[0]}"
    else:
        pattern = _pattern(how)
        found = [_match_of(pattern, name) for name in names]
        need = f"does not match '{how}'; {FORMS}"
    missing = [name for name, group in zip(names, found, strict=True) if not group]
    if missing:
        raise UserError(
            f"--groups: {len(missing):,} of {len(names):,} images have no group: {missing[0]} {need}"
        )
    return np.array(found)


def require_form(how: str) -> None:
    """Raise UserError if `how` is none of FORMS, without a look at images."""
    if (place := table_of(how)) is not None:
        read_groups_table(*place)
    elif how.casefold() != FOLDER:
        _pattern(how)


def nested_note(part: Part) -> str | None:
    """A note if class folders contain folders, which may be groups although --groups is not given."""
    names = getattr(part, "names", [])
    nested = next(
        (name for name, label in zip(names, part.labels, strict=False) if _folder_group(name, str(label))),
        None,
    )
    if nested is None:
        return None
    return (
        f"the class of {nested} is its class folder; the folders below it are ignored, so that their images may be on "
        "both sides of a split; if each holds the images of one person, add --groups folder"
    )


def _folder_group(name: str, label: str) -> str:
    around = folders_around(name, label)
    return "" if around is None else "/".join(around[1])


def folders_around(name: str, label: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The folders of a file above and below the folder of its class; None if its class comes from no folder. Labels are
    in Unicode's composed form, names as the source writes them."""
    parts = PurePosixPath(unicodedata.normalize("NFC", name)).parts[:-1]
    if label not in parts:
        return None
    place = parts.index(label)
    return parts[:place], parts[place + 1 :]


def _pattern(text: str) -> re.Pattern:
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--groups: '{text}' is not a valid regular expression; {FORMS}") from error
    if pattern.groups > 1:
        raise UserError(
            f"--groups: '{text}' has {pattern.groups} groups; the one in parentheses is the group"
        )
    return pattern


def _match_of(pattern: re.Pattern, name: str) -> str | None:
    found = pattern.search(name)
    return found and found[pattern.groups]


def require_disjoint_groups(train: np.ndarray, test: np.ndarray, where: str) -> None:
    """Raise UserError if a group has images in both parts."""
    shared = sorted(set(train) & set(test))
    if shared:
        raise UserError(
            f"--groups: {len(shared):,} groups of {where} have images in the training and in the test part, such as "
            f"'{shared[0]}'; give all images as one part, and a test part is split off by groups"
        )


def grouped_rows(groups: np.ndarray, count: int, stream: str, labels: np.ndarray | None = None) -> np.ndarray:
    """Sorted indices of about `count` records in whole groups, never of all groups; the same for every run.

    Groups are taken in a random order as long as they bring the number nearer to `count`. With `labels` (N,), a group
    is skipped if a class would have no record outside.
    """
    names, members = np.unique(groups, return_inverse=True)
    sizes = np.bincount(members)
    outside = None if labels is None else Counter(labels.tolist())
    taken, total = [], 0
    for group in numpy_rng(0, stream).permutation(len(names)):
        if len(taken) == len(names) - 1 or abs(total + sizes[group] - count) > abs(total - count):
            continue
        own = Counter() if outside is None else Counter(labels[members == group].tolist())
        if any(outside[label] <= number for label, number in own.items()):
            continue
        if outside is not None:
            outside -= own
        taken.append(group)
        total += sizes[group]
    return np.flatnonzero(np.isin(members, taken))


def group_numbers(groups: Sequence[str]) -> np.ndarray:
    """(N,) int64: equal numbers for equal groups. Names of groups may identify people; these numbers do not."""
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    return numpy_rng(0, "group numbers").permutation(numbers.max() + 1)[numbers].astype(np.int64)


def largest_size(groups: np.ndarray) -> int:
    """The number of images in the largest group."""
    return max(Counter(groups.tolist()).values())


def groups_note(groups: np.ndarray, limit: int | None) -> str:
    """One line about the groups of the training part."""
    sizes = np.array(list(Counter(groups.tolist()).values()))
    bound = "" if limit is None else f" (at most {limit} are declared)"
    return (
        f"{len(groups):,} training images belong to {len(sizes):,} groups, each on one side of every split; the "
        f"largest has {sizes.max()}, the median {int(np.median(sizes))} images{bound}"
    )
