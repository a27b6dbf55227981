"""Judge labelled images, whoever made them, or the samples of a finished run again.

    python eval.py --images my_samples.zip --data_name cifar10_32 --out judged
    python eval.py --exp_path exp/privimage/<run>
    python eval.py --list

In eval.mode=val judging a run asks the private validation images once more; privacy.json adds it up.
"""

import dataclasses
import sys
import time
from pathlib import Path

from models import METHODS
from pipeline.environment import values_of, words_of
from pipeline.folder import discarded_on_failure, new_folder, working_in
from pipeline.judging import (
    INCOMPLETE,
    RealData,
    judge,
    no_account,
    open_door,
    oracle_data,
    validation_data,
    write_down,
)
from utils.artefacts import CONFIG, ENVIRONMENT, PRIVACY, RESULTS, SAMPLES
from utils.bounds import at_most
from utils.command_line import read_command_line, short_help
from utils.config import COMMAND_LINE, Config, format_config, load_config
from utils.config_files import flatten
from utils.errors import UserError
from utils.files import read_json, require_writable
from utils.log import also_to, to_terminal
from utils.places import path_of
from utils.program import MISTAKE, program, run_process
from utils.runtime import Runtime, log

RUN_FLAGS = {
    "method": "method",
    "data_name": "data_name",
    "epsilon": "privacy.epsilon",
}  # flag -> key of config.yaml
# Another value than the run's would let eval.mode=val ask records that were trained on, or account for it wrongly.
FIXED = ("sensitive_data.num_train", "sensitive_data.num_val", "privacy.relation")
USED = (
    "eval",
    "sensitive_data",
    "privacy",
    "setup",
    "seed",
    "preset",
)  # sections and keys that judging looks at


@program
def main(argv: list[str]) -> int:
    to_terminal()
    if not argv:
        print(short_help("eval"), file=sys.stderr)
        return MISTAKE
    return start(argv)


def start(argv: list[str]) -> int:
    config = load_config(with_run(without_method(argv)), METHODS, program="eval")
    if config.print_config:
        log.info(format_config(config))
        return 0
    if config.list_parts:
        return show_parts(config)
    if not config.eval.metrics and config.eval.gallery is None:
        raise UserError(
            "--metrics: names none; give at least one, for example --metrics accuracy,fid (see --list)"
        )
    return evaluate(config) if config.images is None else evaluate_images(config)


def with_run(argv: list[str]) -> list[str]:
    """The command line, with what it leaves out about the run of --exp_path taken from the run's folder.

    The run is judged as it was before, but for eval.mode=val, which costs the validation images once more: only who
    asks for it gets it.
    """
    flags, settings, given = read_command_line(argv, "eval")
    for key in settings:
        if key.split(".")[0] not in USED:
            raise UserError(f"{key}={settings[key]}: judging samples does not use it; leave it out")
    if flags.exp_path is None:
        return argv
    folder = path_of(flags.exp_path, "--exp_path")
    run = values_of(folder)
    words = [] if "plugin" in given else plugins_of(folder)
    missing = [
        key for key in (*RUN_FLAGS.values(), "seed", "preset", *FIXED, "eval.metrics") if key not in run
    ]
    if missing:
        raise UserError(f"{flags.exp_path}: its {CONFIG} is damaged (it has no {missing[0]})")
    for flag, key in RUN_FLAGS.items():
        words += [] if flag in given else [f"--{flag}", str(run[key])]
    keys = ["seed", "preset", *FIXED]
    # A name of data that is given is checked later; a run that judged nothing says nothing about how to.
    keys += (
        []
        if "data_name" in given
        else [key for key in run if key.startswith("sensitive_data.") and not isinstance(run[key], list)]
    )
    judged = run["eval.metrics"] and not {"eval", "preset"} & set(settings)
    keys += [key for key in run if key.startswith("eval.")] if judged else ["eval.mode"]
    for key in dict.fromkeys(keys):
        if key not in settings:
            words.append(f"{key}={'syn' if (key, run[key]) == ('eval.mode', 'val') else as_text(run[key])}")
    return [*argv, *words]


def plugins_of(folder: Path) -> list[str]:
    """The words --plugin <module> with which the run was started: its method may be one of theirs."""
    if not (folder / ENVIRONMENT).exists():
        return []
    flags, _, _ = read_command_line(words_of(folder), "run")
    return [word for name in flags.plugin for word in ("--plugin", name)]


def as_text(value: object) -> str:
    """A value of config.yaml as the command line spells it."""
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return "null" if value is None else str(value)


def without_method(argv: list[str]) -> list[str]:
    """The command line with the smallest method in it where images are judged, which no method matters for."""
    _, _, given = read_command_line(argv, "eval")
    if "out" in given and "images" not in given:
        raise UserError("--out: needs --images; a run's results go into its own folder")
    if not {"images", "list"} & given:
        return argv
    if {"images", "list"} <= given:
        raise UserError("--images: is not used with --list; leave one of them out")
    for flag in ("method", "epsilon", "exp_path"):
        if flag in given:
            raise UserError(
                f"--{flag}: is not used with --{'images' if 'images' in given else 'list'}; leave it out"
            )
    return ["--method", "Noise", *argv]


def show_parts(config: Config) -> int:
    from evaluation.listing import listing

    log.info(listing(config.weights_root))
    return 0


def evaluate_images(config: Config) -> int:
    """Judge the images of --images against all training and test images; returns the exit code."""
    from data.sensitive import load_sensitive, private_cache, require_prepared, spec_of
    from evaluation.earlier import earlier_report, facts_of
    from evaluation.evaluator import Evaluator
    from evaluation.images import read_images
    from evaluation.page import REPORT
    from utils.device import prepare_device

    config = as_images(config)
    spec, lines = spec_of(config.sensitive_data, config.eval.mode, config.data_root)
    evaluator = Evaluator(
        config.eval, spec, config.weights_root, prepare_device(config.setup), config.seed,
        private_cache(config.sensitive_data, config.data_root), config.sensitive_data.prompt,
    )  # fmt: skip
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
        log.info(plan_of(config, len(samples), config.images))
        return 0
    sensitive = load_sensitive(config.sensitive_data, config.eval.mode, config.data_root)
    folder, is_new = folder_of_results(config)
    with discarded_on_failure(folder, is_new):
        require_writable(folder)
        also_to(folder / "stdout.txt")
        start = time.perf_counter()
        report = evaluator.evaluate(samples, train=sensitive.train, test=sensitive.test, select=None)
        written = write_down(
            folder, config, spec, report, samples, sensitive.train, title=f"{config.images.name} on {spec.name}",
            account=no_account(private=None, spent=None), card=None,
            timing={"evaluate": time.perf_counter() - start}, facts=facts,
        )  # fmt: skip
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


def as_images(config: Config) -> Config:
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


def evaluate(config: Config) -> int:
    """Read the run's samples and privacy report, and judge; returns the exit code."""
    from utils.device import prepare_device

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
    for line in (*config.notes, *lines):
        log.info(line)
    if (split, config.eval.mode) == ("val", "syn"):
        log.info(
            "eval.mode=syn; eval.mode=val would ask the run's validation images again, which costs them epsilon"
        )
    if config.dry_run:
        log.info(plan_of(config, len(samples), folder))
        return 0
    runtime = Runtime(prepare_device(config.setup), config.seed, config.setup.precision, folder)
    require_writable(folder)
    also_to(folder / "stdout.txt")
    real = real_images(config, spec, split, runtime.device)
    with working_in(folder):
        return judge(config, spec, runtime, folder, samples, real, read_json(folder / PRIVACY), timing={})


def samples_of(config: Config, split: str):
    """The samples of the run, the DataSpec of what it was trained on, and lines to tell the user."""
    from data.samples_file import read_samples
    from data.sensitive import spec_of
    from evaluation.earlier import earlier_report, facts_of

    path = config.exp_path / SAMPLES
    samples = read_samples(path)
    spec, lines = spec_of(config.sensitive_data, split, config.data_root)
    require_same_split(config.exp_path, config, spec)
    if earlier_report(config.exp_path, config.data_name, facts_of(samples, spec)) is None:
        raise UserError(
            f"{path}: other samples than those that {RESULTS} is about, or {spec.name} was prepared again; to judge "
            f"them apart: python eval.py --images {path} --data_name {config.data_name} --out <folder>"
        )
    return samples, spec, lines


def real_images(config: Config, spec, split: str, device: str) -> RealData:
    """What the samples of a run are judged against."""
    from data.sensitive import load_sensitive
    from opacus_ext.noise import NoiseSource

    sensitive = load_sensitive(config.sensitive_data, split, config.data_root)
    held_out = sensitive.validation if config.eval.mode == "val" else None  # other modes have no use for them
    return RealData(
        open_door(sensitive.train),
        sensitive.test,
        validation_data(config, spec, held_out, NoiseSource(config.privacy.noise_seed), device),
        oracle_data(config, held_out),
    )


def plan_of(config: Config, count: int, source: Path) -> str:
    """What --dry_run prints: how the images would be judged, what it would cost, and what is missing."""
    from evaluation.listing import evaluation_line, lacking

    judged = config.eval
    lines = [f"{count:,} images of {source} would be judged", evaluation_line(config)]
    if judged.mode == "val":
        spent = sum(selection["spent"] for selection in read_json(source / PRIVACY)["selection"])
        lines.append(f"so far choices have cost these images epsilon {at_most(spent)}; it adds up")
    lines += [f"classifiers: {', '.join(judged.classifiers)}; recipe {judged.recipe}, seed {config.seed}"]
    lines += [f"missing: {line}" for line in lacking(judged.metrics, judged.extractor, config.weights_root)]
    return "\n".join(lines)


def require_run_of(folder: Path, config: Config) -> None:
    """Raise UserError unless the flags say what the run is, and it kept the images aside that eval.mode=val asks."""
    run, given = values_of(folder), flatten(config.snapshot)
    names = {key: f"--{flag}" for flag, key in RUN_FLAGS.items()} | {key: key for key in FIXED}
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


def require_same_split(folder: Path, config: Config, spec) -> None:
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


if __name__ == "__main__":
    run_process(main)
