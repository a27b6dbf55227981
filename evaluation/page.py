"""report.html: one self-contained page about an evaluation. report.html.j2 is its layout.

The page shows samples and numbers, and no real image. The gallery of nearest training images is a page of its own in
private/, written only if requested. With eval.gallery=report it is part of report.html, which then states that
it contains training images.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from data.spec import DataSpec, Samples
from evaluation.registry import memorisation_metrics, need_classifiers
from evaluation.report import COLUMNS, DETAILS, Report, accuracy_interval, remarks_on_settings, spread
from utils.files import write_json, write_text

REPORT, GALLERY = "report.html", "private/nearest.html"
PER_CLASS = 12  # samples shown per class
CELL = 48  # minimum height of an image on the screen, in CSS pixels
MAJORITY = "majority class"  # title of a column
GAP = 1  # pixels between the images of a strip
MAX_NUMBERS = 20  # classes up to which a confusion matrix is a table of numbers, not a picture


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI; width and height in CSS pixels."""

    uri: str
    width: int
    height: int
    description: str


def write_page(
    folder: Path,
    report: Report,
    samples: Samples,
    train: Samples | None,
    spec: DataSpec,
    title: str,
    card: str | None,
    gallery: str | None,
    results: dict,
) -> None:
    """Write report.html and details.json into `folder`, and private/nearest.html for the `gallery` "private".

    `card` is the text of a run's privacy card; `results` is the content of results.json. With the `gallery` "report"
    report.html contains training images and is private too.
    """
    write_json(folder / DETAILS, report.details)
    rows = _gallery(report, samples, train) if report.nearest else None
    if rows and gallery != "report":
        page = _render(title=f"{title}: nearest training images", gallery=rows)
        write_text(folder / GALLERY, page, private=True)
        rows = None
    facts = {
        "title": title,
        "report": report,
        "about": _about(results, report),
        "classes": [_class_row(label, samples, spec) for label in range(spec.num_classes)]
        if len(samples)
        else [],
        "classifiers": _classifiers(report, spec),
        "gallery": rows,
        "gallery_note": _gallery_note(report, (folder / GALLERY).exists()),
        "card": None if card is None else card.replace("**", ""),
    }
    page = _render(**facts, **_summary(samples, spec), **_metrics(report), **_memorisation(report))
    write_text(folder / REPORT, page)


def public_set(public: dict | None) -> str:
    """The public set of a run, from its record in results.json."""
    if public is None:
        return "none"
    return f"{public['name']}: {public['images']:,} images in {public['classes']} classes"


def data_uri(pixels: np.ndarray) -> str:
    """(H, W) or (H, W, 3) uint8 -> a PNG as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _render(**facts: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(f"{REPORT}.j2").render(facts)


def _summary(samples: Samples, spec: DataSpec) -> dict:
    if len(samples) == 0:
        return {"summary": "No images: the product of this run is a classifier.", "absent_classes": []}
    counts = np.bincount(samples.labels, minlength=spec.num_classes)
    absent = [spec.class_names[label] for label in np.flatnonzero(counts == 0)]
    text = f"{len(samples):,} images in {spec.num_classes - len(absent)} of {spec.num_classes} classes, "
    text += f"{spec.resolution} x {spec.resolution}, {'grey' if spec.channels == 1 else 'colour'}."
    return {"summary": text, "absent_classes": absent}


def _about(results: dict, report: Report) -> dict[str, str]:
    """How the samples were made and evaluated."""
    settings = results["evaluation"]
    rows = {}
    if results["images"] is None:
        borrowed = f", settings of epsilon {results['preset_tier']}" if results["borrowed"] else ""
        rows["training"] = f"preset {results['preset']}{borrowed}, seed {results['seed']}"
        rows["settings given"] = " ".join(results["overrides"] or []) or "none"
        if "public_data" in results:  # missing in older runs
            rows["public images"] = public_set(results["public_data"])
    rows["evaluated"] = f"{results['judged']}, seed {settings['seed']}"
    if need_classifiers(settings["metrics"]):
        rows["classifiers"] = (
            f"{', '.join(settings['classifiers'])}; recipe {settings['recipe']}, eval.mode={settings['mode']}"
        )
    rows["extractor"] = _extractors(settings["extractor"], report)
    rows["toolkit"] = (results["git"] or "no checkout")[:12]
    return rows


def _extractors(wanted: str, report: Report) -> str:
    """The extractors of the values in the report, and whether the one that was asked for gave none."""
    found = report.extractors()
    failed = wanted not in found and any(name.endswith(f"/{wanted}") for name in report.missing)
    if failed:
        return f"{', '.join(found) or 'none'}; {wanted} gave no value, see Missing"
    return ", ".join(found) or wanted


def _metrics(report: Report) -> dict:
    """The table of values. `columns` are the titles between "better" and "real images"."""
    used = {title for name in report.shown() for title in report.columns(name).values()}
    columns = [title for title in COLUMNS.values() if title in used]
    infos = report.metric_info.values()
    has_majority = any("majority_class" in info for info in infos)
    columns = [MAJORITY] * has_majority + columns
    return {
        "columns": columns,
        "metrics": [_metric_row(name, report, columns) for name in report.shown()],
        "has_majority": has_majority,
        "has_private": any("private" in info for info in infos),
    }


def _metric_row(name: str, report: Report, columns: list[str]) -> dict:
    info = report.metric_info[name]
    shared = {title: report.metrics[other] for other, title in report.columns(name).items()}
    shared[MAJORITY] = info.get("majority_class")
    return {
        "name": name + (" *" if "private" in info else ""),
        "value": report.metrics[name],
        "better": info["better"],
        "numbers": [*map(shared.get, columns), info.get("ceiling", info.get("real_floor"))],
        "n_real": f"{info['n_real']:,}" if info["n_real"] else "",
        "n_fake": f"{info['n_fake']:,}",
        "remarks": _remarks(info),
    }


def _remarks(info: dict) -> list[str]:
    remarks = []
    if "interval_95" in info:
        low, high = info["interval_95"]
        remarks.append(f"95 % interval {low:.2f} to {high:.2f}")
        if "ceiling" in info:
            right = round(info["ceiling"] / 100 * info["n_real"])
            low, high = accuracy_interval(right, info["n_real"])
            remarks.append(f"real images {low:.2f} to {high:.2f}")
    remarks += spread(info)
    if "std" in info and "classifiers" not in info:
        remarks.append(f"deviation {info['std']:.3g} over subsets")
    remarks += [f"standard error {info['std_error']:.3g}"] if "std_error" in info else []
    remarks += [f"epoch {info['epoch']} of {info['num_epochs']}"] if "epoch" in info else []
    remarks += ["from an earlier evaluation"] if "evaluation" in info and "unlike_now" not in info else []
    remarks += remarks_on_settings(info)
    remarks += ["fewer images than features: biased upwards"] if info.get("n_below_dim") else []
    return remarks + ([f"weights {info['weights_sha256'][:8]}"] if "weights_sha256" in info else [])


def _class_row(label: int, samples: Samples, spec: DataSpec) -> dict:
    """The name of a class, its number of samples, and the first of them."""
    name, rows = spec.class_names[label], np.flatnonzero(samples.labels == label)
    strip = _strip(samples.images[rows[:PER_CLASS]], f"samples of {name}") if len(rows) else None
    return {"name": name, "count": f"{len(rows):,}", "strip": strip}


def _strip(images: np.ndarray, description: str) -> Picture:
    """Images (N, C, H, W) uint8 side by side as one picture."""
    count, channels, height, width = images.shape
    canvas = np.full((height, count * (width + GAP) - GAP, channels), 255, np.uint8)
    for column, image in enumerate(images):
        left = column * (width + GAP)
        canvas[:, left : left + width] = image.transpose(1, 2, 0)
    factor = max(1, -(-CELL // height))
    pixels = canvas[..., 0] if channels == 1 else canvas
    return Picture(data_uri(pixels), canvas.shape[1] * factor, height * factor, description)


def _classifiers(report: Report, spec: DataSpec) -> list[dict]:
    """Accuracy per class and confusion matrix of every classifier, for its first selection."""
    first: dict[str, str] = {}
    for name in report.details:
        first.setdefault(name.split("/")[1], name)
    found = []
    for name in first.values():
        tables = report.details[name]
        counts = np.array(tables["confusion"])
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        rows = [zip(row, part, strict=True) for row, part in zip(counts.tolist(), shares, strict=True)]
        found.append(
            {
                "name": name,
                "per_class": list(zip(spec.class_names, tables["per_class"], strict=True)),
                "confusion": list(zip(spec.class_names, rows, strict=True)),
                "picture": _matrix(shares) if spec.num_classes > MAX_NUMBERS else None,
            }
        )
    return found


def _matrix(shares: np.ndarray) -> Picture:
    """Shares (K, K) in [0, 1] as a picture, 1 being black."""
    size = 4 * len(shares)
    return Picture(data_uri(np.round(255 * (1 - shares)).astype(np.uint8)), size, size, "confusion matrix")


def _memorisation(report: Report) -> dict:
    """Values that indicate copies of training images, and those that were not computed."""
    readings = memorisation_metrics()
    rows = [
        {
            "name": name,
            "value": value,
            "real": report.metric_info[name].get("real_floor"),
            "reading": readings[name.split("/")[0]],
        }
        for name, value in report.metrics.items()
        if name.split("/")[0] in readings
    ]
    computed = {row["name"].split("/")[0] for row in rows}
    return {"memorisation": rows, "not_computed": [name for name in readings if name not in computed]}


def _gallery_note(report: Report, exists: bool) -> str:
    """Where the gallery is, or why there is none."""
    if exists:
        return (
            f"Samples next to their nearest training images are in {GALLERY}. That file contains private images: do "
            f"not share it."
        )
    if "gallery" in report.missing:
        return "No gallery of nearest training images: it could not be computed, see above."
    return f"No gallery of nearest training images; set eval.gallery=private to write {GALLERY}."


def _gallery(report: Report, samples: Samples, train: Samples) -> list[tuple[Picture, Picture]]:
    """Pictures of a sample and of its nearest training images, per row."""
    return [
        (
            _strip(samples.images[[row]], "sample"),
            _strip(train.images[neighbours], "nearest training images"),
        )
        for row, neighbours in report.nearest.items()
    ]
