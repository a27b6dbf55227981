"""Lines for a person about a run that has not begun: its privacy plan, its networks, what it will cost."""

from utils.progress import duration
from utils.text import aligned, at_most
from utils.timing import Cost

LONG = 86400  # seconds after which a shorter way is pointed out
QUICK = 20 * 60  # seconds that preset=quick is meant for, on two CPU cores
TOO_LONG = (
    "this is more than the 20 minutes that preset=quick is meant for; what shortens it: fewer or smaller images "
    "(scripts/prepare_data.py --resolution), --method DP-MERF, eval=none"
)


def describe(config, spec, ledger, parameter_counts: dict[str, int], evaluation: str) -> list[str]:
    """What --dry_run prints first. `evaluation` says how samples will be judged. `ledger` has adopted the plan, or is
    None in a run without private data."""
    lines = [f"{config.method} on {config.data_name}, preset {config.preset}"]
    if ledger is None:
        lines.append("no private stage (sensitive_data.name=null)")
    else:
        lines += [*plan_lines(ledger, spec.num_train), evaluation]
    lines += [f"parameters: {name} {count:,}" for name, count in parameter_counts.items()]
    return lines


def plan_lines(ledger, num_train: int) -> list[str]:
    """The budget, and a table of the planned queries: noise, rate, steps and epsilon of each."""
    budget = ledger.budget
    header = ("private query", "noise_multiplier", "sample_rate", "steps", "epsilon alone")
    rows = [_release_row(release) for release in ledger.rows()] or [("none", *[""] * 4)]
    rows.append(("together", "", "", "", at_most(ledger.planned_epsilon())))
    warning = [] if budget.private else ["this run is NOT private (epsilon = inf): it adds no noise"]
    return [
        *warning,
        f"privacy budget: epsilon {budget.epsilon:g}, delta {at_most(budget.delta)}, for N = {num_train:,} private "
        f"images ({ledger.relation}, accountant {ledger.accountant})",
        *("  " + line for line in aligned([header, *rows])),
    ]


def _release_row(release: dict) -> tuple[str, ...]:
    bound = release["max_batch_size"]
    return (
        release["name"],
        f"{release['noise_multiplier']:.5g}",
        f"{release['sample_rate']:.5g}" + ("" if bound is None else f", at most {bound} images"),
        f"{release['planned']:,}",
        at_most(release["epsilon_alone"]),
    )


def cost_lines(costs: list[Cost], config) -> list[str]:
    """The time of each stage, from a few steps that were measured just now, and of the whole run."""
    if not costs:
        return []
    lines = [f"{cost.stage}: {cost.description}, about {duration(cost.seconds)} here" for cost in costs]
    total = sum(cost.seconds for cost in costs)
    whole = "" if config.resume is None else ", from the start of the run"
    lines.append(f"together{whole}: about {duration(total)} here")
    lines.append("(measured on a few steps; other work on this machine makes it longer)")
    if total > LONG and config.preset != "quick":
        lines.append("preset=quick scales the method down to minutes on a CPU")
    if total > QUICK and config.preset == "quick":
        lines.append(TOO_LONG)
    return lines
