"""Evaluate samples against the real images, and write what was found and what it cost.

The package `evaluation` knows no ledger. This module gives it the real images that the ledgers permit, and is the only
place that reveals private records.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np

from data.sensitive import SensitiveData
from data.spec import DataSpec, Samples
from evaluation.ceiling import with_ceiling
from evaluation.evaluator import Evaluator
from evaluation.inputs import Classify
from evaluation.page import GALLERY, REPORT, write_page
from evaluation.registry import (
    METRICS,
    TRAINING_NEEDS,
    check_classifiers,
    comparing_with_training,
    needs_of,
)
from evaluation.report import Report, earlier_report, evaluation_settings, facts_of
from evaluation.sample_checks import (
    accuracy_warnings,
    copy_warnings,
    exact_copies,
    sample_warnings,
    zero_warnings,
)
from evaluation.unfinished import Unfinished, unfinished
from opacus_ext.accounting import noisy_max_release
from opacus_ext.card import copies_of_public, privacy_card, privacy_summary
from opacus_ext.disclosure import Disclosure
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from pipeline.compose import Parts
from pipeline.evaluation_time import classifier_time_line
from pipeline.record import results_of, write_account, write_results
from pipeline.revealed import CEILING, COPIES, GALLERY_ENTRY, ORACLE, SHOWN, comparison, without_failed
from utils.artefacts import CARD, CLASSIFIER, GRID, PRIVACY, RESULTS
from utils.config import Config
from utils.files import read_json
from utils.runtime import log

INCOMPLETE = 3  # exit code: the program completed, but metrics are missing


@dataclasses.dataclass(frozen=True)
class RealImages:
    """What samples are evaluated against."""

    train: Disclosure  # revealed if a metric needs them
    test: Samples
    validation: (
        PrivateData | None
    )  # with a plan of one noisy choice per classifier; None in modes syn and sen
    oracle: Disclosure | None = None  # of the validation images, if eval.oracles asks for them


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation: of which samples, by which evaluator, and where the results go."""

    config: Config
    spec: DataSpec
    evaluator: Evaluator
    folder: Path
    samples: Samples  # none, if the only product of the run is a classifier
    facts: dict  # what results.json states about the samples (evaluation.report.facts_of)
    released: Classify | None = None  # the classifier that the run releases


@dataclasses.dataclass(frozen=True)
class Account:
    """What the samples cost, and how results are titled."""

    title: str
    privacy: dict  # the content of privacy.json, or `no_account`
    card: str | None  # Markdown; None for images without a run
    timing: dict[str, float]  # seconds per stage


def evaluate_run(
    parts: Parts, folder: Path, samples: Samples, sensitive: SensitiveData, noise: NoiseSource, training: dict,
    timing: dict[str, float], released: Classify | None,
) -> int:  # fmt: skip
    """Evaluate the samples and the `released` classifier of the run that has just made them. `training` is the report
    of its ledger, and facts about the samples. Returns the exit code."""
    config, device = parts.config, parts.runtime.device
    real = RealImages(
        Disclosure(sensitive.train, parts.ledger),
        sensitive.test,
        validation_data(config, parts.spec, sensitive.validation, noise, device),
        oracle_data(config, sensitive.validation),
    )
    facts = facts_of(samples, parts.spec)
    evaluation = Evaluation(config, parts.spec, parts.evaluator, folder, samples, facts, released)
    return evaluate(evaluation, real, training, timing)


def evaluate(evaluation: Evaluation, real: RealImages, training: dict, timing: dict[str, float]) -> int:
    """Evaluate samples of a run; write privacy.json, the card and (last) results.json, and print them. Values that an
    earlier evaluation of the same samples found, and this one does not compute, stay in the files. Returns the exit
    code.

    `training` is the report of the training ledger, with facts about the samples.
    """
    config, folder, samples = evaluation.config, evaluation.folder, evaluation.samples
    start = time.perf_counter()
    train, oracle, reasons = reveal(config, real)
    before = read_json(folder / PRIVACY)["revealed"] if (folder / PRIVACY).exists() else []
    training = {**training, "revealed": [*training["revealed"], *reasons]}
    training["sample_warnings"] = sample_warnings(samples, evaluation.spec)
    write_account(folder, training)  # before anything is shown, whatever happens afterwards
    selection = None
    if real.validation is not None:
        selection = NoisyChoice(real.validation, lambda report: write_account(folder, training, report))
    kept = unfinished(evaluation.evaluator.settings, samples, folder)
    announce_time(evaluation, len(real.test), kept)
    with kept_if_stopped(kept):
        report = evaluation.evaluator.evaluate(
            samples, train=train, test=real.test, select=selection, validation=oracle, kept=kept,
            released=evaluation.released,
        )  # fmt: skip
    findings = findings_of(evaluation, report, train)
    privacy = write_account(
        folder, training, revealed=_revealed(evaluation, findings, before, training, reasons)
    )
    title = f"{config.method} on {evaluation.spec.name}, epsilon {config.epsilon:g}"
    timing = {**timing, "evaluate": time.perf_counter() - start}
    written = write_findings(
        evaluation, findings, train, Account(title, privacy, privacy_card(privacy), timing)
    )
    kept.discard()
    log.info(f"\n{privacy_summary(privacy)}\n\n{written.table()}\n")
    places = {"report": REPORT} | ({"samples": GRID} if len(samples) else {})
    places |= {"classifier": CLASSIFIER} if evaluation.released is not None else {}
    places |= {"privacy card": CARD, "numbers": RESULTS}
    if report.nearest and config.eval.gallery == "private":
        places["nearest training images, not to be shared"] = GALLERY
    log.info("\n".join(f"{what}: {folder / name}" for what, name in places.items()))
    return INCOMPLETE if report.missing else 0


def announce_time(evaluation: Evaluation, num_test: int, kept: Unfinished) -> None:
    """Print how long the classifiers will take."""
    if len(evaluation.samples) == 0:
        return
    settings = evaluation.evaluator.settings
    line = classifier_time_line(
        evaluation.config, evaluation.spec, len(evaluation.samples), num_test, settings.device, kept
    )
    if line is not None:
        log.info(line)


@contextmanager
def kept_if_stopped(kept: Unfinished) -> Iterator[None]:
    """Report that finished parts are kept if the evaluation is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        if not kept.is_empty():
            log.info(
                "finished classifiers and metrics are kept; the same command computes the remaining ones"
            )
        raise


def reveal(config: Config, real: RealImages) -> tuple[Samples | None, Samples | None, list[str]]:
    """The training images, the validation images of the oracle (each None unless something in `config` needs them), and
    the reasons for which they are revealed."""
    train = oracle = None
    users = comparing_with_training(config.eval.metrics) + ([GALLERY_ENTRY] if config.eval.gallery else [])
    reasons = [SHOWN] if config.eval.gallery == "report" else []
    reasons += [CEILING] if with_ceiling(config.eval) else []
    if users or CEILING in reasons:
        reasons.insert(0, comparison([*users, COPIES]))
        for reason in reasons:
            train = real.train.reveal(reason)
    if real.oracle is not None:
        reasons.append(ORACLE)
        oracle = real.oracle.reveal(ORACLE)
    return train, oracle, reasons


@dataclasses.dataclass(frozen=True)
class Findings:
    """What this evaluation, and earlier ones of the same samples, found. `training_copies`: the number of samples that
    equal a training image; None if nothing compared samples with the training images."""

    report: Report
    training_copies: int | None


def findings_of(evaluation: Evaluation, report: Report, train: Samples | None) -> Findings:
    """`report` together with what results.json has about the same samples, and the number of copies of `train`."""
    config, folder = evaluation.config, evaluation.folder
    earlier = earlier_report(folder, config.data_name, evaluation.facts)
    copies = None
    if earlier is None:
        log.info("existing results are for different samples; overwriting them")
    elif (folder / RESULTS).exists():
        copies = read_json(folder / RESULTS).get("training_copies")
    if train is not None and (config.images is not None or _uses_training(report)):
        copies = exact_copies(evaluation.samples.images, train.images)
    report = report if earlier is None else report.after(earlier, evaluation_settings(config))
    return Findings(report, copies)


def _uses_training(report: Report) -> bool:
    """Does anything in `report` come from the training images? A failed metric has no result."""
    compared = any(
        TRAINING_NEEDS & set(METRICS.resolve(name.split("/")[0]).needs) or "ceiling" in info
        for name, info in report.metric_info.items()
    )
    return compared or bool(report.nearest)


def _revealed(
    evaluation: Evaluation, findings: Findings, before: list[str], training: dict, planned: list[str]
) -> list[str]:
    """The entries `revealed` of privacy.json after the evaluation: those of `before`, and those of the `planned` ones
    that led to a result."""
    shown, others = bool(findings.report.nearest), []
    others += [COPIES] if findings.training_copies is not None else []
    others += [SHOWN] if shown or SHOWN in before else []
    others += [GALLERY_ENTRY] if shown or (evaluation.folder / GALLERY).exists() else []
    return without_failed([*before, *training["revealed"]], planned, findings.report, others)


def write_findings(
    evaluation: Evaluation, findings: Findings, train: Samples | None, account: Account
) -> Report:
    """Write report.html and (last) results.json; returns the report with warnings."""
    config, spec, folder, samples = (
        evaluation.config, evaluation.spec, evaluation.folder, evaluation.samples
    )  # fmt: skip
    settings, facts = evaluation_settings(config), evaluation.facts
    written = findings.report
    warnings = [
        *copies_of_public(account.privacy), *copy_warnings(findings.training_copies, len(samples)),
        *sample_warnings(samples, spec), *accuracy_warnings(written), *zero_warnings(written),
    ]  # fmt: skip
    written = dataclasses.replace(written, warnings=warnings)
    if findings.training_copies is not None:
        facts = facts | {"training_copies": findings.training_copies}
    results = results_of(folder, config, account.privacy, written, settings, account.timing, facts)
    write_page(
        folder, written, samples, train, spec, account.title, account.card, config.eval.gallery, results
    )
    write_results(folder, results)
    return written


def no_account(*, private: bool | None, spent: float | None) -> dict:
    """What results.json takes from the account of a run, for images without a run."""
    return {
        "budget": {"delta": None}, "private": private, "spent": spent, "selection": [], "noise_seeded": False
    }  # fmt: skip


class NoisyChoice:
    """Lets the evaluator choose epochs by the private validation images, through report-noisy-max alone. `book` writes
    each choice before the evaluator gets it, so that a choice is paid for even if the evaluation is killed."""

    def __init__(self, validation: PrivateData, book: Callable[[dict], dict]) -> None:
        self._validation, self._book = validation, book
        self._id = f"{datetime.now():%Y-%m-%d-%H-%M-%S-%f}-{os.getpid()}"

    def choose(self, name: str, correct: np.ndarray) -> int:
        chosen = self._validation.report_noisy_max(name, correct)
        self._book(self.report())
        return chosen

    def report(self) -> dict | None:
        """The entry of privacy.json about the choices; None if there was no choice."""
        report = {"id": self._id, **self._validation.report()}
        return report if any(release["executed"] for release in report["releases"]) else None


def validation_data(
    config: Config, spec: DataSpec, images: Samples | None, noise: NoiseSource, device: str
) -> PrivateData | None:
    """The validation images behind a ledger of their own, which plans one noisy choice per classifier; or None."""
    if images is None or not config.eval.classifiers or "classifiers" not in needs_of(config.eval.metrics):
        return None
    names = check_classifiers(config.eval.classifiers)
    each = config.eval.selection_epsilon / len(names)
    ledger = Ledger(Budget(config.eval.selection_epsilon, 0.0), relation=config.privacy.relation)
    ledger.adopt([noisy_max_release(f"selection/{name}", each, config.privacy.relation) for name in names])
    return PrivateData(images, dataclasses.replace(spec, num_train=len(images)), ledger, noise, device)


def oracle_data(config: Config, images: Samples | None) -> Disclosure | None:
    """The Disclosure of the validation images, if eval.oracles is set."""
    return None if images is None or not config.eval.oracles else disclose(images)


def disclose(images: Samples) -> Disclosure:
    """A Disclosure of images without any query: the plan of its ledger is empty."""
    ledger = Ledger(Budget(math.inf, 0.0))
    ledger.adopt([])
    return Disclosure(images, ledger)
