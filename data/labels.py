"""Convert the labels of a source, class names or integers, to integers 0..K-1 in a given class order."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError


@dataclass(frozen=True)
class Labelling:
    parts: list[np.ndarray]  # one (N,) int64 array per part that was given
    class_names: tuple[str, ...]
    note: str | None


def resolve(
    parts: list[np.ndarray], stated: tuple[str, ...] | None, wanted: tuple[str, ...] | None, where: str
) -> Labelling:
    """Labels of the training part and any test part, in the order of the `wanted` class names if they are given.

    parts (N,) of strings, or of integers that count into `stated` (or into `wanted`, if nothing is stated). UserError
    for a label out of range, a test class that is not in the training part, fewer than two classes, a class without
    images, or a number of classes other than that of `wanted`. Names are compared without case and punctuation. If no
    name matches, the classes are taken in order, and `note` reports it; if only some match, that is a UserError.
    """
    if parts[0].dtype.kind == "U":
        found = _sorted_names(np.unique(parts[0]).tolist())
        parts = [_indices_of(labels, found, where) for labels in parts]
    else:
        found = list(stated or wanted or _numbers_as_names(parts[0], where))
        _check_range(parts, len(found), where)
    note = None
    if wanted is not None:
        parts, note = _reorder(parts, found, wanted, where)
    class_names = tuple(wanted or found)
    _check_classes(parts[0], class_names, where)
    return Labelling([labels.astype(np.int64) for labels in parts], class_names, note)


def _sorted_names(names: list[str]) -> list[str]:
    """Numbers in numeric order ("2" before "10"), other names in alphabetical order."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _indices_of(labels: np.ndarray, names: list[str], where: str) -> np.ndarray:
    index = {name: number for number, name in enumerate(names)}
    unknown_class = next((name for name in np.unique(labels).tolist() if name not in index), None)
    if unknown_class is not None:
        similar = next((name for name in names if _appearance(name) == _appearance(unknown_class)), None)
        hint = "" if similar is None else f"; it looks like '{similar}'"
        raise UserError(
            f"{where}: the test part has the class '{unknown_class}', which is not in the training part{hint}"
        )
    unique, inverse = np.unique(labels, return_inverse=True)
    return np.array([index[name] for name in unique.tolist()])[inverse]


def _numbers_as_names(labels: np.ndarray, where: str) -> list[str]:
    highest = int(labels.max())
    if highest >= len(labels):  # before a list of that length is made
        raise UserError(
            f"{where}: label {highest} among {len(labels):,} images; labels must be 0 to K-1 without gaps"
        )
    return [str(number) for number in range(highest + 1)]


def _check_range(parts: list[np.ndarray], num_classes: int, where: str) -> None:
    low, high = min(labels.min() for labels in parts), max(labels.max() for labels in parts)
    if low < 0 or high >= num_classes:
        raise UserError(f"{where}: labels run from {low} to {high}; allowed are 0 to {num_classes - 1}")


def _reorder(
    parts: list[np.ndarray], found: list[str], wanted: tuple[str, ...], where: str
) -> tuple[list[np.ndarray], str | None]:
    if len(found) != len(wanted):
        listed, expected = _shortened(found), _shortened(wanted)
        raise UserError(f"{where}: {len(found)} classes ({listed}); expected {len(wanted)}: {expected}")
    place = places_of(wanted, found)
    others = [name for name in found if name not in place]
    if len(others) == len(found):
        return parts, f"the classes {_shortened(found)} are taken, in this order, as {_shortened(wanted)}"
    if others:
        left = [name for label, name in enumerate(wanted) if label not in place.values()]
        raise UserError(
            f"{where}: the classes {_shortened(others)} are not expected, {_shortened(left)} are missing; rename them, "
            f"or name all by their numbers from 0"
        )
    table = np.array([place[name] for name in found])
    return [table[labels] for labels in parts], None


def places_of(wanted: tuple[str, ...], found: list[str]) -> dict[str, int]:
    """The label of each found name that equals a wanted one, exactly or without case and punctuation."""
    exact = {name: label for label, name in enumerate(wanted)}
    simplified = {_simplified(name): label for name, label in exact.items()}
    # If names differ only in case or punctuation, these distinguish the classes.
    unclear = len(simplified) < len(wanted) or len({_simplified(name) for name in found}) < len(found)
    if unclear or set(found) <= set(exact):
        return {name: exact[name] for name in found if name in exact}
    return {name: simplified[_simplified(name)] for name in found if _simplified(name) in simplified}


def _simplified(name: str) -> str:
    """Only letters and digits, in lower case: a folder for "T-shirt/top" is named "T-shirt_top"."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFC", name))).casefold()


def compose_names(names: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(N,) names in Unicode's composed form (NFC), and those that occurred in several forms: file systems and archives
    store the same name in different forms."""
    found, inverse = np.unique(names, return_inverse=True)
    forms = [unicodedata.normalize("NFC", name) for name in found.tolist()]
    merged = sorted({form for form in forms if forms.count(form) > 1}) if len(set(forms)) < len(forms) else []
    return np.array(forms, str)[inverse.reshape(-1)], merged


def lookalikes(names: Iterable[str]) -> list[str]:
    """Groups of names that look the same to a reader, each as one text."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_appearance(name), []).append(name)
    return [" and ".join(f"'{name}'" for name in group) for group in groups.values() if len(group) > 1]


def _appearance(name: str) -> str:
    """The name without case, spaces, invisible characters and variants of one character."""
    visible = (
        char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) not in ("Cf", "Cc")
    )
    return "".join("".join(visible).casefold().split())


def _check_classes(train_labels: np.ndarray, class_names: tuple[str, ...], where: str) -> None:
    if len(class_names) < 2:
        raise UserError(f"{where}: only one class ({_shortened(class_names)}); at least two are needed")
    counts = np.bincount(train_labels, minlength=len(class_names))
    if not counts.all():
        empty = int(np.argmin(counts))
        raise UserError(
            f"{where}: class {empty} ({class_names[empty]}) has no training image; labels are 0 to K-1"
        )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
