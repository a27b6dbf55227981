"""The entries `revealed` of privacy.json: why private images were read without noise."""

from collections.abc import Iterable

from evaluation.report import Report
from evaluation.selection import BEST_VAL

COMPARED = "the private training images, which samples are compared with by "
GALLERY_ENTRY, COPIES = "eval.gallery", "the search for exact copies"  # listed with the metrics that compare
ORACLE = "eval.oracles=true: epochs of classifiers are chosen on the private validation images without noise"
SHOWN = "eval.gallery=report: report.html was written with training images in it"
CEILING = (
    "eval.ceiling: classifiers were trained on the private training images, to report what real images reach"
)


def comparison(names: Iterable[str]) -> str:
    """One entry for everything that compares samples with the private training images."""
    return COMPARED + ", ".join(names)


def compared_by(entries: Iterable[str]) -> list[str]:
    """What compares samples with the training images, according to `entries`."""
    parts = [entry.removeprefix(COMPARED).split(", ") for entry in entries if entry.startswith(COMPARED)]
    return list(dict.fromkeys(name for part in parts for name in part))


def merged(entries: Iterable[str]) -> list[str]:
    """Each entry once; those about comparisons with the training images as one, at the place of the first."""
    entries = list(entries)
    one = comparison(compared_by(entries))
    return list(dict.fromkeys(one if entry.startswith(COMPARED) else entry for entry in entries))


def without_failed(booked: list[str], planned: list[str], report: Report, others: Iterable[str]) -> list[str]:
    """The `booked` entries without those of `planned` that led to no result: what they were for has failed.

    `report` holds all values of these samples, also of earlier evaluations. `others`: which of GALLERY_ENTRY, COPIES
    and SHOWN there are.
    """
    found = {name.split("/")[0] for name in report.metrics} | set(others)
    if any("ceiling" in info for info in report.metric_info.values()):
        found.add(CEILING)
    if any(name.endswith(f"/{BEST_VAL}") for name in report.metrics):
        found.add(ORACLE)
    failed = {entry for entry in planned if not entry.startswith(COMPARED)} - found
    failed |= set(compared_by(planned)) - found
    names = [name for name in compared_by(booked) if name not in failed]
    kept = [entry for entry in booked if not entry.startswith(COMPARED) and entry not in failed]
    return [comparison(names), *kept] if names else kept
