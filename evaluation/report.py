"""What an evaluation found: values, what each value means, and what could not be computed and why."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """metrics: name -> value; accuracies in percent.

    metric_info: name -> {"better", "n_real", "n_fake", ...}; "private" is there when the number comes from private or
    test data without noise, and says how; "evaluation" when an earlier evaluation found it, with the settings of that
    one. missing: name -> reason, with the command that helps. details: name -> tables
    that are too large for metric_info. nearest: sample -> nearest training images (rows), for the gallery.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    metric_info: dict[str, dict] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    details: dict[str, dict] = field(default_factory=dict)
    nearest: dict[int, list[int]] = field(default_factory=dict)

    def table(self) -> str:
        """An aligned table for the terminal, missing values last. A star marks non-private numbers, a caret those of an
        earlier evaluation."""
        header = ("metric", "value", "better", "# real", "# samples")
        rows = [self._row(name) for name in self.shown()]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [_aligned(row, widths) for row in [header, *rows]]
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
        lines += [f"missing: {name}: {reason}" for name, reason in self.missing.items()]
        return "\n".join(lines)

    def after(self, earlier: "Report") -> "Report":
        """This report, with what `earlier` found about the same samples and this evaluation was not asked for."""
        judged = {*self.metrics, *self.missing}
        kept = {name: value for name, value in earlier.metrics.items() if name not in judged}
        # Where all of them failed, accuracies were missing under one name.
        found = {name.split("/")[0] for name in self.metrics} | ({"gallery"} if self.nearest else set())
        absent = {name: reason for name, reason in earlier.missing.items() if name not in judged | found}
        return Report(
            {**kept, **self.metrics},
            {**{name: earlier.metric_info[name] for name in kept}, **self.metric_info},
            {**absent, **self.missing},
            {**{name: earlier.details[name] for name in kept if name in earlier.details}, **self.details},
            self.nearest,
        )

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


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        f"{cell:<{width}}" if column in (0, 2) else f"{cell:>{width}}"
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
