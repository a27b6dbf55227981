"""Train one differentially private image synthesizer on one dataset at one epsilon, sample from it, judge the samples.

    python run.py --method PrivImage --data_name digits_8 --epsilon 10

Composes the parts and has no logic of its own: configuration -> data -> ledger -> method -> evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from models import METHODS
from pipeline.divergence import explaining_divergence, require_not_diverged
from pipeline.environment import training_overrides
from pipeline.folder import discard_unstarted, working_in
from pipeline.judging import INCOMPLETE, RealData, judge, oracle_data, validation_data, write_account
from pipeline.resuming import as_started, how_to_continue, with_own_words
from utils import distributed
from utils.artefacts import GRID, RESULTS, SAMPLES
from utils.command_line import read_command_line, short_help
from utils.config import COMMAND_LINE, Config, format_config, load_config
from utils.config_files import config_folders, flatten
from utils.errors import UserError
from utils.files import read_json
from utils.program import MISTAKE, program, run_process
from utils.progress import duration
from utils.runtime import Runtime, log
from utils.stopping import exit_code, shortage

if TYPE_CHECKING:  # importing them takes seconds, which --help does without
    from data.sensitive import SensitiveData
    from data.spec import DataSpec, PublicData, Samples
    from models.synthesizer import Synthesizer
    from opacus_ext.ledger import Ledger
    from opacus_ext.noise import NoiseSource
    from opacus_ext.private_data import PrivateData
    from pipeline.stage_times import StageTimes

FAILED = 1  # exit code: another process of the run has died


@dataclasses.dataclass
class Parts:
    """What a run is composed of before any image has been read."""

    config: Config
    spec: DataSpec
    runtime: Runtime
    ledger: Ledger | None  # None in a run without private data
    synthesizer: Synthesizer


@dataclasses.dataclass
class Images:
    """What a run works on, once it has read it. The private ones are reached by `private` alone until the samples are
    made."""

    public: PublicData | None
    sensitive: SensitiveData | None  # None, and the next, in a run without private data
    private: PrivateData | None
    noise: NoiseSource


@program
def main(argv: list[str]) -> int:
    """The program: returns its exit code."""
    from utils.log import to_terminal

    to_terminal()
    if names_nothing(argv):
        print(f"{short_help('run')}\n\nmethods: {', '.join(METHODS)}", file=sys.stderr)
        return MISTAKE
    try:
        with distributed.main_process_first():
            return start(argv)
    except distributed.LostProcess as error:
        if distributed.place().local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return FAILED if distributed.is_main() else distributed.LOST


def names_nothing(argv: list[str]) -> bool:
    """There is no word in it but plugins, whose methods are in the table then."""
    flags, settings, given = read_command_line(argv, "run")
    if settings or given - {"plugin"}:
        return False
    config_folders(flags)
    return True


def start(argv: list[str]) -> int:
    """Compose, then run in as many processes as the configuration asks for. A mistake that shows without a look at
    the images shows before they are started, and the noise is calibrated once."""
    from utils.device import prepare_device

    argv = with_own_words(argv)
    config = as_started(load_config(argv, METHODS), argv, METHODS)
    distributed.take_place(config.setup)
    if config.print_config or config.dry_run:
        if distributed.is_main():
            for text in [format_config(config)] if config.print_config else dry_run(config):
                log.info(text)
        return 0
    parts = compose(config) if distributed.is_main() else None
    with distributed.processes(prepare_device(config.setup), main, argv):
        require_same_settings(config)
        plan = distributed.from_main(lambda: parts.ledger and parts.ledger.releases())
        return run(parts or compose(config, plan))


def dry_run(config: Config) -> Iterator[str]:
    """Lines: the plan, its cost, what is left to do of the run of --resume_exp, and which data and weights are missing.
    The plan comes before its steps are timed."""
    from data.public import num_public_images, require_public
    from data.sensitive import require_prepared
    from evaluation.listing import evaluation_line, lacking
    from pipeline.planning import cost_lines, describe

    parts = compose(config)
    counts = parts.synthesizer.parameter_counts()
    yield from describe(config, parts.spec, parts.ledger, counts, evaluation_line(config))
    num_public = None
    if parts.synthesizer.uses_public_images:
        num_public = num_public_images(config.public_data, config.data_root)
    costs = [] if num_public is None else parts.synthesizer.public_costs(num_public)
    judging = [] if parts.ledger is None else judging_costs(parts)
    costs += [] if parts.ledger is None else parts.synthesizer.costs()
    yield from cost_lines([*costs, *judging], config)
    if config.resume is not None:
        yield what_is_left(parts, costs, judging)
    unknown_time = "; until then the time of pretraining is unknown"
    needed = [(require_prepared, config.sensitive_data, "")]
    if parts.synthesizer.uses_public_images:
        needed.append((require_public, config.public_data, unknown_time))
    for require, section, more in needed:
        try:
            require(section, config.data_root)
        except UserError as error:
            yield f"missing: {error}{more}"
    for line in parts.synthesizer.lacking():
        yield f"missing: {line}"
    if parts.ledger is not None:
        judged = config.eval
        for line in lacking(judged.metrics, judged.extractor, config.weights_root):
            yield f"missing: {line}"


def judging_costs(parts: Parts) -> list:
    """The time of the evaluation."""
    from data.sensitive import num_test_images
    from evaluation.cost import evaluation_costs

    config = parts.config
    num_test = num_test_images(config.sensitive_data, config.data_root)
    return evaluation_costs(
        config.eval, parts.spec, config.gen.data_num, num_test, config.weights_root, parts.runtime.device
    )


def what_is_left(parts: Parts, costs: list, judging: list) -> str:
    """Which stages of the run of --resume_exp are done, how many steps of its private queries, and the time of the
    rest. `costs` are of the whole run up to the samples, `judging` of their evaluation."""
    from pipeline.checkpoints import Checkpoints

    folder = find_folder(parts)
    if is_finished(folder):
        return f"{folder.name} is finished, nothing is left to do"
    checkpoints = Checkpoints(folder, parts.config.method, parts.synthesizer, parts.ledger)
    restored = checkpoints.restore()
    left = {stage: 0.0 if is_past(checkpoints, restored, stage) else 1.0 for stage in checkpoints.STAGES}
    done = [f"{stage} {'not done' if share else 'done'}" for stage, share in left.items()]
    if parts.ledger is not None:
        left["generate"] = 0.0 if (folder / SAMPLES).exists() else 1.0
        done += [f"samples {'not done' if left['generate'] else 'done'}", "evaluation not done"]
        steps = [
            (release.num_steps, parts.ledger.executed(release.name)) for release in parts.ledger.releases()
        ]
        done += [
            f"'{release.name}' took {executed:,} of {planned:,} steps"
            for release, (planned, executed) in zip(parts.ledger.releases(), steps, strict=True)
        ]
        planned, executed = max(steps, default=(0, 0))
        left["train"] *= (planned - executed) / planned if planned > 1 else 1.0
    # What is neither training nor sampling is part of pretraining.
    seconds = sum(cost.seconds * left.get(cost.stage, left["pretrain"]) for cost in costs)
    seconds += sum(cost.seconds for cost in judging)
    return (
        f"{folder.name}, which goes on from {restored or 'the start'}: {', '.join(done)}; left: "
        f"about {duration(seconds)} here"
    )


def require_same_settings(config: Config) -> None:
    """Raise UserError if this machine was started with other settings than the main process's."""
    before, now = distributed.from_main(lambda: flatten(config.snapshot)), flatten(config.snapshot)
    for key in sorted({*before, *now}):
        if not key.startswith("setup.") and before.get(key) != now.get(key):
            raise UserError(
                f"{key}: {now.get(key)} here, but {before.get(key)} on machine 0; start all with the same settings"
            )


def compose(config: Config, plan: list | None = None) -> Parts:
    """Spec, ledger and method, with the method's plan adopted, or the calibrated `plan`; reads no image."""
    from data.cache import CACHE_NAME
    from data.public import misfit, num_public_classes
    from data.sensitive import require_apart, spec_of
    from evaluation.evaluator import Evaluator, EvaluatorSettings
    from opacus_ext.ledger import Budget, Ledger, default_delta, weak_delta
    from utils.device import prepare_device
    from utils.memory import require_memory

    for line in config.notes:
        log.info(line)
    spec, lines = spec_of(config.sensitive_data, config.eval.mode, config.data_root)
    for line in lines:
        log.info(line)
    require_apart(config.public_data, config.sensitive_data, config.data_root)
    if config.gen.data_num < spec.num_classes:
        raise UserError(
            f"gen.data_num: {config.gen.data_num}; it must be at least {spec.num_classes}, one per class"
        )
    require_memory("gen.data_num", config.gen.data_num, spec.image_shape)
    runtime = Runtime(
        prepare_device(config.setup),
        config.seed,
        config.setup.precision,
        cache_dir=config.data_root / CACHE_NAME,
        weights_root=config.weights_root,
    )
    # Unknown names fail now.
    Evaluator(EvaluatorSettings(config.eval, spec, config.weights_root, runtime.device, config.seed))
    method_config = config.method_config
    if hasattr(method_config, "public_data"):
        known = num_public_classes(method_config.public_data, config.data_root)
        public = dataclasses.replace(method_config.public_data, n_classes=known)
        method_config = dataclasses.replace(method_config, public_data=public)
    synthesizer = METHODS.resolve(config.method)(method_config, spec, runtime)
    badly = misfit(config.public_data, spec, config.data_root) if synthesizer.uses_public_images else None
    if badly is not None:
        log.info(badly)
    idle = synthesizer.idle_settings()
    if config.eval.mode != "val":
        why = f"no private image is held out with eval.mode={config.eval.mode}"
        idle = {**idle, "eval.selection_epsilon": why, "sensitive_data.num_val": why}
    for line in without_effect(config.provenance, idle):
        log.info(line)
    if config.sensitive_data.name is None:
        require_public_alone(config.method, synthesizer)
        return Parts(config, spec, runtime, None, synthesizer)
    delta = config.privacy.delta or default_delta(spec.num_train)
    ledger = Ledger(Budget(config.privacy.epsilon, delta), config.privacy.accountant, config.privacy.relation)
    if ledger.budget.private and (weak := weak_delta(delta, spec.num_train)):
        log.info(f"warning: {weak}")
    ledger.adopt(synthesizer.privacy_plan() if plan is None else plan)
    return Parts(config, spec, runtime, ledger, synthesizer)


def without_effect(provenance: dict[str, str], idle: dict[str, str]) -> list[str]:
    """One line for every setting of the command line that does nothing: `idle` has keys or sections, and why."""
    given = [key for key, layer in provenance.items() if layer == COMMAND_LINE]
    return [
        f"{key}: no effect: {why}"
        for key in given
        for name, why in idle.items()
        if f"{key}.".startswith(f"{name}.")
    ]


def require_public_alone(method: str, synthesizer) -> None:
    """Raise UserError if the pretraining of a run without private images would ask them."""
    asked = [f"'{release.name}'" for release in synthesizer.pretraining_plan()]
    if asked:
        raise UserError(
            f"sensitive_data.name: null, but pretraining {method} asks the private images: {', '.join(asked)}"
        )


def run(parts: Parts) -> int:
    """Everything after the plan: data, training, samples, evaluation. Returns the exit code.

    A mistake that shows before the first checkpoint leaves no folder behind. Of several processes all train and draw
    samples; the main one alone has the folder, evaluates and reports.
    """
    config = parts.config
    if config.resume is not None:  # what is wrong with it shows before images are read or rendered
        distributed.from_main(lambda: find_folder(parts))
    images = load_images(parts)
    folder = distributed.from_main(lambda: find_folder(parts))
    with contextlib.ExitStack() as claims:
        distributed.from_main(lambda: claims.enter_context(working_in(folder)))
        if distributed.from_main(lambda: is_finished(folder)):
            distributed.leave()
            return report_finished(folder) if distributed.is_main() else 0
        if not distributed.is_main():
            return work(parts, folder, images)
        return lead(parts, folder, images)


def load_images(parts: Parts) -> Images:
    from data.public import load_public
    from data.sensitive import load_sensitive
    from opacus_ext.noise import NoiseSource
    from opacus_ext.private_data import PrivateData

    config, sensitive, private = parts.config, None, None
    with distributed.main_goes_first():  # public images are rendered or converted once
        if parts.ledger is not None:
            sensitive = load_sensitive(config.sensitive_data, config.eval.mode, config.data_root)
        public = None
        if parts.synthesizer.uses_public_images:
            public = load_public(config.public_data, parts.spec, config.data_root)
    # All processes draw the same Poisson samples, so they share the secret key.
    noise = distributed.from_main(lambda: NoiseSource(config.privacy.noise_seed))
    if sensitive is not None:
        private = PrivateData(sensitive.train, parts.spec, parts.ledger, noise, parts.runtime.device)
    return Images(public, sensitive, private, noise)


def lead(parts: Parts, folder: Path, images: Images) -> int:
    """The main process's work, and what it says and leaves behind if it ends early. Returns the exit code."""
    config = parts.config
    try:
        describe_run(parts, folder)
        return work(parts, folder, images)
    except KeyboardInterrupt as stop:
        log.info(f"\nstopped; {how_to_continue(folder)}")
        return exit_code(stop)
    except distributed.LostProcess:
        log.info(f"a process is gone; {how_to_continue(folder)}")
        raise
    except UserError:
        if config.resume is None:
            discard_unstarted(folder)
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        reason = shortage(error)
        if reason is None:
            raise
        kept = config.resume is not None or not discard_unstarted(folder)
        advice = f"then, {how_to_continue(folder)}" if kept else "then repeat the command"
        raise UserError(f"{reason}; {advice}") from error


def work(parts: Parts, folder: Path, images: Images) -> int:
    """What is done inside the run's folder; all processes train and draw samples. Returns the exit code."""
    from pipeline.planning import plan_lines
    from pipeline.stage_times import StageTimes

    if images.private is not None:
        log.info("\n".join(plan_lines(parts.ledger, parts.spec.num_train)))
    times = StageTimes(folder)
    train(parts, folder, images, times)
    if images.private is None:
        log.info(f"pretrained without private data; checkpoints in {folder / 'pretrain' / 'checkpoints'}")
        distributed.leave()
        return 0
    if distributed.is_main():
        write_account(folder, account_of(parts, folder, images))
    samples = generate(parts, folder, images, times)
    distributed.leave()
    if not distributed.is_main():
        return 0
    return deliver(parts, folder, samples, images, times.seconds())


def deliver(parts: Parts, folder: Path, samples: Samples, images: Images, timing: dict[str, float]) -> int:
    """Write the samples down and judge them. Returns the exit code."""
    import numpy as np

    from data.samples_file import write_samples
    from evaluation.sample_checks import public_copies
    from opacus_ext.disclosure import Disclosure
    from utils.images import save_grid

    path, grid = folder / SAMPLES, folder / GRID
    if not path.exists():
        write_samples(path, samples)
    if not grid.exists():
        save_grid(samples.images, samples.labels, grid)
    config, sensitive = parts.config, images.sensitive
    held_out = validation_data(config, parts.spec, sensitive.validation, images.noise, parts.runtime.device)
    real = RealData(
        Disclosure(sensitive.train, parts.ledger),
        sensitive.test,
        held_out,
        oracle_data(config, sensitive.validation),
    )
    account = account_of(parts, folder, images)
    if images.public is not None:
        account["public_copies"] = public_copies(samples.images, images.public.samples.images)
    account["samples_per_class"] = np.bincount(samples.labels, minlength=parts.spec.num_classes).tolist()
    return judge(config, parts.spec, parts.runtime, folder, samples, real, account, timing)


def account_of(parts: Parts, folder: Path, images: Images) -> dict:
    """What privacy.json says: the report of the training ledger, and what else the samples were made from."""
    public = images.public
    described = None
    if public is not None:
        described = {"name": public.name, "images": len(public), "classes": public.num_classes}
    return {
        **images.private.report(),
        "public_data": described,
        "overrides": training_overrides(folder, parts.config),
        "learns_class_shares": parts.synthesizer.learns_class_shares,
    }


def find_folder(parts: Parts) -> Path:
    """The run's folder: a new one, or that of --resume_exp, which must have been started with the same settings."""
    from pipeline import environment
    from pipeline import folder as folders

    config = parts.config
    if config.resume is None:
        return folders.create(
            config.exp_root, config.method, config.data_name, config.epsilon, config.description
        )
    folder = folders.find(config.exp_root, config.method, config.resume)
    environment.require_same_config(folder, config)
    environment.require_same_data(folder, parts.spec.identity)
    require_not_diverged(folder)
    return folder


def describe_run(parts: Parts, folder: Path) -> None:
    """Keep what is printed from here on in the folder and, in a new one, what it takes to repeat the run."""
    from pipeline import environment
    from utils import log as logs

    parts.runtime.folder = folder
    logs.also_to(folder / "stdout.txt")
    log.info(f"run folder: {folder}")
    if parts.config.resume is None:
        environment.write(folder, parts.config, parts.spec.identity)


def is_finished(folder: Path) -> bool:
    return (folder / RESULTS).exists() and (folder / SAMPLES).exists()


def report_finished(folder: Path) -> int:
    """Say that the run of --resume_exp was finished before; returns the exit code with which it ended."""
    log.info(
        f"{folder} is finished, nothing is left to do; to judge it again: python eval.py --exp_path {folder}"
    )
    return INCOMPLETE if read_json(folder / RESULTS)["missing"] else 0


def train(parts: Parts, folder: Path, images: Images, times: StageTimes) -> None:
    """Pretrain and train, or what is left of it."""
    from pipeline.checkpoints import Checkpoints

    synthesizer = parts.synthesizer
    checkpoints = Checkpoints(folder, parts.config.method, synthesizer, parts.ledger)

    def snapshot(stage: str) -> None:
        checkpoints.save(stage, "snapshot")
        times.keep()

    parts.runtime.snapshot = snapshot
    restored = checkpoints.restore() if parts.config.resume else None
    if restored:
        log.info(f"resumed from {restored}")
    stages = {"pretrain": lambda: synthesizer.pretrain(images.public, images.private)}
    if images.private is not None:
        stages["train"] = lambda: synthesizer.train(images.private)
    for stage, take in stages.items():
        if is_past(checkpoints, restored, stage):
            continue
        with explaining_divergence(stage, parts.config, checkpoints, name_of(images.public)):
            with times.of(stage):
                take()
            checkpoints.agree()
            checkpoints.save(stage, "final")
        taken = times.seconds()[stage]
        if taken >= 0.5:  # a method without this stage has nothing to say about it
            log.info(f"{stage}: done in {duration(taken)}")
    if parts.ledger is not None:
        parts.ledger.require_complete()


def name_of(public: PublicData | None) -> str | None:
    return None if public is None else public.name


def is_past(checkpoints, restored: str | None, stage: str) -> bool:
    """The stage left its final checkpoint, or, where it left no file of its own, a later one has begun."""
    return checkpoints.finished(stage) or (stage == "pretrain" and (restored or "").startswith("train"))


def generate(parts: Parts, folder: Path, images: Images, times: StageTimes) -> Samples:
    """The samples of the run: those of gen/gen.npz if an earlier start left them, else drawn now."""
    from data.samples_file import read_samples
    from pipeline.checkpoints import Checkpoints

    kept = distributed.from_main(
        lambda: read_samples(folder / SAMPLES) if (folder / SAMPLES).exists() else None
    )
    if kept is not None:
        return kept
    checkpoints = Checkpoints(folder, parts.config.method, parts.synthesizer, parts.ledger)
    with (
        explaining_divergence("generate", parts.config, checkpoints, name_of(images.public)),
        times.of("generate"),
    ):
        return parts.synthesizer.generate(parts.config.gen.data_num)


if __name__ == "__main__":
    run_process(main)
