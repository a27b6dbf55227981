"""The privacy card: what a run's guarantee says, in plain words."""

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
        "",
        "| stage that asks the private images | mechanism | noise multiplier | sampling rate | steps | epsilon alone |",
        "|---|---|---|---|---|---|",
        *(_row(release) for release in report["releases"]),
        "",
    ]
    if not report["releases"]:
        lines += ["No stage asks the private images.", ""]
    lines += _selection_lines(report.get("selection", []))
    lines += _revealed_lines(report.get("revealed", []))
    lines += ["**Assumed public**", "", *(f"- {line}" for line in report["assumptions"]), ""]
    lines += ["**What this does not cover**", "", *(f"- {line}" for line in _caveats(report)), ""]
    return "\n".join(lines)


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


def _caveats(report: dict) -> list[str]:
    return [
        *_warnings(report),
        "several images of one person count as several records: for k of them epsilon becomes k x epsilon, and delta "
        "k x exp((k - 1) x epsilon) x delta; to protect a person choose both for that",
        "the noise comes from a generator keyed by the operating system and is rounded to a grid together with the "
        "sums, against attacks on floating-point rounding; duration and memory of the run are not protected",
        "the metrics in results.json, details.json, report.html and stdout.txt compare with real images without noise; "
        "publish these files only if that is acceptable. The test images are protected by nothing: accuracies and "
        "confusion tables are of them",
    ]
