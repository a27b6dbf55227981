"""What an evaluation found: values, what each value means, and what could not be computed and why."""

from dataclasses import dataclass, field

from utils.table import aligned

# Settings that change what classifiers find, but not the names of the values.
CHANGING = ("recipe", "recipe_version", "num_val", "selection_epsilon", "seed")


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
        caret those of an earlier evaluation."""
        header = ("metric", "value", "better", "# real", "# samples")
        rows = [self._row(name) for name in self.shown()]
        lines = aligned([header, *rows], right=(1, 3, 4))
        lines.insert(1, "-" * len(lines[0]))
        if any(name.startswith("accuracy/") for name in self.metrics):
            lines.append(
                "accuracy: percent of real test images that a classifier trained on the samples recognises"
            )
        if any("private" in info for info in self.metric_info.values()):
            lines.append(
                "* reads private training images, or chooses by private or test images, without noise"
            )
        if any("evaluation" in info for info in self.metric_info.values()):
            lines.append("^ found by an earlier evaluation of the same samples")
        for name in self.shown():
            lines += [f"  {name}: {remark}" for remark in remarks_on_settings(self.metric_info[name])]
        lines += [f"missing: {name}: {reason}" for name, reason in self.missing.items()]
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)

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
        """The names for a person: a mean over one classifier only says its accuracy again."""
        return [name for name in self.metrics if len(self.metric_info[name].get("classifiers", [])) != 1]

    def to_dict(self) -> dict:
        """What results.json holds."""
        return {"metrics": self.metrics, "metric_info": self.metric_info, "missing": self.missing}

    def _row(self, name: str) -> tuple[str, ...]:
        info = self.metric_info[name]
        star = (" *" if "private" in info else "") + (" ^" if "evaluation" in info else "")
        value = f"{self.metrics[name]:.2f}" if name.startswith("accuracy/") else f"{self.metrics[name]:.4g}"
        return name + star, value, info["better"], f"{info['n_real']:,}", f"{info['n_fake']:,}"


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
