"""What an evaluation found: values, what each value means, and what could not be computed and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.text import aligned

# What a table for a person shows in columns of the row of accuracy, not in rows of their own: name -> title.
BESIDE_ACCURACY = {"balanced_accuracy": "balanced", "auroc": "AUROC"}
# Settings that change what classifiers find, but not the names of the values.
CHANGING = ("recipe", "recipe_version", "protocol", "num_val", "selection_epsilon", "seed")


@dataclass(frozen=True)
class Report:
    """metrics: name -> value; accuracies in percent.

    metric_info: name -> {"better", "n_real", "n_fake", ...}; "private" is there when the number comes from private or
    test data without noise, and says how; "evaluation" when an earlier evaluation found it, with the settings of that
    one; "before" lists values that other settings gave. missing: name -> reason, with the command that helps.
    details: name -> tables that are too large for metric_info. nearest: sample -> nearest training images (rows), for
    the gallery. warnings: signs that the samples are of no use or not what they seem.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    metric_info: dict[str, dict] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    details: dict[str, dict] = field(default_factory=dict)
    nearest: dict[int, list[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def table(self) -> str:
        """An aligned table for the terminal, missing values and warnings last. A star marks non-private numbers, a
        caret those of an earlier evaluation. Columns without a value are left out."""
        titles = ("majority class", "real images", *BESIDE_ACCURACY.values())
        rows = [("metric", "value", "better", *titles, "# real", "# samples")]
        rows += [self._row(name) for name in self.shown()]
        filled = [any(column[1:]) or len(rows) == 1 for column in zip(*rows, strict=True)]
        rows = [tuple(cell for cell, kept in zip(row, filled, strict=True) if kept) for row in rows]
        lines = aligned(rows, right={1, *range(3, len(rows[0]))})
        lines.insert(1, "-" * max(map(len, lines)))
        lines += self._notes(rows[0])
        if any("private" in info for info in self.metric_info.values()):
            lines.append(
                "* reads private training images, or chooses by private or test images, without noise"
            )
        if any("evaluation" in info for info in self.metric_info.values()):
            lines.append("^ found by an earlier evaluation of the same samples")
        for name in self.shown():
            lines += [f"  {name}: {remark}" for remark in remarks_on_settings(self.metric_info[name])]
            lines += [f"  {name}: {line}" for line in spread(self.metric_info[name])]
        lines += [f"missing: {name}: {reason}" for name, reason in self.missing.items()]
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)

    def _notes(self, titles: Sequence[str]) -> list[str]:
        """What the columns that are shown mean."""
        lines = []
        if any(name.startswith("accuracy/") for name in self.metrics):
            lines.append(
                "accuracy: percent of real test images that a classifier trained on the samples recognises"
            )
        if "majority class" in titles:
            lines.append(
                "majority class: what the most frequent class of the test images as the only answer scores"
            )
        if "real images" in titles:
            lines.append("real images: what they score in the place of the samples; not private")
        return lines

    def after(self, earlier: "Report", now: dict) -> "Report":
        """This report, which was found with the settings `now`, with what `earlier` found about the same samples: what
        this evaluation was not asked for, and values that were different with other settings."""
        info = {}
        for name, known in earlier.metric_info.items():
            words = _unlike(known["evaluation"], now) if _of_classifiers(known) else ""
            info[name] = (
                {**known, "unlike_now": words}
                if words
                else {k: v for k, v in known.items() if k != "unlike_now"}
            )
        found = {name: value for name, value in self.metrics.items() if not self._says_less(name, earlier)}
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

    def _says_less(self, name: str, earlier: "Report") -> bool:
        """Is the value a mean over one classifier, where there is one over several?"""
        means = [report.metric_info.get(name, {}).get("classifiers", []) for report in (self, earlier)]
        return len(means[0]) == 1 < len(means[1])

    def shown(self) -> list[str]:
        """The names of the rows for a person: a mean over one classifier only says its accuracy again, and values of
        BESIDE_ACCURACY have columns."""
        beside = {of for name in self.metrics for of in self.beside(name)}
        rows = [name for name in self.metrics if name not in beside]
        return [name for name in rows if len(self.metric_info[name].get("classifiers", [])) != 1]

    def beside(self, name: str) -> dict[str, str]:
        """What is shown in the row of the value `name`: names of the same evaluation's values of the same classifier
        and selection -> titles of their columns."""
        kind, _, which = name.partition("/")
        if kind != "accuracy":
            return {}
        found = {f"{other}/{which}": title for other, title in BESIDE_ACCURACY.items()}
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
        """What results.json holds."""
        return {"metrics": self.metrics, "metric_info": self.metric_info, "missing": self.missing}

    def _row(self, name: str) -> tuple[str, ...]:
        info = self.metric_info[name]
        star = (" *" if "private" in info else "") + (" ^" if "evaluation" in info else "")
        real = info.get("ceiling", info.get("real_floor"))
        beside = {title: self.text(other, self.metrics[other]) for other, title in self.beside(name).items()}
        return (
            name + star,
            self.text(name, self.metrics[name]),
            info["better"],
            self.text(name, info["majority_class"]) if "majority_class" in info else "",
            "" if real is None else self.text(name, real),
            *(beside.get(title, "") for title in BESIDE_ACCURACY.values()),
            f"{info['n_real']:,}",
            f"{info['n_fake']:,}",
        )

    @staticmethod
    def text(name: str, value: float) -> str:
        """A value of the metric `name` for a person."""
        percent = name.partition("/")[0] in ("accuracy", "balanced_accuracy")
        return f"{value:.2f}" if percent else f"{value:.4g}"


def spread(info: dict) -> list[str]:
    """Of a mean over several classifiers: how far apart they are, and which is which."""
    values = info.get("values", {})
    if len(values) < 2:
        return []
    low, high = min(values, key=values.get), max(values, key=values.get)
    return [f"from {values[low]:.4g} ({low}) to {values[high]:.4g} ({high}), deviation {info['std']:.3g}"]


def _of_classifiers(info: dict) -> bool:
    """Is the value about a trained classifier, or a mean over such?"""
    return "epoch" in info or "classifiers" in info


def _unlike(settings: dict, now: dict) -> str:
    """The settings of an evaluation that may change a value of the same name, where they are not those of `now`."""
    different = [key for key in CHANGING if key in settings and key in now and settings[key] != now[key]]
    return ", ".join(f"{key}={settings[key]}" for key in different)


def remarks_on_settings(info: dict) -> list[str]:
    """What a person must know who compares this value with its neighbours in the table."""
    remarks = [f"found earlier with {info['unlike_now']}"] if "unlike_now" in info else []
    return remarks + [f"{entry['value']:.4g} with {entry['with']}" for entry in info.get("before", [])]


def _before(earlier: Report, name: str, value: float, now: dict) -> list[dict]:
    """Other values of this name that were found before, the oldest first: with other settings than `now`, by another
    noisy choice, or of the same samples in another order."""
    info = earlier.metric_info[name]
    last = {"value": earlier.metrics[name], "evaluation": info["evaluation"]}
    if "classifiers" in info:
        last["mean_of"] = info["classifiers"]
    different = {}
    for entry in [*info.get("before", []), last]:
        words = _unlike(entry["evaluation"], now) if _of_classifiers(info) else ""
        if entry.get("mean_of", now.get("classifiers")) != now.get("classifiers"):
            words = ", ".join(filter(None, (words, f"classifiers={entry['mean_of']}")))
        if words or entry["value"] != value:
            words = words or "the same settings, before"
            different[words, entry["value"]] = entry | {"with": words}
    return list(different.values())
