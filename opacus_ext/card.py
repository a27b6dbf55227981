"""The privacy card: what a run's guarantee says, in plain words."""

import math
from collections.abc import Iterator

from opacus_ext.ledger import weak_delta
from utils.bounds import at_most

_RELATION = {
    "add_or_remove_one": "one record more or less",
    "replace_one": "one record replaced by another",
}


def privacy_card(report: dict) -> str:
    """Markdown from the content of privacy.json."""
    report = _of_what_was_planned(report)
    lines = ["# Privacy card", "", *_subject_lines(report), _headline(report), ""]
    lines += [
        f"- **Unit of protection**: one image with its label; neighbouring data sets differ by "
        f"{_RELATION[report['relation']]}.",
        f"- **delta**: {at_most(report['budget']['delta'])}, by which a probability may exceed what epsilon "
        f"allows (1 / (N ln N) for N images, unless privacy.delta was given).",
        f"- **Accountant**: {_accountants(report)}.",
        *_person_lines(report),
        "",
        "| stage that asks the private images | mechanism | noise multiplier | sampling rate | steps | epsilon alone |",
        "|---|---|---|---|---|---|",
        *(_row(release) for release in report["releases"]),
        "",
    ]
    if not report["releases"]:
        lines += ["No stage asks the private images.", ""]
    lines += _list("What the samples are", _samples_are(report))
    lines += _list("What they were made from, besides the private images", _made_from(report))
    lines += _selection_lines(report.get("selection", []))
    lines += _revealed_lines(report.get("revealed", []))
    lines += _list("Assumed public", report["assumptions"])
    lines += _list("What this does not cover", _caveats(report))
    lines += _list("Not for sharing", _private_files(report))
    return "\n".join(lines)


def copies_of_public(report: dict) -> list[str]:
    """A line if samples are public images as they are, else none. `report` is the content of privacy.json."""
    copies = report.get("public_copies")
    if not copies:
        return []
    total, public = sum(report["samples_per_class"]), report["public_data"]["name"]
    return [
        f"{copies:,} of {total:,} samples are images of the public set {public}, byte for byte; the private images "
        f"at most had a say in which ones: metrics of these samples judge public images"
    ]


def privacy_summary(report: dict) -> str:
    """A few lines for the terminal from the content of privacy.json; the card says more."""
    report = _of_what_was_planned(report)
    budget = report["budget"]
    if not report["private"]:
        lines = ["privacy: this run is NOT private (epsilon = inf); the samples may reveal training images"]
    elif not report["releases"]:
        lines = ["privacy: the samples do not depend on the private images at all; nothing was spent"]
    elif report.get("not_computed"):
        lines = ["privacy: the epsilon of this run could not be computed"]
    else:
        lines = [
            f"privacy: the samples are ({at_most(report['spent'])}, {at_most(budget['delta'])})-differentially private "
            f"for each image with its label ({_RELATION[report['relation']]})"
        ]
        lines += [
            f"  {release['name']}: {release['executed']:,} of {release['planned']:,} steps, epsilon "
            f"{at_most(release['epsilon_alone'])} if it were alone"
            for release in report["releases"]
        ]
    selections = report.get("selection", [])
    if selections:
        total = sum(selection["spent"] for selection in selections)
        lines.append(
            f"  choosing classifiers spent epsilon {at_most(total)} on other private images, held out for it"
        )
    return "\n".join([*lines, *(f"  warning: {line.replace('**', '')}" for line in _warnings(report))])


def _of_what_was_planned(report: dict) -> dict:
    """Without stages of no steps, as those of a run that only samples from a checkpoint."""
    return {**report, "releases": [release for release in report["releases"] if release["planned"]]}


def _subject_lines(report: dict) -> list[str]:
    """Which samples the card is about."""
    if not {"run", "data", "num_records"} <= report.keys():  # as older reports
        return []
    return [
        f"Of the samples (gen/gen.npz) of the run **{report['run']}**, whose private training images are "
        f"{report['num_records']:,} of **{report['data']}**.",
        "",
    ]


def _warnings(report: dict) -> list[str]:
    """What weakens or voids the guarantee of this very run."""
    lines = []
    if report["noise_seeded"] or any(selection["noise_seeded"] for selection in report.get("selection", [])):
        lines.append(
            "**the noise was seeded (privacy.noise_seed): anyone can remove it; the guarantee is void**"
        )
    if report.get("not_computed"):  # which older reports lack
        lines.append(
            f"**no epsilon can be claimed, for it could not be computed ({report['not_computed']})**"
        )
    if report.get("selection") and any(release.get("inherited") for release in report["releases"]):
        lines.append(
            "**the validation images may be among those that the earlier runs asked whose answers are used here: for "
            "them the epsilons of training and of choosing classifiers add up**"
        )
    if report["private"] and "num_records" in report:  # which older reports lack
        weak = weak_delta(report["budget"]["delta"], report["num_records"])
        lines += [] if weak is None else [f"**{weak}**"]
    return lines


def _headline(report: dict) -> str:
    if not report["private"]:
        return "**This run is NOT private** (epsilon = inf): the samples may reveal training images."
    if not report["releases"]:
        return "The samples do not depend on the private images at all."
    if report.get("not_computed"):
        return "**The epsilon of this run could not be computed**, so nothing is claimed about the samples."
    budget = report["budget"]
    return (
        f"The samples are **({at_most(report['spent'])}, {at_most(budget['delta'])})-differentially private** with "
        f"respect to the private training images (budget: epsilon {budget['epsilon']:g}). Whatever anyone computes "
        f"from them, {_RELATION[report['relation']]} changes the odds of any outcome by a factor of at most e^epsilon, "
        f"up to delta."
    )


def _claims_epsilon(report: dict) -> bool:
    """There is an epsilon that a guarantee for several images can be derived from."""
    return report["private"] and bool(report["releases"]) and math.isfinite(report["spent"])


def _person_lines(report: dict) -> list[str]:
    """What group privacy makes of the guarantee for a person with several images (Dwork & Roth 2014, theorem 2.2)."""
    count = report.get("images_per_person")
    if count is None or not _claims_epsilon(report):
        return []
    epsilon = report["spent"]
    log_delta = math.log(count) + (count - 1) * epsilon + math.log(report["budget"]["delta"])
    if log_delta >= 0:
        claim = "nothing is guaranteed: delta would be 1 or more; choose a smaller epsilon and delta"
    else:
        claim = f"({at_most(count * epsilon)}, {at_most(math.exp(log_delta))})-differentially private"
    return [f"- **For a person** with at most {count} of the images (see the assumptions): {claim}."]


def _accountants(report: dict) -> str:
    """Whose bound is the claim, and what others bound the same queries by; a looser bound takes nothing from it."""
    name, values = report["accountant"], report["spent_by_accountant"]
    if not (report["private"] and report["releases"]):
        return name
    found = {name: value for name, value in values.items() if isinstance(value, float)}
    if not found:
        return f"{name}; no accountant bounds this run"
    others = [f"{other} {at_most(value)}" for other, value in found.items() if other != name]
    more = (
        f"; other bounds on the same queries, which need not be as sharp: {', '.join(others)}"
        if others
        else ""
    )
    return f"{name}, whose bound is claimed above{more}"


def _row(release: dict) -> str:
    return (
        f"| {release['name']} | {release['mechanism'].replace('_', ' ')} | {release['noise_multiplier']:.4g} | "
        f"{_sampling(release)} | {release['executed']} of {release['planned']} | "
        f"{at_most(release['epsilon_alone'])} |"
    )


def _sampling(release: dict) -> str:
    bound = release["max_batch_size"]
    return f"{release['sample_rate']:.4g}" + ("" if bound is None else f", at most {bound} images")


def _list(title: str, items: list[str]) -> list[str]:
    return [f"**{title}**", "", *(f"- {item}" for item in items), ""] if items else []


def _samples_are(report: dict) -> list[str]:
    """What a person should know of the samples before they are used; nothing of it needs a look at real images."""
    counts = report.get("samples_per_class")
    if counts is None:  # not drawn yet, or in an older report
        return []
    copies = copies_of_public(report)
    if not copies and report["public_data"] is not None:
        copies = ["no sample equals a public image byte for byte"]
    low, high = min(counts), max(counts)
    labels = f"{low:,} of each class" if low == high else f"{low:,} to {high:,} of each class"
    if high - low <= 1:
        learned = (
            "learns with noise, for training alone" if report["learns_class_shares"] else "does not learn"
        )
        labels += (
            f", balanced by construction: they do not follow the classes' shares of the private images, which the "
            f"method {learned}"
        )
    return [*copies, f"labels: {labels}", *(f"warning: {line}" for line in report.get("sample_warnings", []))]


def _made_from(report: dict) -> list[str]:
    if "public_data" not in report:  # as older reports
        return []
    public, overrides = report["public_data"], report["overrides"]
    found = "public images: none"
    if public is not None:
        found = (
            f"public images: **{public['name']}**, {public['images']:,} images in {public['classes']} classes; that "
            f"they are public, and that no private image is among them, is taken on trust"
        )
    given = "not known, the run's record is damaged" if overrides is None else ", ".join(overrides) or "none"
    return [found, f"settings given on the command line: {given}"]


def _selection_lines(selections: list[dict]) -> list[str]:
    if not selections:
        return []
    total = sum(selection["spent"] for selection in selections)
    return [
        f"**Choosing classifiers** spent epsilon {at_most(total)} (delta 0) on held-out validation images, in "
        f"{len(selections)} evaluation(s). No image is in both sets of this run; the reported accuracies carry this "
        f"cost, the samples do not.",
        "",
    ]


def _revealed_lines(reasons: list[str]) -> list[str]:
    if not reasons:
        return []
    return [
        "**Shown as they are, without noise**, to the program that evaluates, after training:",
        "",
        *(f"- {reason}" for reason in dict.fromkeys(reasons)),
        "",
    ]


def _private_files(report: dict) -> list[str]:
    """What holds private images, or results computed from them without noise, and where it lies."""
    name = report.get("data", "NAME")
    return [
        "in the folder of the run: results.json, details.json, report.html, stdout.txt and private/",
        "in the folder of the prepared images: the images, meta.json and .cache, which keeps features of the images, "
        "answers of classifiers that were trained on them, and with eval.mode=val maybe copies of them "
        "(in ~/.cache/dp-image-bench/private if it is read-only)",
        "these folders are made so that only their owner can read them; do not widen their rights",
        f"`python scripts/prepare_data.py --forget {name}` removes the prepared images with all features and copies, "
        f"and names the runs on them",
    ]


def _group_lines(report: dict) -> Iterator[str]:
    """What several images of one person do to the guarantee."""
    yield (
        "several images of one person count as several records: for k of them epsilon becomes k x epsilon, and delta "
        "k x exp((k - 1) x epsilon) x delta; to protect a person choose both for that"
    )
    if _claims_epsilon(report):
        limit = unprotected_group(report["spent"], report["budget"]["delta"])
        yield (
            f"**for a person with {limit} or more images nothing is guaranteed**: at this epsilon and delta, the delta "
            f"of {limit} images is 1 or more"
        )


def unprotected_group(epsilon: float, delta: float) -> int:
    """The least number of records k whose group delta, k exp((k - 1) epsilon) delta, is 1 or more. delta > 0."""
    low, high = 0, math.ceil(1 / delta)  # that many suffice at any epsilon
    while high - low > 1:
        middle = (low + high) // 2
        enough = math.log(middle) + (middle - 1) * epsilon + math.log(delta) >= 0
        low, high = (low, middle) if enough else (middle, high)
    return high


def _caveats(report: dict) -> list[str]:
    return [
        *_warnings(report),
        *_group_lines(report),
        "the noise comes from a generator keyed by the operating system and is rounded to a grid together with the "
        "sums, against attacks on floating-point rounding; duration and memory of the run are not protected",
        "the metrics in results.json, details.json, report.html and stdout.txt compare with real images without noise; "
        "publish these files only if that is acceptable. The test images are protected by nothing: accuracies and "
        "confusion tables are of them",
    ]
