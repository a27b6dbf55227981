"""Lines for a person about a run that has not begun: its privacy plan, its networks, what it will cost."""

from collections.abc import Iterator
from pathlib import Path

from data.locations import is_in_distribution
from data.public import num_public_images, require_public
from data.sensitive import num_test_images, require_prepared
from data.spec import DataSpec
from evaluation.cost import evaluation_costs
from evaluation.listing import evaluation_line, missing_requirements
from models import FASTEST
from opacus_ext.card import person_guarantee
from opacus_ext.ledger import Budget, Ledger
from pipeline.checkpoints import Checkpoints
from pipeline.compose import Parts, compose
from pipeline.folder import is_finished
from pipeline.record import find_resumable
from utils.artefacts import SAMPLES
from utils.config import Config
from utils.errors import UserError
from utils.progress import duration
from utils.text import aligned, at_most
from utils.timing import Cost

LONG = 86400  # seconds after which a shorter way is pointed out
QUICK = 20 * 60  # seconds that preset=quick is meant for, on two CPU cores


def dry_run(config: Config) -> Iterator[str]:
    """Lines: the plan, its cost, the remaining work of the run of --resume_exp, and missing data and weights. The plan
    comes before its steps are timed."""
    parts = compose(config)
    counts = parts.synthesizer.parameter_counts()
    folder = None if config.resume is None else find_resumable(config, parts.spec.identity)
    yield from describe(config, parts.spec, parts.ledger, counts, evaluation_line(config))
    num_public = None
    if parts.synthesizer.uses_public_images:
        num_public = parts.spec.num_public
        if not is_in_distribution(config.public_data):
            num_public = num_public_images(config.public_data, config.data_root)
    costs = [] if num_public is None else parts.synthesizer.public_costs(num_public)
    evaluation = [] if parts.ledger is None else evaluation_costs_of(parts)
    costs += [] if parts.ledger is None else parts.synthesizer.costs()
    yield from cost_lines([*costs, *evaluation], config)
    if folder is not None:
        yield remaining_work(parts, folder, costs, evaluation)
    unknown_time = "; until then the time of pretraining is unknown"
    needed = [(require_prepared, config.sensitive_data, "")]
    if parts.synthesizer.uses_public_images:
        needed.append((require_public, config.public_data, unknown_time))
    for require, section, more in needed:
        try:
            require(section, config.data_root)
        except UserError as error:
            yield f"missing: {error}{more}"
    for line in parts.synthesizer.missing_requirements():
        yield f"missing: {line}"
    if parts.ledger is not None:
        judged = config.eval
        for line in missing_requirements(judged.metrics, judged.extractor, config.weights_root):
            yield f"missing: {line}"


def evaluation_costs_of(parts: Parts) -> list[Cost]:
    """The time of the evaluation."""
    config = parts.config
    num_test = num_test_images(config.sensitive_data, config.data_root)
    return evaluation_costs(
        config.eval, parts.spec, config.gen.data_num, num_test, config.weights_root, parts.runtime.device
    )


def remaining_work(parts: Parts, folder: Path, costs: list[Cost], evaluation: list[Cost]) -> str:
    """Which stages of the run in `folder` are done, how many of their steps, and the time of the rest. `costs` are of
    the whole run up to the samples, `evaluation` of their evaluation."""
    if is_finished(folder):
        return f"{folder.name} is finished: no work remains"
    checkpoints = Checkpoints(folder, parts.config.method, parts.synthesizer, parts.ledger)
    restored = checkpoints.restore()
    left = {stage: not checkpoints.is_completed(stage, restored) for stage in checkpoints.STAGES}
    done = [f"{stage} {'not done' if is_left else 'done'}" for stage, is_left in left.items()]
    answered = set()
    if parts.ledger is not None:
        left["generate"] = not (folder / SAMPLES).exists()
        done += [f"samples {'not done' if left['generate'] else 'done'}", "evaluation not done"]
        done += [
            f"'{release.name}' took {parts.ledger.executed(release.name):,} of {release.num_steps:,} steps"
            for release in parts.ledger.releases()
        ]
        answered = {
            release.name for release in parts.ledger.releases() if parts.ledger.executed(release.name)
        }
    seconds = sum(cost.seconds for cost in evaluation)
    for cost in costs:
        # What is neither training nor sampling is part of pretraining.
        part = cost.part or (cost.stage if cost.stage in left else "pretrain")
        is_done = not left[part] or cost.stage in answered  # some costs are of a query of the same name
        share = 0.0 if is_done else parts.synthesizer.remaining_share(cost)
        seconds += share * cost.seconds
        if cost.steps and 0 < share < 1:
            taken = round((1 - share) * cost.steps)
            done.append(f"stage '{cost.stage}' took {taken:,} of {cost.steps:,} steps")
    return (
        f"{folder.name}, which will resume from {restored or 'the start'}: {', '.join(done)}; remaining: "
        f"about {duration(seconds)} here"
    )


def describe(
    config: Config, spec: DataSpec, ledger: Ledger | None, parameter_counts: dict[str, int], evaluation: str
) -> list[str]:
    """What --dry_run prints first. `evaluation` describes the evaluation of the samples. `ledger` has adopted the plan,
    or is None in a run without private data."""
    lines = [f"{config.method} on {config.data_name}, preset {config.preset}"]
    if ledger is None:
        lines.append("no private stage (sensitive_data.name=null)")
    else:
        lines += [*plan_lines(ledger, spec), evaluation]
    lines += [f"parameters: {name} {count:,}" for name, count in parameter_counts.items()]
    return lines


def plan_lines(ledger: Ledger, spec: DataSpec) -> list[str]:
    """The budget, and a table of the planned queries: noise, rate, steps and epsilon of each."""
    budget = ledger.budget
    header = ("private query", "noise_multiplier", "sample_rate", "steps", "epsilon alone")
    rows = [_release_row(release) for release in ledger.rows()] or [("none", *[""] * 4)]
    rows.append(("together", "", "", "", at_most(ledger.planned_epsilon())))
    warning = [] if budget.private else ["this run is NOT private (epsilon = inf): it adds no noise"]
    return [
        *warning,
        f"privacy budget: epsilon {budget.epsilon:g}, delta {at_most(budget.delta)}, for N = {spec.num_train:,} "
        f"private images ({ledger.relation}, accountant {ledger.accountant})",
        *("  " + line for line in aligned([header, *rows])),
        *_person_line(budget, spec.images_per_person),
    ]


def _person_line(budget: Budget, count: int | None) -> list[str]:
    """The guarantee for a person, which a user should know before the budget is spent."""
    if count is None or count == 1 or not budget.private or not budget.delta:
        return []
    return [f"for a person with {count} images: {person_guarantee(count, budget.epsilon, budget.delta)}"]


def _release_row(release: dict) -> tuple[str, ...]:
    bound = release["max_batch_size"]
    return (
        release["name"],
        f"{release['noise_multiplier']:.5g}",
        f"{release['sample_rate']:.5g}" + ("" if bound is None else f", at most {bound} images"),
        f"{release['planned']:,}",
        at_most(release["epsilon_alone"]),
    )


def cost_lines(costs: list[Cost], config: Config) -> list[str]:
    """The time of each stage, from a few steps that were measured just now, and of the whole run."""
    lines = time_lines(costs, "" if config.resume is None else ", from the start of the run")
    total = sum(cost.seconds for cost in costs)
    if total > LONG and config.preset != "quick":
        lines.append("preset=quick scales the method down to minutes on a CPU")
    if total > QUICK and config.preset == "quick":
        lines.append(_speed_advice(config))
    return lines


def _speed_advice(config: Config) -> str:
    """Advice for a quick run that takes long; it names nothing that the run does already."""
    ways = ["fewer or smaller images (scripts/prepare_data.py --resolution)"]
    ways += [f"--method {FASTEST}"] if config.method != FASTEST else []
    ways += ["eval=none"] if config.eval.metrics else []
    return f"this is more than the 20 minutes that preset=quick is meant for; what shortens it: {', '.join(ways)}"


def time_lines(costs: list[Cost], whole: str = "") -> list[str]:
    """The time of each stage and of all together; `whole` says what the total covers."""
    if not costs:
        return []
    lines = [f"{cost.stage}: {cost.description}, about {duration(cost.seconds)} here" for cost in costs]
    lines.append(f"together{whole}: about {duration(sum(cost.seconds for cost in costs))} here")
    return [*lines, "(extrapolated from a few steps; other load on this machine will slow it down)"]
