"""The privacy card: a run's guarantee in plain English."""

import math
from collections.abc import Iterator

from opacus_ext.ledger import weak_delta
from utils.artefacts import CLASSIFIER, SAMPLES
from utils.text import at_most

RELATION = {
    "add_or_remove_one": "one record more or less",
    "replace_one": "one record replaced by another",
}


def privacy_card(report: dict) -> str:
    """Markdown from the content of privacy.json."""
    report = _without_empty_stages(report)
    lines = ["# Privacy card", "", *_subject_lines(report), _headline(report), ""]
    lines += [
        f"- **Unit of protection**: one image with its label; neighbouring data sets differ by "
        f"{RELATION[report['relation']]}.",
        f"- **delta**: {at_most(report['budget']['delta'])}, the amount by which a probability may exceed what "
        f"epsilon allows (1 / (N ln N) for N images, unless privacy.delta is set).",
        f"- **Accountant**: {_accountants(report)}.",
        *_person_lines(report),
        "",
        "| stage (private query) | mechanism | noise multiplier | sampling rate | steps | epsilon alone |",
        "|---|---|---|---|---|---|",
        *(_row(release) for release in report["releases"]),
        "",
    ]
    if not report["releases"]:
        lines += ["No stage queries the private images.", ""]
    lines += _list("What the samples are", _samples_are(report))
    lines += _list("Other inputs, in addition to the private images", _made_from(report))
    lines += _selection_lines(report.get("selection", []))
    lines += _revealed_lines(report["revealed"])
    lines += _list("Assumed public", report["assumptions"])
    lines += _list("What this does not cover", _caveats(report))
    lines += _list("Weights and previews", _weights_are(report))
    lines += _list("Not for sharing", _private_files(report))
    return "\n".join(lines)


def copies_of_public(report: dict) -> list[str]:
    """One line if samples are unchanged public images, else none. `report` is the content of privacy.json."""
    copies = report.get("public_copies")
    if not copies:
        return []
    total, public = sum(report["samples_per_class"]), report["public_data"]["name"]
    return [
        f"{copies:,} of {total:,} samples are images of the public set {public}, byte for byte; the private images "
        f"influenced at most which ones: metrics of these samples measure public images"
    ]


def privacy_summary(report: dict) -> str:
    """A few lines for the terminal from the content of privacy.json; the card has the details."""
    report = _without_empty_stages(report)
    budget = report["budget"]
    if not report["private"]:
        lines = [
            f"privacy: this run is NOT private (epsilon = inf); {_products(report)} may reveal training images"
        ]
    elif not report["releases"]:
        lines = [
            f"privacy: {_products(report)} do not depend on the private images at all; nothing was spent"
        ]
    elif report["not_computed"]:
        lines = ["privacy: the epsilon of this run could not be computed"]
    else:
        lines = [
            f"privacy: {_products(report)} are ({at_most(report['spent'])}, {at_most(budget['delta'])})-differentially "
            f"private for each image with its label ({RELATION[report['relation']]})"
        ]
        lines += [
            f"  {release['name']}: {release['executed']:,} of {release['planned']:,} steps, epsilon "
            f"{at_most(release['epsilon_alone'])} if run alone"
            for release in report["releases"]
        ]
    selections = report.get("selection", [])
    if selections:
        total = sum(selection["spent"] for selection in selections)
        lines.append(
            f"  choosing classifiers spent epsilon {at_most(total)} on other private images, which were held out"
        )
    return "\n".join([*lines, *(f"  warning: {line.replace('**', '')}" for line in _warnings(report))])


def _without_empty_stages(report: dict) -> dict:
    """The report without stages of zero steps, which a run has that only samples from a checkpoint."""
    return {**report, "releases": [release for release in report["releases"] if release["planned"]]}


def _subject_lines(report: dict) -> list[str]:
    """The samples that the card covers; the run's folder names the run when it writes privacy.json."""
    if "run" not in report:
        return []
    return [
        f"This card covers {_products(report, with_files=True)} of run **{report['run']}**, trained on "
        f"{report['num_records']:,} private images of **{report['data']}**.",
        "",
    ]


def _products(report: dict, with_files: bool = False) -> str:
    """What the run releases, in the plural. A report without the entry is about samples that are still to be made."""
    files = report.get("products", [SAMPLES])
    names = {SAMPLES: "the samples", CLASSIFIER: "the weights of the classifier"}
    found = [f"{names[name]} ({name})" if with_files else names[name] for name in names if name in files]
    return " and ".join(found)


def _warnings(report: dict) -> list[str]:
    """Facts that weaken or void the guarantee of this run."""
    lines = []
    if _is_seeded(report):
        lines.append(
            "**the noise was seeded (privacy.noise_seed): anyone can remove it; the guarantee is void**"
        )
    if report["not_computed"]:
        lines.append(
            f"**no epsilon can be claimed, because it could not be computed ({report['not_computed']})**"
        )
    if report.get("selection") and any(release.get("inherited") for release in report["releases"]):
        lines.append(
            "**the validation images may include images that the earlier runs, whose results are used here, queried: "
            "for them the epsilons of training and of choosing classifiers add up**"
        )
    if report["private"]:
        weak = weak_delta(report["budget"]["delta"], report["num_records"])
        lines += [] if weak is None else [f"**{weak}**"]
    return lines


def _is_seeded(report: dict) -> bool:
    selections = report.get("selection", [])
    return report["noise_seeded"] or any(selection["noise_seeded"] for selection in selections)


def _headline(report: dict) -> str:
    if not report["private"]:
        return f"**This run is NOT private** (epsilon = inf): {_products(report)} may reveal training images."
    if not report["releases"]:
        return f"{_products(report).capitalize()} do not depend on the private images at all."
    if report["not_computed"]:
        return f"**The epsilon of this run could not be computed**, so nothing is claimed about {_products(report)}."
    budget, products = report["budget"], _products(report).capitalize()
    return (
        f"{products} are **({at_most(report['spent'])}, {at_most(budget['delta'])})-differentially private** with "
        f"respect to the private training images (budget: epsilon {budget['epsilon']:g}). Whatever anyone computes "
        f"from them, {RELATION[report['relation']]} changes the odds of any outcome by a factor of at most e^epsilon, "
        f"up to delta."
    )


def _claims_epsilon(report: dict) -> bool:
    """There is an epsilon that a guarantee for several images can be derived from."""
    return report["private"] and bool(report["releases"]) and math.isfinite(report["spent"])


def person_guarantee(count: int, epsilon: float, delta: float) -> str:
    """What (epsilon, delta) per image guarantees for a person with `count` images, by group privacy (Dwork & Roth 2014,
    theorem 2.2)."""
    log_delta = math.log(count) + (count - 1) * epsilon + math.log(delta)
    if log_delta >= 0:
        return "nothing is guaranteed: delta would be 1 or more; choose a smaller epsilon and delta"
    return f"({at_most(count * epsilon)}, {at_most(math.exp(log_delta))})-differentially private"


def _person_lines(report: dict) -> list[str]:
    count = report.get("images_per_person")
    if count is None or not _claims_epsilon(report):
        return []
    claim = person_guarantee(count, report["spent"], report["budget"]["delta"])
    return [f"- **For a person** with at most {count} of the images (see the assumptions): {claim}."]


def _accountants(report: dict) -> str:
    """The accountant whose bound is reported, and the bounds of others; a looser bound does not weaken it."""
    name, values = report["accountant"], report["spent_by_accountant"]
    if not (report["private"] and report["releases"]):
        return name
    found = {name: value for name, value in values.items() if isinstance(value, float)}
    if not found:
        return f"{name}; no accountant bounds this run"
    others = [f"{other} {at_most(value)}" for other, value in found.items() if other != name]
    more = f"; looser bounds from other accountants: {', '.join(others)}" if others else ""
    return f"{name} (reported above){more}"


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
    """What to know about the samples before use; none of it is computed from real images."""
    counts = report.get("samples_per_class")
    if not counts or not any(counts):  # not drawn yet, or a run whose product is a classifier
        return []
    copies = copies_of_public(report)
    if not copies and report["public_data"] is not None:
        copies = ["no sample equals a public image byte for byte"]
    low, high = min(counts), max(counts)
    labels = f"{low:,} of each class" if low == high else f"{low:,} to {high:,} of each class"
    if high - low <= 1:
        estimated = (
            "The method estimates them with noise and uses the estimate only in training"
            if report["learns_class_shares"]
            else "The method does not estimate them"
        )
        labels += (
            f". Every class gets an equal share of the samples, whatever its share of the private images is, because "
            f"class shares are private. {estimated}"
        )
    return [*copies, f"labels: {labels}", *(f"warning: {line}" for line in report.get("sample_warnings", []))]


def _made_from(report: dict) -> list[str]:
    if "public_data" not in report:  # the run has not recorded its inputs yet
        return []
    public, overrides = report["public_data"], report["overrides"]
    found = "public images: none"
    if public is not None and "of_private_set" in public:
        found = (
            f"public images: **{public['images']:,} training images of {public['of_private_set']}** itself, declared "
            f"public: the first {public['images'] // public['classes']} of each class in a fixed permutation "
            f"(sensitive_data.public_seed={public['public_seed']}). **Nothing protects them**, and the samples may be "
            f"copies of them. The private images are protected as far as records are distinct: a private image that "
            f"is also among the public ones is public"
        )
    elif public is not None:
        found = (
            f"public images: **{public['name']}**, {public['images']:,} images in {public['classes']} classes; it "
            f"is assumed, not checked, that they are public and contain no private image"
        )
    given = (
        "unknown, because the run's record is damaged"
        if overrides is None
        else ", ".join(overrides) or "none"
    )
    return [found, f"settings from the command line: {given}"]


def _selection_lines(selections: list[dict]) -> list[str]:
    if not selections:
        return []
    total = sum(selection["spent"] for selection in selections)
    return [
        f"**Choosing classifiers** spent epsilon {at_most(total)} (delta 0) on held-out validation images, in "
        f"{len(selections)} evaluation(s). No image is in both sets of this run; this cost applies to the reported "
        f"accuracies, not to the samples.",
        "",
    ]


def _revealed_lines(reasons: list[str]) -> list[str]:
    if not reasons:
        return []
    return [
        "**Revealed without noise**, to the evaluation program, after training:",
        "",
        *(f"- {reason}" for reason in dict.fromkeys(reasons)),
        "",
    ]


def _weights_are(report: dict) -> list[str]:
    """Whether the checkpoints and previews of the run may be shared. They hold weights, the state of optimizers, noisy
    results and bookings: post-processing of the queries in the table, and public data."""
    files = "the checkpoints and previews of the run (train/, and pretrain/ if there is one)"
    if not report["private"] or report["not_computed"] or _is_seeded(report):
        return [f"{files} have no guarantee and may reveal training images: do not share them"]
    licenses = "they may contain public images and weights trained on them, whose licenses apply"
    if not report["releases"]:
        return [f"{files} do not depend on the private images; {licenses}"]
    return [
        f"{files} are computed from the noisy results of the queries above and from public data: to share them in "
        f"addition to {_products(report)} does not increase epsilon, unless a copy of this folder was resumed too; "
        f"{licenses}"
    ]


def _private_files(report: dict) -> list[str]:
    """The files that hold private images, or results computed from them without noise."""
    name = report["data"]
    return [
        "in the folder of the run: results.json, details.json, report.html and stdout.txt; with "
        "eval.gallery=private also private/",
        "in the folder of the prepared images: the images, meta.json and .cache, which holds features of the images, "
        "predictions of classifiers that were trained on them, and with eval.mode=val possibly copies of them "
        "(in ~/.cache/dp-image-bench/private if it is read-only)",
        "only their owner can read these folders; do not change their permissions",
        f"`python scripts/prepare_data.py --forget {name}` removes the prepared images with all features and copies, "
        f"and names the runs on them",
    ]


def _group_lines(report: dict) -> Iterator[str]:
    """The guarantee for a person with several images."""
    yield (
        "several images of one person count as several records: for k of them epsilon becomes k x epsilon, and delta "
        "k x exp((k - 1) x epsilon) x delta; to protect a person, choose both accordingly"
    )
    if _claims_epsilon(report):
        limit = unprotected_group(report["spent"], report["budget"]["delta"])
        yield (
            f"**for a person with {limit} or more images nothing is guaranteed**: at this epsilon and delta, the delta "
            f"of {limit} images is 1 or more"
        )


def unprotected_group(epsilon: float, delta: float) -> int:
    """The smallest number of records k whose group delta, k exp((k - 1) epsilon) delta, is 1 or more. delta > 0."""
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
        "publish these files only if that is acceptable. The test images have no protection: accuracies and "
        "confusion tables are computed on them",
    ]
