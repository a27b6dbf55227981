"""Available metrics, extractors and classifiers, and the plan of an evaluation: eval.py --list and --dry_run."""

from pathlib import Path

from evaluation.registry import CLASSIFIERS, METRICS, Metric, load_metrics, need_classifiers
from extractors import EXTRACTORS
from utils.config import Config
from utils.errors import Unavailable


def listing(weights_root: Path) -> str:
    """All metrics, extractors and classifiers, one per line: "ready", or what to install or fetch."""
    load_metrics()
    metrics = sorted({METRICS.resolve(name) for name in METRICS}, key=lambda entry: entry.name)
    lines = ["metrics (eval.metrics, --metrics)"]
    lines += [line for entry in metrics for line in _metric_lines(entry, weights_root)]
    lines += ["", "extractors (eval.extractor)"]
    lines += [f"  {name:<22}{_state(EXTRACTORS.resolve(name).check, weights_root)}" for name in EXTRACTORS]
    lines += ["", "classifiers (eval.classifiers)", *(f"  {name:<22}ready" for name in CLASSIFIERS)]
    return "\n".join(lines)


def missing_requirements(names: list[str], extractor: str, weights_root: Path) -> list[str]:
    """The metrics that cannot be computed on this machine: one line per reason, with the fix."""
    load_metrics()
    found: dict[str, list[str]] = {}
    for entry in dict.fromkeys(METRICS.resolve(name) for name in names):
        needed = entry.extractor or (extractor if entry.uses_extractor else None)
        checks = [EXTRACTORS.resolve(needed).check if needed else None, entry.check]
        reasons = filter(None, (_reason(check, weights_root) for check in checks if check))
        for reason in reasons:
            found.setdefault(reason, []).append(entry.name)
    return [f"{', '.join(metrics)}: {reason}" for reason, metrics in found.items()]


def evaluation_line(config: Config) -> str:
    """The metrics, how the epochs of classifiers are selected, and the privacy cost of that."""
    settings = config.eval
    choice = {
        "val": f"on {config.sensitive_data.num_val:,} private images that training does not see; costs these images "
        f"epsilon {settings.selection_epsilon:g} of their own (eval.selection_epsilon)",
        "syn": "on samples; costs no epsilon",
        "sen": "on the test images, which is not private",
    }
    if not need_classifiers(settings.metrics):
        return f"evaluation: {', '.join(settings.metrics) or 'none'}; costs no epsilon"
    return (
        f"evaluation: {', '.join(settings.metrics)}; epochs of classifiers are selected {choice[settings.mode]} "
        f"(eval.mode={settings.mode})"
    )


def _metric_lines(entry: Metric, weights_root: Path) -> list[str]:
    """One line per value of the metric."""
    check = EXTRACTORS.resolve(entry.extractor).check if entry.extractor else entry.check
    state = _state(check, weights_root) if check else "ready"
    if entry.extractor:
        state += f"; by extractor {entry.extractor}"
    elif "sample_logits" in entry.needs:
        state = "ready if an extractor with class probabilities is (inception, efficientnet_lite0)"
    elif entry.uses_extractor and state == "ready":
        state = "ready if eval.extractor is, see below"
    minimum = f"; at least {entry.min_images} images" if entry.min_images > 1 else ""
    return [f"  {name:<22}{better} is better; {state}{minimum}" for name, better in entry.better.items()]


def _state(check, weights_root: Path) -> str:
    reason = _reason(check, weights_root)
    return "ready" if reason is None else f"missing: {reason}"


def _reason(check, weights_root: Path) -> str | None:
    try:
        check(weights_root)
    except Unavailable as reason:
        return str(reason)
    return None
