"""One run from its configuration to the evaluation of its samples: stages, resuming, errors."""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data.in_distribution import public_part
from data.locations import is_in_distribution
from data.public import load_public
from data.samples_file import read_samples, write_samples
from data.sensitive import SensitiveData, load_sensitive
from data.spec import PublicData, Samples
from evaluation.sample_checks import exact_copies
from evaluation.selection import RELEASED
from models.released.classifier import ORIGIN, logits_of, write_classifier
from opacus_ext.accounting import Release
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from pipeline import folder as folders
from pipeline.checkpoints import Checkpoints
from pipeline.compose import Parts, compose
from pipeline.divergence import explaining_divergence
from pipeline.evaluation import INCOMPLETE, evaluate_run
from pipeline.folder import discard_unstarted, is_finished, working_in
from pipeline.planning import plan_lines
from pipeline.record import find_resumable, training_overrides, write_account, write_start
from pipeline.stage_times import StageTimes
from utils import distributed
from utils import log as logs
from utils.artefacts import CLASSIFIER, GRID, PRIVACY, PRODUCTS, RESULTS, SAMPLES
from utils.config import Config
from utils.config_files import flatten
from utils.device import prepare_device
from utils.errors import UserError
from utils.files import read_json
from utils.images import save_grid
from utils.progress import duration
from utils.runtime import log
from utils.stopping import describe_shortage, exit_code


@dataclasses.dataclass
class Images:
    """What a run works on, once it has read it. The private ones are reached by `private` alone until the samples are
    made."""

    public: PublicData | None
    sensitive: SensitiveData | None  # None, and the next, in a run without private data
    private: PrivateData | None
    noise: NoiseSource


def start(config: Config, program: Callable[[list[str]], int], argv: list[str]) -> int:
    """Compose the run, start the other processes of this machine as program(argv), and run. Returns the exit code.

    Mistakes that show without a look at the images show before processes are started. The noise is calibrated once.
    """
    parts = compose(config) if distributed.is_main() else None
    with distributed.processes(prepare_device(config.setup), program, argv):
        require_same_settings(config)
        plan = distributed.from_main(lambda: _plan_of(parts))
        if parts is None:
            parts = compose(config, plan)
        return run(parts)


def _plan_of(parts: Parts) -> list[Release] | None:
    return None if parts.ledger is None else parts.ledger.releases()


def require_same_settings(config: Config) -> None:
    """Raise UserError if this machine was started with other settings than the main process's."""
    before, now = distributed.from_main(lambda: flatten(config.snapshot)), flatten(config.snapshot)
    for key in sorted({*before, *now}):
        if not key.startswith("setup.") and before.get(key) != now.get(key):
            raise UserError(
                f"{key}: {now.get(key)} here, but {before.get(key)} on machine 0; start all with the same settings"
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
            return run_stages(parts, folder, images)
        return run_main_process(parts, folder, images)


def load_images(parts: Parts) -> Images:
    config, sensitive, private = parts.config, None, None
    with distributed.main_goes_first():  # public images are rendered or converted once
        if parts.ledger is not None:
            sensitive = load_sensitive(config.sensitive_data, config.eval.mode, config.data_root)
        public = None
        if is_in_distribution(config.public_data):
            public = public_part(sensitive.public, parts.spec)
        elif parts.synthesizer.uses_public_images:
            public = load_public(config.public_data, parts.spec, config.data_root)
    # All processes draw the same Poisson samples, so they share the secret key.
    noise = distributed.from_main(lambda: NoiseSource(config.privacy.noise_seed))
    if sensitive is not None:
        private = PrivateData(sensitive.train, parts.spec, parts.ledger, noise, parts.runtime.device)
    return Images(public, sensitive, private, noise)


def run_main_process(parts: Parts, folder: Path, images: Images) -> int:
    """Run as the main process; if it ends early, report how to resume. Returns the exit code."""
    config = parts.config
    try:
        describe_run(parts, folder)
        return run_stages(parts, folder, images)
    except KeyboardInterrupt as stop:
        log.info(f"\nstopped; {how_to_resume(folder)}")
        return exit_code(stop)
    except distributed.LostProcess:
        log.info(f"a worker process died; {how_to_resume(folder)}")
        raise
    except UserError:
        if config.resume is None:
            discard_unstarted(folder)
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        reason = describe_shortage(error)
        if reason is None:
            raise
        kept = config.resume is not None or not discard_unstarted(folder)
        advice = f"then, {how_to_resume(folder)}" if kept else "then repeat the command"
        raise UserError(f"{reason}; {advice}") from error


def run_stages(parts: Parts, folder: Path, images: Images) -> int:
    """What is done inside the run's folder; all processes train and draw samples. Returns the exit code."""
    if images.private is not None:
        log.info("\n".join(plan_lines(parts.ledger, parts.spec)))
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
    return write_and_evaluate(parts, folder, samples, images, times.seconds())


def write_and_evaluate(
    parts: Parts, folder: Path, samples: Samples, images: Images, timing: dict[str, float]
) -> int:
    """Write the products of the run and evaluate them. Returns the exit code."""
    path, grid = folder / SAMPLES, folder / GRID
    if len(samples) and not path.exists():
        write_samples(path, samples)
    if len(samples) and not grid.exists():
        save_grid(samples.images, samples.labels, grid)
    account = account_of(parts, folder, images)
    released = parts.synthesizer.released_classifier()
    if released is not None and not (folder / CLASSIFIER).exists():
        write_classifier(folder / CLASSIFIER, released, parts.spec, origin_of(parts, folder))
    account["products"] = [name for name in PRODUCTS if (folder / name).exists()]
    if images.public is not None:
        account["public_copies"] = exact_copies(samples.images, images.public.samples.images)
    account["samples_per_class"] = np.bincount(samples.labels, minlength=parts.spec.num_classes).tolist()
    classify = (
        None
        if released is None
        else partial(logits_of, released, device=parts.runtime.device, description=RELEASED)
    )
    return evaluate_run(parts, folder, samples, images.sensitive, images.noise, account, timing, classify)


def origin_of(parts: Parts, folder: Path) -> dict:
    """What the file of a released classifier states about its run."""
    account = read_json(folder / PRIVACY)
    config, facts = parts.config, {key: account[key] for key in ORIGIN if key in account}
    return {"method": config.method, "data": config.data_name, "num_public": parts.spec.num_public, **facts}


def account_of(parts: Parts, folder: Path, images: Images) -> dict:
    """The content of privacy.json: the report of the training ledger, and what else the samples were made from."""
    public = images.public
    described = None
    if public is not None:
        described = {"name": public.name, "images": len(public), "classes": public.num_classes}
    if parts.spec.num_public:
        described |= {"of_private_set": parts.spec.name, "public_seed": parts.spec.public_seed}
    return {
        **images.private.report(),
        "public_data": described,
        "overrides": training_overrides(folder, parts.config),
        "learns_class_shares": parts.synthesizer.learns_class_shares,
    }


def find_folder(parts: Parts) -> Path:
    """The run's folder: a new one, or that of --resume_exp, which must have been started with the same settings."""
    config = parts.config
    if config.resume is None:
        return folders.create(
            config.exp_root, config.method, config.data_name, config.epsilon, config.description
        )
    return find_resumable(config, parts.spec.identity)


def describe_run(parts: Parts, folder: Path) -> None:
    """Keep what is printed from here on in the folder and, in a new one, what it takes to repeat the run."""
    logs.also_to(folder / "stdout.txt")
    log.info(f"run folder: {folder}")
    if parts.config.resume is None:
        write_start(folder, parts.config, parts.spec.identity)


def report_finished(folder: Path) -> int:
    """Report that the run of --resume_exp is finished; returns the exit code with which it ended."""
    log.info(f"{folder} is finished; to evaluate it again: python eval.py --exp_path {folder}")
    return INCOMPLETE if read_json(folder / RESULTS)["missing"] else 0


def train(parts: Parts, folder: Path, images: Images, times: StageTimes) -> None:
    """Run the stages that are not finished: pretraining, then training."""
    synthesizer = parts.synthesizer
    checkpoints = Checkpoints(folder, parts.config.method, synthesizer, parts.ledger)

    def snapshot(stage: str) -> None:
        checkpoints.save(stage, "snapshot")
        times.keep()

    # The main process alone owns the folder; the others take part in snapshots.
    parts.runtime.attach(folder if distributed.is_main() else None, snapshot)
    restored = checkpoints.restore() if parts.config.resume else None
    if restored:
        log.info(f"resumed from {restored}")
    stages = {"pretrain": lambda: synthesizer.pretrain(images.public, images.private)}
    if images.private is not None:
        stages["train"] = lambda: synthesizer.train(images.private)
    for stage, take in stages.items():
        if checkpoints.is_completed(stage, restored):
            continue
        with explaining_divergence(stage, parts.config, checkpoints, name_of(images.public)):
            with times.of(stage):
                take()
            checkpoints.synchronise()
            checkpoints.save(stage, "final")
        taken = times.seconds()[stage]
        if taken >= 0.5:  # a method without this stage has nothing to say about it
            log.info(f"{stage}: done in {duration(taken)}")
    if parts.ledger is not None:
        parts.ledger.require_complete()


def name_of(public: PublicData | None) -> str | None:
    return None if public is None else public.name


def generate(parts: Parts, folder: Path, images: Images, times: StageTimes) -> Samples:
    """The samples of the run: those of gen/gen.npz if an earlier start left them, else drawn now. None at all if the
    only product is a classifier."""
    if not parts.synthesizer.makes_images:
        return Samples.none(parts.spec.image_shape)
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


def how_to_resume(folder: Path) -> str:
    return f"to continue from the last snapshot: python run.py --resume_exp {shlex.quote(str(folder))}"
