"""Signs that samples are unusable or misleading, which metrics alone may hide."""

import hashlib
from collections import Counter

import numpy as np

from data.spec import DataSpec, Samples
from evaluation.report import Report
from utils.seeding import numpy_rng

SHARE = 0.05  # of the samples; below it there is no warning
COMPARED = 1000  # samples whose pairwise distances are computed
NEAR = 0.1  # of the typical distance between two samples: closer samples are near copies
LEAST_STEP = 2.0  # root mean square, in grey levels of 255: closer samples are near copies too
ROWS_AT_ONCE = 4096


def sample_warnings(samples: Samples, spec: DataSpec) -> list[str]:
    """Warnings about the samples alone; no real image is read. A run may have none (Synthesizer.makes_images)."""
    if len(samples) == 0:
        return []
    return [*_constant(samples), *_absent_classes(samples, spec), *_copies_of_each_other(samples)]


def accuracy_warnings(report: Report) -> list[str]:
    """Warnings about classifiers that learned nothing. The classes of the test images come from the confusion matrices
    of the report."""
    below_majority, below_chance, majority, chance = [], [], 0.0, 0.0
    for name, tables in report.details.items():
        if not name.startswith("accuracy/") or name not in report.metrics:
            continue
        confusion = np.asarray(tables["confusion"])
        of_class = confusion.sum(axis=1)
        present = of_class > 0
        if present.sum() < 2:
            continue
        majority, chance = 100 * of_class.max() / of_class.sum(), 100 / present.sum()
        balanced = 100 * float((confusion.diagonal()[present] / of_class[present]).mean())
        value = report.metrics[name]
        if report.metric_info[name].get("interval_95", [value])[0] <= majority:
            below_majority.append(f"{name} {value:.1f} %")
        if balanced <= chance:
            below_chance.append(f"{name} {balanced:.1f} %")
    lines = []
    if below_majority:
        lines.append(
            f"the 95 % interval of the accuracy includes that of always predicting the most frequent class of the "
            f"test images, {majority:.1f} %: {', '.join(below_majority)}"
        )
    if below_chance:
        lines.append(f"balanced accuracy is not above chance, {chance:.1f} %: {', '.join(below_chance)}")
    return lines


def zero_warnings(report: Report) -> list[str]:
    """Warnings about fidelity metrics that found nothing in common."""
    meanings = {
        ("precision", "density"): "no sample is near a real image",
        ("recall", "coverage"): "no real image is near a sample",
    }
    lines = []
    for kinds, meaning in meanings.items():
        names = [name for name, value in report.metrics.items() if name.startswith(kinds) and value == 0]
        if names:
            lines.append(f"{', '.join(names)} 0: {meaning}, by these features")
    return lines


def exact_copies(samples: np.ndarray, others: np.ndarray) -> int:
    """The number of samples (N, C, H, W) that equal one of the other images (M, C, H, W), byte by byte."""
    if samples.shape[1:] != others.shape[1:]:
        return 0
    counts, found = Counter(_digests(samples)), 0
    for start in range(0, len(others), ROWS_AT_ONCE):
        for digest in _digests(others[start : start + ROWS_AT_ONCE]):
            found += counts.pop(digest, 0)
    return found


def copy_warnings(num_copies: int | None, num_samples: int) -> list[str]:
    """A warning if samples are training images. The number is computed from private images without noise, so it belongs
    to the terminal and the private files of a run, and not to its privacy card."""
    if not num_copies:
        return []
    return [
        f"{num_copies:,} of {num_samples:,} samples equal a private training image, pixel for pixel: the metrics "
        f"measure these training images instead of new images (this count is without noise; do not share it)"
    ]


def _digests(images: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def _constant(samples: Samples) -> list[str]:
    flat = samples.images.reshape(*samples.images.shape[:2], -1)
    count = int((flat.min(axis=2) == flat.max(axis=2)).all(axis=1).sum())
    return _if_many(count, samples, "are of one uniform colour")


def _absent_classes(samples: Samples, spec: DataSpec) -> list[str]:
    counts = np.bincount(samples.labels, minlength=spec.num_classes)
    present = np.flatnonzero(counts)
    if spec.num_classes > 1 and len(present) == 1:
        return [
            f"all samples are labelled {spec.class_names[present[0]]}; there are {spec.num_classes} classes"
        ]
    absent = [spec.class_names[label] for label in np.flatnonzero(counts == 0)]
    return [f"no sample is labelled {', '.join(absent)}"] if absent else []


def _copies_of_each_other(samples: Samples) -> list[str]:
    """Exact copies among all samples; if there are few, near copies in a subset."""
    repeated = sum(count for count in Counter(_digests(samples.images)).values() if count > 1)
    exact = _if_many(repeated, samples, "equal another sample, byte by byte")
    return exact or _near_copies(samples)


def _near_copies(samples: Samples) -> list[str]:
    rows = numpy_rng(0, "near copies").permutation(len(samples))[:COMPARED]
    if len(rows) < 2:
        return []
    points = samples.images[np.sort(rows)].reshape(len(rows), -1).astype(np.float64)
    points -= points.mean(axis=0)
    norms = (points**2).sum(axis=1)
    squared = np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0.0)
    typical = squared.sum() / (len(rows) * (len(rows) - 1))
    np.fill_diagonal(squared, np.inf)
    bound = max(NEAR**2 * typical, LEAST_STEP**2 * points.shape[1])
    count = int((squared.min(axis=1) <= bound).sum())
    compared = samples.take(np.sort(rows))
    return _if_many(count, compared, "are near copies of another one")


def _if_many(count: int, samples: Samples, what: str) -> list[str]:
    return [f"{count:,} of {len(samples):,} samples {what}"] if count > SHARE * len(samples) else []
