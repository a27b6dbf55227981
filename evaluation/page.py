"""report.html: one page with everything about an evaluation, without a link to anywhere else.

The page shows samples and numbers, and no real image. The gallery of nearest training images does, so it is a page of
its own in private/, written only when it is asked for; who asks for it in report.html gets a page that says what it is.
"""

import base64
import html
import io
import re
from pathlib import Path

import numpy as np

from data.spec import DataSpec, Samples
from evaluation.registry import needs_of
from evaluation.report import BESIDE_ACCURACY, Report, remarks_on_settings, spread
from utils.files import write_json, write_text

REPORT, DETAILS, GALLERY = "report.html", "details.json", "private/nearest.html"
PER_CLASS = 12  # samples shown of a class
CELL = 48  # least height of an image on the screen, in CSS pixels
MAJORITY = "majority class"  # title of a column
GAP = 1  # pixels between the images of a strip
CONTAINS_PRIVATE = "<b>Contains training images: do not share, unless they are public.</b>"
CARD_NOTE = (
    "<p class='note'>The card as it was when this page was written; privacy_card.md and privacy.json beside it know "
    "also what was asked since then.</p>"
)
MEMORISATION = {
    "authpct": "about 50 for fresh images, 0 for copies of training images",
    "nn_ratio": "1 where the training images left no trace, lower for copies",
    "fld_gap": "about 0 for fresh images, far below 0 for copies",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .2rem .7rem; text-align: left; }
th { border-bottom: 2px solid #999; font-weight: 600; } td { border-bottom: 1px solid #eee; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td:not(.note) { white-space: nowrap; }
.scroll { overflow-x: auto; } .note { color: #666; font-size: .9rem; } .warn { color: #9a3412; }
.red { color: #fff; background: #b91c1c; padding: .4rem .8rem; }
img { image-rendering: pixelated; display: block; }
.confusion td { text-align: right; padding: .15rem .4rem; border: 1px solid #fff; font-size: .85rem; }
.bar { background: #3b82f6; height: .7rem; display: block; }
"""


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

    `card` is the privacy card of a run, as Markdown; `results` is what results.json will say. The gallery "report" is
    in report.html, which is then private too.
    """
    write_json(folder / DETAILS, report.details)
    shown = _gallery(report, samples, train) if report.nearest else None
    embedded = shown is not None and gallery == "report"
    if shown is not None and not embedded:
        page = _document(f"{title}: nearest training images", f"<p class='red'>{CONTAINS_PRIVATE}</p>{shown}")
        write_text(folder / GALLERY, page, private=True)
    sections = [
        f"<p class='red'>{CONTAINS_PRIVATE}</p>" if embedded else "",
        _head(samples, spec),
        *(f"<p class='warn'><b>Warning:</b> {html.escape(line)}.</p>" for line in report.warnings),
        _about(results),
        _metrics(report),
        _grid(samples, spec),
        *_classes(report, spec),
        _nearest(report, shown if embedded else None, (folder / GALLERY).exists()),
        "" if card is None else f"<h2>Privacy</h2>{CARD_NOTE}{markdown(card)}",
    ]
    write_text(folder / REPORT, _document(title, "\n".join(sections)))


def public_set(public: dict | None) -> str:
    """The public set of a run, as results.json has it."""
    if public is None:
        return "none"
    return f"{public['name']}: {public['images']:,} images in {public['classes']} classes"


def markdown(text: str) -> str:
    """The little Markdown that the privacy card uses as HTML: headings, lists, tables, bold."""
    lines, kind = [], ""
    for line in [*text.splitlines(), ""]:
        now = "ul" if line.startswith("- ") else "table" if line.startswith("|") else ""
        if now != kind:
            lines += [f"</{kind}>"] if kind else []
            lines += [f"<{now}>"] if now else []
            kind = now
        lines.append(_markdown_line(line, now))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", "\n".join(filter(None, lines)))


def data_uri(pixels: np.ndarray) -> str:
    """(H, W) or (H, W, 3) uint8 -> a PNG as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _markdown_line(line: str, kind: str) -> str:
    if kind == "ul":
        return f"<li>{html.escape(line[2:])}</li>"
    if kind == "table":
        cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
        rule = all(set(cell) <= set("-:") for cell in cells)
        return "" if rule else "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    if line.startswith("#"):
        return f"<h3>{html.escape(line.lstrip('# '))}</h3>"
    return f"<p>{html.escape(line)}</p>" if line else ""


def _document(title: str, body: str) -> str:
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<link rel='icon' href='data:,'><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _head(samples: Samples, spec: DataSpec) -> str:
    counts = np.bincount(samples.labels, minlength=spec.num_classes)
    absent = [spec.class_names[label] for label in np.flatnonzero(counts == 0)]
    text = f"{len(samples):,} images in {spec.num_classes - len(absent)} of {spec.num_classes} classes, "
    text += f"{spec.resolution} x {spec.resolution}, {'grey' if spec.channels == 1 else 'colour'}."
    line = f"<p>{text}</p>"
    if absent:
        line += f"<p class='warn'>No image of class {html.escape(', '.join(absent))}.</p>"
    return line


def _about(results: dict) -> str:
    """What was run and how it was judged, in one table."""
    judged = results["evaluation"]
    rows = {}
    if results["images"] is None:
        borrowed = f", settings of epsilon {results['preset_tier']}" if results["borrowed"] else ""
        rows["training"] = f"preset {results['preset']}{borrowed}, seed {results['seed']}"
        rows["settings given"] = " ".join(results["overrides"] or []) or "none"
        if "public_data" in results:  # which older runs did not record
            rows["public images"] = public_set(results["public_data"])
    rows["judged"] = f"{results['judged']}, seed {judged['seed']}"
    if "classifiers" in needs_of(judged["metrics"]):
        rows["classifiers"] = (
            f"{', '.join(judged['classifiers'])}; recipe {judged['recipe']}, eval.mode={judged['mode']}"
        )
    rows["extractor"] = judged["extractor"]
    rows["toolkit"] = (results["git"] or "no checkout")[:12]
    cells = "".join(
        f"<tr><td>{key}</td><td class='note'>{html.escape(text)}</td></tr>" for key, text in rows.items()
    )
    return f"<table>{cells}</table>"


def _metrics(report: Report) -> str:
    """The table of values, and what is missing."""
    beside = {title for name in report.shown() for title in report.beside(name).values()}
    columns = [title for title in BESIDE_ACCURACY.values() if title in beside]
    if any("majority_class" in info for info in report.metric_info.values()):
        columns.insert(0, MAJORITY)
    head = "<tr><th>metric</th><th class='n'>value</th><th>better</th>"
    head += "".join(
        f"<th class='n'>{title}</th>" for title in (*columns, "real images", "# real", "# samples")
    )
    rows = "".join(_metric_row(name, report, columns) for name in report.shown())
    text = f"<h2>Metrics</h2><div class='scroll'><table>{head}<th>remarks</th></tr>{rows}</table></div>"
    text += (
        "<p class='note'>Real images: what they score in the place of the samples, the best to hope for. For "
    )
    text += "classifiers these are the training images (eval.ceiling), for other metrics test images, whose number "
    text += "differs from that of the samples, and some metrics depend on it. This column is not private."
    if MAJORITY in columns:
        text += " Majority class: what the most frequent class of the test images scores as the only answer."
    if any("private" in info for info in report.metric_info.values()):
        text += " * reads private training images, or chooses by private or test images, without noise."
    text += "</p>"
    if report.missing:
        items = "".join(
            f"<li><b>{html.escape(name)}</b>: {html.escape(reason)}</li>"
            for name, reason in report.missing.items()
        )
        text += f"<p>Missing:</p><ul>{items}</ul>"
    return text


def _metric_row(name: str, report: Report, columns: list[str]) -> str:
    """One row of the table of values; `columns` are the titles after that of the direction."""
    info = report.metric_info[name]
    arrow = {"higher": "&#9650; higher", "lower": "&#9660; lower"}[info["better"]]
    remarks = []
    if "interval_95" in info:
        low, high = info["interval_95"]
        remarks.append(f"95 % interval {low:.2f} to {high:.2f}")
    remarks += spread(info)
    if "std" in info and "classifiers" not in info:
        remarks.append(f"deviation {info['std']:.3g} over subsets")
    remarks += [f"standard error {info['std_error']:.3g}"] if "std_error" in info else []
    remarks += [f"epoch {info['epoch']} of {info['num_epochs']}"] if "epoch" in info else []
    remarks += ["found by an earlier evaluation"] if "evaluation" in info and "unlike_now" not in info else []
    remarks += remarks_on_settings(info)
    remarks += ["fewer images than features: biased upwards"] if info.get("n_below_dim") else []
    remarks += [f"weights {info['weights_sha256'][:8]}"] if "weights_sha256" in info else []
    beside = {title: report.metrics[other] for other, title in report.beside(name).items()}
    beside |= {MAJORITY: info["majority_class"]} if "majority_class" in info else {}
    numbers = [*(beside.get(title) for title in columns), info.get("ceiling", info.get("real_floor"))]
    texts = ["" if number is None else f"{number:.4g}" for number in numbers]
    texts += [f"{info['n_real']:,}", f"{info['n_fake']:,}"]
    cells = "".join(f"<td class='n'>{text}</td>" for text in texts)
    star = " *" if "private" in info else ""
    return (
        f"<tr><td>{html.escape(name)}{star}</td><td class='n'><b>{report.metrics[name]:.4g}</b></td><td>{arrow}</td>"
        f"{cells}"
        f"<td class='note'>{html.escape('; '.join(remarks))}</td></tr>"
    )


def _grid(samples: Samples, spec: DataSpec) -> str:
    """One row per class: its name, its number of samples, and the first of them."""
    rows = []
    for label, name in enumerate(spec.class_names):
        chosen = np.flatnonzero(samples.labels == label)
        strip = _strip(samples.images[chosen[:PER_CLASS]], f"samples of {name}") if len(chosen) else "none"
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td class='n'>{len(chosen):,}</td><td>{strip}</td></tr>"
        )
    head = "<tr><th>class</th><th class='n'>number</th><th>samples</th></tr>"
    return f"<h2>Samples</h2><div class='scroll'><table>{head}{''.join(rows)}</table></div>"


def _strip(images: np.ndarray, description: str) -> str:
    """Images (N, C, H, W) uint8 beside each other as one picture."""
    count, channels, height, width = images.shape
    canvas = np.full((height, count * (width + GAP) - GAP, channels), 255, np.uint8)
    for column, image in enumerate(images):
        left = column * (width + GAP)
        canvas[:, left : left + width] = image.transpose(1, 2, 0)
    factor = max(1, -(-CELL // height))
    pixels = canvas[..., 0] if channels == 1 else canvas
    return (
        f"<img alt='{html.escape(description)}' width='{canvas.shape[1] * factor}' height='{height * factor}' "
        f"src='{data_uri(pixels)}'>"
    )


def _classes(report: Report, spec: DataSpec) -> list[str]:
    """Per-class accuracy and confusion matrix of every classifier, for its first selection."""
    shown: dict[str, str] = {}
    for name in report.details:
        shown.setdefault(name.split("/")[1], name)
    sections = []
    for name in shown.values():
        tables = report.details[name]
        sections.append(
            f"<h2>Classes: {html.escape(name)}</h2>{_per_class(tables['per_class'], spec)}"
            f"{_confusion(np.array(tables['confusion']), spec)}"
        )
    return sections


def _per_class(percents: list[float | None], spec: DataSpec) -> str:
    rows = []
    for name, percent in zip(spec.class_names, percents, strict=True):
        value = "no test image" if percent is None else f"{percent:.1f} %"
        bar = f"<span class='bar' style='width:{(percent or 0) * 2:.0f}px'></span>"
        rows.append(f"<tr><td>{html.escape(name)}</td><td class='n'>{value}</td><td>{bar}</td></tr>")
    return f"<table><tr><th>class</th><th class='n'>accuracy</th><th></th></tr>{''.join(rows)}</table>"


def _confusion(counts: np.ndarray, spec: DataSpec) -> str:
    """Counts (K, K), shaded by their share of the row; a picture where there are too many classes for numbers."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    note = "<p class='note'>Confusion matrix: rows are true classes, columns predicted ones.</p>"
    if spec.num_classes > 20:
        pixels = np.round(255 * (1 - shares)).astype(np.uint8)
        size = 4 * spec.num_classes
        return f"{note}<img alt='confusion matrix' width='{size}' height='{size}' src='{data_uri(pixels)}'>"
    names = [html.escape(name) for name in spec.class_names]
    rows = ["<tr><th></th>" + "".join(f"<th class='n'>{name}</th>" for name in names) + "</tr>"]
    for name, row, row_shares in zip(names, counts, shares, strict=True):
        cells = "".join(
            f"<td style='background:rgba(59,130,246,{share:.2f})'>{count}</td>"
            for count, share in zip(row, row_shares, strict=True)
        )
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    return f"{note}<div class='scroll'><table class='confusion'>{''.join(rows)}</table></div>"


def _nearest(report: Report, gallery: str | None, beside: bool) -> str:
    """The section about copies: the metrics of memorisation, and the gallery or, with `beside`, where it is."""
    where = "The gallery of samples beside their nearest training images is "
    if beside:
        where += f"in {GALLERY}; it contains private images, so it is no part of this page. Do not share it."
    elif "gallery" in report.missing:
        where += "not there: eval.gallery could not be computed."
    else:
        where += f"not there: eval.gallery=private writes {GALLERY}."
    head = (
        "<tr><th>metric</th><th class='n'>value</th><th class='n'>real test images</th><th>reads as</th></tr>"
    )
    found = [name for name in report.metrics if name.split("/")[0] in MEMORISATION]
    rows = "".join(_memorisation_row(name, report) for name in found)
    absent = [name for name in MEMORISATION if name not in {full.split("/")[0] for full in found}]
    text = "<h2>Nearest neighbours</h2><p class='warn'><b>Not a privacy proof.</b> Copies may hide where nothing here "
    text += "shows them. What bounds the influence of a training image is epsilon.</p>"
    text += f"<table>{head}{rows}</table>" if rows else ""
    if absent:
        text += (
            f"<p class='note'>Not computed: {', '.join(absent)}; --metrics or eval.metrics asks for them.</p>"
        )
    return text + (gallery or f"<p class='note'>{where}</p>")


def _memorisation_row(name: str, report: Report) -> str:
    info = report.metric_info[name]
    floor = f"{info['real_floor']:.4g}" if "real_floor" in info else ""
    return (
        f"<tr><td>{html.escape(name)}</td><td class='n'><b>{report.metrics[name]:.4g}</b></td>"
        f"<td class='n'>{floor}</td><td class='note'>{MEMORISATION[name.split('/')[0]]}</td></tr>"
    )


def _gallery(report: Report, samples: Samples, train: Samples) -> str:
    rows = [
        f"<tr><td>{_strip(samples.images[[row]], 'sample')}</td>"
        f"<td>{_strip(train.images[neighbours], 'nearest training images')}</td></tr>"
        for row, neighbours in report.nearest.items()
    ]
    return (
        "<p class='note'>The samples of each class that are nearest to a training image, by one extractor's features: "
        "not a privacy proof.</p>"
        f"<table><tr><th>sample</th><th>nearest training images, the nearest first</th></tr>{''.join(rows)}</table>"
    )
