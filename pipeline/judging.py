"""Judge samples against the real images, and write down what was found and what it cost: of run.py and eval.py.

The evaluation knows nothing of ledgers; here it is given the real images that the ledgers let it have.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from utils.artefacts import CARD, GRID, PRIVACY, RESULTS
from utils.config import Config
from utils.files import read_json, write_json, write_text
from utils.runtime import Runtime, log

REVEALED = "the private training images, which samples are compared with by"
ORACLE = "eval.oracles=true: epochs of classifiers are chosen on the private validation images without noise"
SHOWN = "eval.gallery=report: report.html was written with training images in it"
CEILING = (
    "eval.ceiling: classifiers were trained on the private training images, to report what real images reach"
)
INCOMPLETE = 3  # exit code: the run is done, but metrics are missing


def judge(
    config: Config,
    spec,
    runtime: Runtime,
    folder: Path,
    samples,
    real,
    training: dict,
    timing: dict[str, float],
) -> int:
    """Evaluate `samples`; write privacy.json, the card and (last) results.json into `folder`, and print them. What an
    earlier evaluation of the same samples found, and this one is not asked for, stays in the files.

    `real` holds the test images, and the training and validation images behind their ledgers; `training` is the
    report of the training ledger, with what is known of the samples.
    """
    from data.sensitive import private_cache
    from evaluation.evaluator import Evaluator, EvaluatorSettings
    from evaluation.page import GALLERY, REPORT
    from evaluation.report import facts_of
    from evaluation.sample_checks import sample_warnings
    from opacus_ext.card import privacy_card, privacy_summary

    evaluator = Evaluator(
        EvaluatorSettings(
            config.eval, spec, config.weights_root, runtime.device, config.seed,
            private_cache(config.sensitive_data, config.data_root), config.sensitive_data.prompt,
        )
    )  # fmt: skip
    start = time.perf_counter()
    selection = None
    if real.validation is not None:
        selection = NoisyChoice(real.validation, lambda report: write_account(folder, training, report))
    train, oracle, reasons = revealed(config, real)
    training = {**training, "revealed": [*training["revealed"], *reasons]}
    training["sample_warnings"] = sample_warnings(samples, spec)
    write_account(folder, training)  # before anything is shown, whatever becomes of the rest
    report = evaluator.evaluate(samples, train=train, test=real.test, select=selection, validation=oracle)
    timing = {**timing, "evaluate": time.perf_counter() - start}
    privacy = read_json(folder / PRIVACY)
    title = f"{config.method} on {spec.name}, epsilon {config.epsilon:g}"
    written = write_down(
        folder, config, spec, report, samples, train, title=title, account=privacy,
        card=privacy_card(privacy), timing=timing, facts=facts_of(samples, spec),
    )  # fmt: skip
    log.info(f"\n{privacy_summary(privacy)}\n\n{written.table()}\n")
    places = {"report": REPORT, "samples": GRID, "privacy card": CARD, "numbers": RESULTS}
    if report.nearest and config.eval.gallery == "private":
        places["nearest training images, not to be shared"] = GALLERY
    log.info("\n".join(f"{what}: {folder / name}" for what, name in places.items()))
    return INCOMPLETE if report.missing else 0


def revealed(config: Config, real: "RealData"):
    """The training images, the validation images of the oracle, each None unless something that is asked for needs
    them, and the reasons for which they are revealed."""
    from evaluation.ceiling import with_ceiling
    from evaluation.registry import comparing_with_training

    train = oracle = None
    users = comparing_with_training(config.eval.metrics) + (["eval.gallery"] if config.eval.gallery else [])
    reasons = [SHOWN] if config.eval.gallery == "report" else []
    if users:
        reasons.insert(0, f"{REVEALED} {', '.join(users)}")
        train = real.train.reveal(reasons[0])
    if with_ceiling(config.eval):
        reasons.append(CEILING)
        train = real.train.reveal(CEILING)
    if real.oracle is not None:
        reasons.append(ORACLE)
        oracle = real.oracle.reveal(ORACLE)
    return train, oracle, reasons


def write_down(
    folder: Path, config: Config, spec, report, samples, train, *, title: str, account: dict, card: str | None,
    timing: dict[str, float], facts: dict,
):  # fmt: skip
    """Write report.html and (last) results.json about `report`, and what an earlier evaluation of the same samples
    found; returns both as one Report, with warnings. `account` says what the samples cost, `facts` by what they are
    recognised."""
    from evaluation.page import write_page
    from evaluation.report import earlier_report, evaluation_settings
    from evaluation.sample_checks import accuracy_warnings, sample_warnings
    from opacus_ext.card import copies_of_public
    from pipeline.results import results_of

    earlier = earlier_report(folder, config.data_name, facts)
    if earlier is None:
        log.info("the earlier evaluation was of other samples; it is replaced")
    settings = evaluation_settings(config)
    written = report if earlier is None else report.after(earlier, settings)
    warnings = [*copies_of_public(account), *sample_warnings(samples, spec), *accuracy_warnings(written)]
    written = dataclasses.replace(written, warnings=warnings)
    results = results_of(folder, config, account, written, settings, timing, facts)
    write_page(folder, written, samples, train, spec, title, card, config.eval.gallery, results)
    write_json(folder / RESULTS, results)
    return written


def no_account(*, private: bool | None, spent: float | None) -> dict:
    """What results.json takes from the account of a run, for images that none made: their cost is what is given."""
    return {
        "budget": {"delta": None}, "private": private, "spent": spent, "selection": [], "noise_seeded": False
    }  # fmt: skip


def write_account(folder: Path, training: dict, selection: dict | None = None) -> None:
    """Write privacy.json (pipeline.results.write_privacy says how) and the card that says the same in words."""
    from opacus_ext.card import privacy_card
    from pipeline.results import write_privacy

    write_text(folder / CARD, privacy_card(write_privacy(folder, training, selection)))


@dataclasses.dataclass(frozen=True)
class RealData:
    """What samples are judged against."""

    train: object  # Disclosure: revealed if a metric needs them
    test: object  # Samples
    validation: (
        object  # PrivateData with a plan of one noisy choice per classifier; None in modes syn and sen
    )
    oracle: object = None  # Disclosure of the same images, where eval.oracles asks for them


class NoisyChoice:
    """Lets the evaluator choose epochs by the private validation images, through report-noisy-max alone. Each choice is
    written down by `book` before the evaluator learns it, so that one is paid for whose evaluation is killed."""

    def __init__(self, validation, book: Callable[[dict], object]) -> None:
        self._validation, self._book = validation, book
        self._id = f"{datetime.now():%Y-%m-%d-%H-%M-%S-%f}-{os.getpid()}"

    def choose(self, name: str, correct) -> int:
        chosen = self._validation.report_noisy_max(name, correct)
        self._book(self.report())
        return chosen

    def report(self) -> dict | None:
        """What privacy.json says of the choices; None if none was asked for."""
        report = {"id": self._id, **self._validation.report()}
        return report if any(release["executed"] for release in report["releases"]) else None


def validation_data(config: Config, spec, images, noise, device: str):
    """The validation images behind a ledger of their own, which plans one noisy choice per classifier; or None."""
    from evaluation.registry import check_classifiers, needs_of
    from opacus_ext.accounting import noisy_max_release
    from opacus_ext.ledger import Budget, Ledger
    from opacus_ext.private_data import PrivateData

    if images is None or "classifiers" not in needs_of(config.eval.metrics):
        return None
    names = check_classifiers(config.eval.classifiers)
    each = config.eval.selection_epsilon / len(names)
    ledger = Ledger(Budget(config.eval.selection_epsilon, 0.0), relation=config.privacy.relation)
    ledger.adopt([noisy_max_release(f"selection/{name}", each, config.privacy.relation) for name in names])
    return PrivateData(images, dataclasses.replace(spec, num_train=len(images)), ledger, noise, device)


def oracle_data(config: Config, images):
    """The door to the validation images, for eval.oracles; or None."""
    return None if images is None or not config.eval.oracles else open_door(images)


def open_door(images):
    """A Disclosure of images of which nothing is asked here: the plan of their ledger is empty, whatever its budget."""
    from opacus_ext.disclosure import Disclosure
    from opacus_ext.ledger import Budget, Ledger

    ledger = Ledger(Budget(math.inf, 0.0))
    ledger.adopt([])
    return Disclosure(images, ledger)
