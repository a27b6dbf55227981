"""The two evaluations of eval.py: the samples of a finished run again, and labelled images of any origin."""

import dataclasses
import time
from functools import partial
from pathlib import Path

from data.samples_file import read_samples
from data.sensitive import load_sensitive, private_cache, require_prepared, spec_of
from data.spec import DataSpec, Samples
from evaluation.evaluator import Evaluator, EvaluatorSettings
from evaluation.images import read_images
from evaluation.inputs import Classify
from evaluation.listing import evaluation_line, missing_requirements
from evaluation.page import REPORT
from evaluation.registry import of_classifiers
from evaluation.report import earlier_report, facts_of
from evaluation.selection import RELEASED
from evaluation.unfinished import unfinished
from models.released.classifier import logits_of, read_classifier
from opacus_ext.noise import NoiseSource
from pipeline.configuration import FIXED
from pipeline.evaluation import (
    INCOMPLETE,
    Account,
    Evaluation,
    RealImages,
    announce_time,
    disclose,
    evaluate,
    findings_of,
    kept_if_stopped,
    no_account,
    oracle_data,
    validation_data,
    write_findings,
)
from pipeline.evaluation_time import evaluation_time_lines
from pipeline.folder import discarded_on_failure, new_folder, private_work, working_in
from pipeline.record import values_of
from utils.artefacts import CLASSIFIER, CONFIG, PRIVACY, RESULTS, SAMPLES
from utils.config import COMMAND_LINE, FLAG_KEYS, Config
from utils.config_files import flatten
from utils.device import prepare_device
from utils.errors import UserError
from utils.files import read_json, require_writable
from utils.log import also_to
from utils.runtime import log
from utils.text import at_most


def evaluate_existing(config: Config) -> int:
    """Evaluate what the command line of eval.py names; returns the exit code."""
    if not config.eval.metrics and config.eval.gallery is None:
        raise UserError(
            "--metrics: names none; give at least one, for example --metrics accuracy,fid (see --list)"
        )
    return evaluate_finished_run(config) if config.images is None else evaluate_images(config)


def _evaluator(config: Config, spec: DataSpec, has_samples: bool = True) -> Evaluator:
    return Evaluator(
        EvaluatorSettings(
        config.eval, spec, config.weights_root, prepare_device(config.setup), config.seed,
        private_cache(config.sensitive_data, config.data_root), config.sensitive_data.prompt, has_samples,
        )
    )  # fmt: skip


def evaluate_images(config: Config) -> int:
    """Evaluate the images of --images against all training and test images; returns the exit code."""
    config = without_run(config)
    spec, lines = spec_of(config.sensitive_data, config.eval.mode, config.data_root)
    evaluator = _evaluator(config, spec)
    require_prepared(config.sensitive_data, config.data_root)  # before images are read, which takes time
    samples, notes = read_images(config.images, spec)
    for line in (*lines, *notes):
        log.info(line)
    log.info(f"{len(samples):,} images of {config.images} against {spec.name}")
    facts = facts_of(samples, spec)
    if config.out is not None and earlier_report(config.out, config.data_name, facts) is None:
        raise UserError(
            f"--out: {config.out} holds the results of other images, or of a dataset that is another or was prepared "
            f"again; give another folder"
        )
    if config.dry_run:
        log.info(describe_evaluation(config, spec, len(samples), config.images))
        return 0
    sensitive = load_sensitive(config.sensitive_data, config.eval.mode, config.data_root)
    folder, is_new = folder_of_results(config)
    with discarded_on_failure(folder, is_new), private_work(folder):
        require_writable(folder)
        also_to(folder / "stdout.txt")
        evaluation = Evaluation(config, spec, evaluator, folder, samples, facts)
        kept = unfinished(evaluator.settings, samples, None)
        announce_time(evaluation, len(sensitive.test), kept)
        start = time.perf_counter()
        with kept_if_stopped(kept):
            report = evaluator.evaluate(
                samples, train=sensitive.train, test=sensitive.test, select=None, kept=kept
            )
        account = Account(
            f"{config.images.name} on {spec.name}",
            no_account(private=None, spent=None),
            None,
            {"evaluate": time.perf_counter() - start},
        )
        findings = findings_of(evaluation, report, sensitive.train)
        written = write_findings(evaluation, findings, sensitive.train, account)
        kept.discard()
    log.info(f"\n{written.table()}\n\nreport: {folder / REPORT}\nnumbers: {folder / RESULTS}")
    return INCOMPLETE if report.missing else 0


def folder_of_results(config: Config) -> tuple[Path, bool]:
    """The folder for the results of --images, which exists then; was it made now?"""
    folder = config.out
    if folder is None:
        name = "-".join(filter(None, (config.sensitive_data.name, config.description)))
        return new_folder(config.exp_root, config.method, name), True
    is_new = not folder.exists()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # of one that exists the rights stay
    except OSError as error:
        raise UserError(
            f"--out: cannot make {folder} ({error.strerror}); give a folder that can be written"
        ) from error
    return folder, is_new


def without_run(config: Config) -> Config:
    """The configuration without what only a run has: a method, a budget and held-out validation images."""
    if config.out is not None and (config.out / CONFIG).exists():
        raise UserError(f"--out: {config.out} is the folder of a run; give another folder")
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out: {config.out} is a file; give a folder")
    if config.out is not None and config.out.resolve().is_relative_to(config.images.resolve()):
        raise UserError(f"--out: {config.out} is among the images; give another folder")
    if config.out is not None and not (config.out / RESULTS).exists():
        for name in ("report.html", "details.json"):
            if (config.out / name).exists():
                raise UserError(f"--out: {config.out / name} is not of an evaluation; give another folder")
    judged = config.eval
    if judged.mode == "val":
        if config.provenance["eval.mode"] == COMMAND_LINE:
            raise UserError(
                "eval.mode: val needs the validation images that a run holds out; use eval.mode=syn or sen"
            )
        judged = dataclasses.replace(judged, mode="syn")
    return dataclasses.replace(
        config, method="images", epsilon=None, preset_tier=None, borrowed=False, eval=judged
    )


def evaluate_finished_run(config: Config) -> int:
    """Read the run's samples and privacy report, and evaluate; returns the exit code."""
    folder = config.exp_path
    if folder is None:
        raise UserError(
            "--exp_path: missing; give the folder of the run to judge, or --images <npz, folder or zip>"
        )
    if not (folder / PRIVACY).exists():
        raise UserError(f"--exp_path: {folder} is not the folder of a trained run (it has no {PRIVACY})")
    if not (folder / RESULTS).exists():
        raise UserError(
            f"--exp_path: {folder} is not finished; continue it with run.py --resume_exp {folder.name}"
        )
    require_run_of(folder, config)
    # Split as in the run: images that it held out are no training images, however its samples are judged now.
    split = values_of(folder)["eval.mode"]
    samples, spec, lines = samples_of(config, split)
    released = classifier_of(config, spec)
    if len(samples) == 0:
        judged, left_out = of_classifiers(config.eval)
        if not judged.metrics:
            raise UserError(
                f"--metrics: {', '.join(left_out)} would need samples, and {folder} has a classifier only; allowed "
                f"are metrics of classifiers, such as accuracy"
            )
        config = dataclasses.replace(config, eval=judged)
        lines += (f"{folder} has no samples; not computed: {', '.join(left_out)}",) if left_out else ()
    for line in (*config.notes, *lines):
        log.info(line)
    if (split, config.eval.mode) == ("val", "syn"):
        log.info(
            "using eval.mode=syn; eval.mode=val would query the validation images of the run again, at an extra "
            "privacy cost"
        )
    if config.dry_run:
        log.info(describe_evaluation(config, spec, len(samples), folder))
        return 0
    evaluator = _evaluator(config, spec, has_samples=len(samples) > 0)
    require_writable(folder)
    also_to(folder / "stdout.txt")
    real = real_images(config, spec, split)
    with working_in(folder):
        facts = facts_of(samples, spec)
        evaluation = Evaluation(config, spec, evaluator, folder, samples, facts, released)
        return evaluate(evaluation, real, read_json(folder / PRIVACY), timing={})


def samples_of(config: Config, split: str) -> tuple[Samples, DataSpec, tuple[str, ...]]:
    """The samples of the run, the DataSpec of what it was trained on, and lines to print."""
    path = config.exp_path / SAMPLES
    spec, lines = spec_of(config.sensitive_data, split, config.data_root)
    require_same_split(config.exp_path, config, spec)
    if not path.exists() and (config.exp_path / CLASSIFIER).exists():
        samples = Samples.none(spec.image_shape)
    else:
        samples = read_samples(path)
    if earlier_report(config.exp_path, config.data_name, facts_of(samples, spec)) is None:
        raise UserError(
            f"{path}: other samples than those that {RESULTS} is about, or {spec.name} was prepared again; to judge "
            f"them apart: python eval.py --images {path} --data_name {config.data_name} --out <folder>"
        )
    return samples, spec, lines


def classifier_of(config: Config, spec: DataSpec) -> Classify | None:
    """The classifier that the run released, or None."""
    path = config.exp_path / CLASSIFIER
    if not path.exists():
        return None
    device = prepare_device(config.setup)
    read = read_classifier(path, config.weights_root, device)
    if (read.class_names, read.resolution, read.channels) != (
        spec.class_names,
        spec.resolution,
        spec.channels,
    ):
        raise UserError(f"{path}: made for other classes or images than those of {spec.name}")
    return partial(logits_of, read.classifier, device=device, description=RELEASED)


def real_images(config: Config, spec: DataSpec, split: str) -> RealImages:
    """What the samples of a run are evaluated against."""
    sensitive = load_sensitive(config.sensitive_data, split, config.data_root)
    held_out = sensitive.validation if config.eval.mode == "val" else None  # other modes have no use for them
    return RealImages(
        disclose(sensitive.train),
        sensitive.test,
        validation_data(
            config, spec, held_out, NoiseSource(config.privacy.noise_seed), prepare_device(config.setup)
        ),
        oracle_data(config, held_out),
    )


def describe_evaluation(config: Config, spec: DataSpec, count: int, source: Path) -> str:
    """What --dry_run prints: how the images would be evaluated, how long it would take, what it would cost, and what is
    missing."""
    judged = config.eval
    what = f"{count:,} images of {source}" if count else f"the released classifier of {source}"
    lines = [f"{what} would be evaluated", evaluation_line(config)]
    if judged.mode == "val":
        spent = sum(selection["spent"] for selection in read_json(source / PRIVACY)["selection"])
        lines.append(f"so far choices have cost these images epsilon {at_most(spent)}; it adds up")
    if count:
        lines += [f"classifiers: {', '.join(judged.classifiers)}; recipe {judged.recipe}, seed {config.seed}"]
    lines += evaluation_time_lines(config, spec, count, prepare_device(config.setup))
    missing = missing_requirements(judged.metrics, judged.extractor, config.weights_root)
    lines += [f"missing: {line}" for line in missing]
    return "\n".join(lines)


def require_run_of(folder: Path, config: Config) -> None:
    """Raise UserError unless the flags say what the run is, and it kept the images aside that eval.mode=val asks."""
    run, given = values_of(folder), flatten(config.snapshot)
    names = {key: f"--{flag}" for flag, key in FLAG_KEYS.items()} | {key: key for key in FIXED}
    for key, name in names.items():
        if run.get(key) != given[key]:
            raise UserError(
                f"{name}: {given[key]}, but {folder} is a run with {run.get(key)}; leave {name} out"
            )
    if config.eval.mode == "val" and run.get("eval.mode") != "val":
        raise UserError(
            f"eval.mode: val, but {folder} was trained with eval.mode={run.get('eval.mode')} on the validation images "
            f"too; use eval.mode=syn or sen"
        )


def require_same_split(folder: Path, config: Config, spec: DataSpec) -> None:
    """Raise UserError where the data have changed since the run: others are held out then, and some that it was trained
    on would be asked as validation images."""
    if config.eval.mode != "val":
        return
    run = read_json(folder / PRIVACY)
    if run["num_records"] != spec.num_train:
        raise UserError(
            f"eval.mode: val, but {folder} was trained on {run['num_records']:,} images, and {spec.num_train:,} are "
            f"left for training now; the data have changed, and with them which images are held out"
        )
    if run["data_identity"] != spec.identity:
        raise UserError(
            f"eval.mode: val, but {spec.name} was prepared again since {folder} was trained; which images are held out "
            f"may have changed; use eval.mode=syn"
        )
