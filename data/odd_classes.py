"""Numbers of images per class of a custom source, and signs that its classes are something else, such as patients."""

import numpy as np

from data.groups import folders_around
from data.readers.source import FilePart, Part
from utils.text import listed

MOST_SHOWN = 20  # classes whose numbers are printed
FEW = 10  # images; a set most of whose classes have fewer is hardly meant


def counts_line(labels: np.ndarray, test_labels: np.ndarray | None, class_names: tuple[str, ...]) -> str:
    """The number of prepared images of each class: training, and test if there is a test part."""
    counts = np.bincount(labels, minlength=len(class_names))
    shown = [f"{name}: {count:,}" for name, count in zip(class_names, counts, strict=True)]
    if test_labels is not None:
        tested = np.bincount(test_labels, minlength=len(class_names))
        shown = [f"{text} + {count:,}" for text, count in zip(shown, tested, strict=True)]
    kind = "images" if test_labels is None else "training + test images"
    return f"classes ({kind}): {listed(shown, MOST_SHOWN)}"


def class_warnings(
    source_name: str, train: Part, test: Part | None, class_names: tuple[str, ...]
) -> list[str]:
    """One line if more than half of the classes have fewer than FEW images, or if a class has no test image.

    `test` None: there is no test part by design. `class_names`: the names of integer labels.
    """
    counts = _counts(train, class_names)
    tested = counts if test is None else _counts(test, class_names)
    total = counts if test is None else {name: counts[name] + tested[name] for name in class_names}
    few = [name for name in class_names if total[name] < FEW]
    untested = [name for name in class_names if not tested[name]]
    found = []
    if 2 * len(few) > len(class_names):
        found.append(f"{len(few):,} of {len(class_names):,} classes have fewer than {FEW} images")
    if untested:
        number = "1 class has" if len(untested) == 1 else f"{len(untested):,} classes have"
        found.append(f"{number} no test image ({listed(untested)})")
    return [f"warning: {' and '.join(found)}; {_likely_cause(source_name, train)}"] if found else []


def _counts(part: Part, class_names: tuple[str, ...]) -> dict[str, int]:
    labels, counts = np.unique(part.labels, return_counts=True)
    by_name = part.labels.dtype.kind == "U"
    names = labels.tolist() if by_name else [class_names[label] for label in labels.tolist()]
    return dict.fromkeys(class_names, 0) | dict(zip(names, counts.tolist(), strict=True))


def _likely_cause(source_name: str, part: Part) -> str:
    if part.labels.dtype.kind != "U" or not isinstance(part, FilePart):
        return "check that the labels of the source are its classes"
    around = folders_around(part.names[0], str(part.labels[0]))
    if around is not None:
        parent = "/".join((source_name, *around[0]))
        return (
            f"each folder in {parent} is a class; if these are parts of one class, give the folder of all classes as "
            f"--source, and if they are patients, add --groups folder"
        )
    return (
        "the class of a file is its name up to the first underscore; put the files into one folder per class"
    )
