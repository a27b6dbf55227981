"""The report of an evaluation: values, what each value means, and what is missing and why.

An evaluation of the same samples adds to the report of an earlier one, which is read from results.json.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.spec import DataSpec, Samples
from evaluation.classifiers.recipe import RECIPE_VERSIONS
from evaluation.selection import RELEASED
from utils.artefacts import RESULTS
from utils.config import Config
from utils.errors import UserError
from utils.files import read_json
from utils.text import aligned

DETAILS = "details.json"
FEW_TEST_IMAGES = 500  # below, the 95 % interval of an accuracy can be wider than 9 points
# Values that tables show in columns of the accuracy's row, not in rows of their own: name -> title.
COLUMNS = {"balanced_accuracy": "balanced", "auroc": "AUROC"}
CONFIDENCE = 0.95  # of the interval of an accuracy
# Settings that change the values of classifiers, but not the names of the values.
CHANGING = ("recipe", "recipe_version", "protocol", "num_val", "selection_epsilon", "seed")


def accuracy_interval(num_right: int, num_images: int) -> list[float]:
    """The exact binomial confidence interval of an accuracy (Clopper & Pearson 1934), in percent.

    It covers the accuracy on further test images with a probability of at least CONFIDENCE, also if all or none of
    `num_images` are right, where resampling the test images gives an interval of length 0.
    """
    from scipy.stats import binomtest

    found = binomtest(int(num_right), num_images).proportion_ci(CONFIDENCE, method="exact")
    return [100 * float(found.low), 100 * float(found.high)]


@dataclass(frozen=True)
class Report:
    """metrics: name -> value; accuracies in percent.

    metric_info: name -> {"better", "n_real", "n_fake", ...}; "private" is present if the value is computed from private
    data or selected on private or test data without noise, and states how; "evaluation" holds the settings of an older
    evaluation if the value comes from one; "before" lists values of other settings. missing: name -> reason, with the
    command that helps. details: name -> tables that are too large for metric_info. nearest: sample -> nearest training
    images (rows), for the gallery. warnings: signs that the samples are unusable or misleading.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    metric_info: dict[str, dict] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    details: dict[str, dict] = field(default_factory=dict)
    nearest: dict[int, list[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def table(self) -> str:
        """An aligned table for the terminal, followed by missing values and warnings. A star marks non-private values,
        a caret values of an earlier evaluation. Empty columns are left out."""
        titles = ("majority class", "real images", *COLUMNS.values())
        rows = [("metric", "value", "better", *titles, "# real", "# samples")]
        rows += [self._row(name) for name in self.shown()]
        filled = [any(column[1:]) or len(rows) == 1 for column in zip(*rows, strict=True)]
        rows = [tuple(cell for cell, kept in zip(row, filled, strict=True) if kept) for row in rows]
        lines = aligned(rows, right={1, *range(3, len(rows[0]))})
        lines.insert(1, "-" * max(map(len, lines)))
        lines += self._notes(rows[0])
        if any("private" in info for info in self.metric_info.values()):
            lines.append(
                "* computed from private training images, or selected on private or test images, without DP noise"
            )
        if any("evaluation" in info for info in self.metric_info.values()):
            lines.append("^ value of an earlier evaluation of the same samples")
        for name in self.shown():
            lines += [f"  {name}: {remark}" for remark in remarks_on_settings(self.metric_info[name])]
            lines += [f"  {name}: {line}" for line in spread(self.metric_info[name])]
        lines += [f"missing: {name}: {reason}" for name, reason in self.reasons_for_missing().items()]
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)

    def _notes(self, titles: Sequence[str]) -> list[str]:
        """The meaning of the columns in `titles`."""
        lines = []
        if any(name.startswith("accuracy/") for name in self.metrics):
            line = "accuracy: percent of real test images that a classifier trained on the samples gets right"
            is_released = any(f"/{RELEASED}/" in name for name in self.metrics)
            lines.append(line + (f"; {RELEASED}: the classifier of the run itself" if is_released else ""))
        if "majority class" in titles:
            lines.append(
                "majority class: score of always predicting the most frequent class of the test images"
            )
        if "real images" in titles:
            lines.append(f"real images: their score instead of the samples; not private; {self.about_real()}")
        return lines

    def about_real(self) -> str:
        """How far the scores of real images can be trusted: they are estimated from test images."""
        infos = self.metric_info.values()
        counts = [info["n_real"] for info in infos if "ceiling" in info]
        counts += [info["n_floor"] for info in infos if "n_floor" in info]
        if not counts:
            return "estimated from test images"
        count = min(counts)
        text = f"estimated from {count:,} test images"
        if count >= FEW_TEST_IMAGES:
            return text
        low, high = accuracy_interval(count // 2, count)
        return (
            f"{text}, which are few: other test images give other scores (an accuracy by up to "
            f"{(high - low) / 2:.0f} points, 95 % interval)"
        )

    def after(self, earlier: "Report", now: dict) -> "Report":
        """This report, computed with the settings `now`, with the values of an `earlier` one about the same samples:
        those that this evaluation did not compute, and those that differed with other settings."""
        info = {}
        for name, known in earlier.metric_info.items():
            different = _differing(known["evaluation"], now) if _is_of_classifiers(known) else ""
            info[name] = {key: value for key, value in known.items() if key != "unlike_now"}
            info[name] |= {"unlike_now": different} if different else {}
        found = {
            name: value for name, value in self.metrics.items() if not self._is_narrower_mean(name, earlier)
        }
        for name, value in found.items():
            before = (
                _before(earlier, name, value, now | self.metric_info[name]) if name in earlier.metrics else []
            )
            info[name] = {**self.metric_info[name], "before": before} if before else self.metric_info[name]
        return Report(
            {**earlier.metrics, **found},
            info,
            self.missing,
            {**earlier.details, **self.details},
            self.nearest,
        )

    def _is_narrower_mean(self, name: str, earlier: "Report") -> bool:
        """Is the value a mean over one classifier, and the earlier one a mean over several?"""
        means = [report.metric_info.get(name, {}).get("classifiers", []) for report in (self, earlier)]
        return len(means[0]) == 1 < len(means[1])

    def shown(self) -> list[str]:
        """The names of the rows of a table, without means over one classifier, which repeat its value, and without
        values that have columns (COLUMNS)."""
        in_columns = {other for name in self.metrics for other in self.columns(name)}
        rows = [name for name in self.metrics if name not in in_columns]
        return [name for name in rows if len(self.metric_info[name].get("classifiers", [])) != 1]

    def reasons_for_missing(self) -> dict[str, str]:
        """What is missing -> why, and which value in the table is of another extractor or of an earlier evaluation."""
        reasons = {}
        for name, reason in self.missing.items():
            others = [known for known in self.metrics if "extractor" in self.metric_info[known]]
            others = [known for known in others if known.split("/")[0] == name.split("/")[0]]
            if others and "/" in name:
                reason += f" (the table has {', '.join(others)} of an earlier evaluation)"
            reasons[name] = reason
        return reasons

    def extractors(self) -> list[str]:
        """The extractors of the values."""
        found = (info["extractor"] for info in self.metric_info.values() if "extractor" in info)
        return list(dict.fromkeys(found))

    def columns(self, name: str) -> dict[str, str]:
        """The values that share the row of `name`: those of the same evaluation, classifier and selection -> titles."""
        kind, _, which = name.partition("/")
        if kind != "accuracy":
            return {}
        found = {f"{other}/{which}": title for other, title in COLUMNS.items()}
        return {
            other: title
            for other, title in found.items()
            if other in self.metrics
            and all(
                self.metric_info[other].get(key) == self.metric_info[name].get(key)
                for key in ("evaluation", "unlike_now")
            )
        }

    def to_dict(self) -> dict:
        """The part that results.json holds."""
        return {"metrics": self.metrics, "metric_info": self.metric_info, "missing": self.missing}

    def _row(self, name: str) -> tuple[str, ...]:
        info = self.metric_info[name]
        star = (" *" if "private" in info else "") + (" ^" if "evaluation" in info else "")
        real = info.get("ceiling", info.get("real_floor"))
        shared = {title: self.text(other, self.metrics[other]) for other, title in self.columns(name).items()}
        return (
            name + star,
            self.text(name, self.metrics[name]),
            info["better"],
            self.text(name, info["majority_class"]) if "majority_class" in info else "",
            "" if real is None else self.text(name, real),
            *(shared.get(title, "") for title in COLUMNS.values()),
            f"{info['n_real']:,}" if info["n_real"] else "",
            f"{info['n_fake']:,}",
        )

    @staticmethod
    def text(name: str, value: float) -> str:
        """A value of the metric `name`, rounded for a table."""
        percent = name.partition("/")[0] in ("accuracy", "balanced_accuracy")
        return f"{value:.2f}" if percent else f"{value:.4g}"


def spread(info: dict) -> list[str]:
    """The range of a mean over several classifiers, with their names; nothing for other values."""
    values = info.get("values", {})
    if len(values) < 2:
        return []
    low, high = min(values, key=values.get), max(values, key=values.get)
    return [f"from {values[low]:.4g} ({low}) to {values[high]:.4g} ({high}), deviation {info['std']:.3g}"]


def _is_of_classifiers(info: dict) -> bool:
    """Is it the value of a trained classifier, or a mean over classifiers?"""
    return "epoch" in info or "classifiers" in info


def _differing(settings: dict, now: dict) -> str:
    """The settings that may change a value of the same name, if they differ from those of `now`."""
    different = [key for key in CHANGING if key in settings and key in now and settings[key] != now[key]]
    return ", ".join(f"{key}={settings[key]}" for key in different)


def remarks_on_settings(info: dict) -> list[str]:
    """Differences in settings that matter if this value is compared with others in the table."""
    remarks = [f"earlier value, with {info['unlike_now']}"] if "unlike_now" in info else []
    return remarks + [f"{entry['value']:.4g} with {entry['with']}" for entry in info.get("before", [])]


def _before(earlier: Report, name: str, value: float, now: dict) -> list[dict]:
    """Earlier values of this name that differ, oldest first: with other settings than `now`, by another noisy choice,
    or for another order of the samples."""
    info = earlier.metric_info[name]
    last = {"value": earlier.metrics[name], "evaluation": info["evaluation"]}
    if "classifiers" in info:
        last["mean_of"] = info["classifiers"]
    different = {}
    for entry in [*info.get("before", []), last]:
        settings = _differing(entry["evaluation"], now) if _is_of_classifiers(info) else ""
        if entry.get("mean_of", now.get("classifiers")) != now.get("classifiers"):
            settings = ", ".join(filter(None, (settings, f"classifiers={entry['mean_of']}")))
        if settings or entry["value"] != value:
            settings = settings or "the same settings, before"
            different[settings, entry["value"]] = entry | {"with": settings}
    return list(different.values())


def evaluation_settings(config: Config) -> dict:
    """The settings that results.json keeps with the values; selection_epsilon only if a private choice is made."""
    settings = {**asdict(config.eval), "seed": config.seed}
    settings["protocol"] = config.sensitive_data.protocol
    settings["recipe_version"] = RECIPE_VERSIONS[config.eval.recipe]
    if config.eval.mode != "val":
        settings.pop("selection_epsilon", None)
    return settings


def facts_of(samples: Samples, spec: DataSpec) -> dict:
    """The facts about the samples in results.json: a digest that does not depend on their order, their number per
    class, and the real images that they are compared with (a random name of the prepared folder)."""
    pairs = zip(samples.images, samples.labels, strict=True)
    digests = sorted(
        hashlib.sha256(f"{label} {image.shape}".encode() + image.tobytes()).digest() for image, label in pairs
    )
    counts = np.bincount(samples.labels, minlength=spec.num_classes)
    digest = hashlib.sha256(b"".join(digests)).hexdigest()[:32]
    return {"samples_digest": digest, "samples_per_class": counts.tolist(), "data_identity": spec.identity}


def earlier_report(folder: Path, data_name: str, facts: dict) -> Report | None:
    """The report in `folder` about the same samples; every value carries the settings of its evaluation.

    An empty report if there is none yet; None if it is about other samples, another dataset, or real images that were
    prepared at another time. Raises UserError for a damaged file.
    """
    path = folder / RESULTS
    if not path.exists():
        return Report()
    results = read_json(path)
    try:
        known = (results["data"], results["samples_digest"], results["data_identity"])
        if known != (data_name, facts["samples_digest"], facts["data_identity"]):
            return None
        settings = {"evaluation": results["evaluation"]}
        info = {name: settings | known for name, known in results["metric_info"].items()}
        details = folder / DETAILS
        return Report(results["metrics"], info, {}, read_json(details) if details.exists() else {})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); to evaluate the samples anew: python eval.py "
            f"--images <samples> --data_name {data_name} --out <another folder>"
        ) from error
