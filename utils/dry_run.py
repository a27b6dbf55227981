"""What --dry_run prints: the plan, the noise it needs, the size of the networks, and what it will cost."""


def describe(config, ledger, synthesizer) -> str:
    """Lines for a person; `ledger` has adopted the plan, or is None in a run without private data."""
    lines = [f"{config.method} on {config.data_name}, preset {config.preset}"]
    lines += ["no private stage (sensitive_data.name=null)"] if ledger is None else plan_lines(ledger)
    counts = synthesizer.parameter_counts()
    lines += [f"parameters: {name} {count:,}" for name, count in counts.items()]
    costs = synthesizer.costs()
    lines += [f"{cost.stage}: {cost.description}, about {_duration(cost.seconds)} here" for cost in costs]
    return "\n".join(lines)


def plan_lines(ledger) -> list[str]:
    """Budget, and noise, rate, steps and epsilon of each planned release."""
    budget = ledger.budget
    lines = [
        f"budget: epsilon {budget.epsilon:g}, delta {budget.delta:.4g}, {ledger.relation}, "
        f"accountant {ledger.accountant}"
    ]
    for release in ledger.report()["releases"]:
        lines.append(
            f"release '{release['name']}': noise_multiplier {release['noise_multiplier']:.5g}, "
            f"sample_rate {release['sample_rate']:.5g}, {_bound(release)}{release['planned']} steps, "
            f"epsilon alone {release['epsilon_alone']:.4g}"
        )
    return [*lines, f"all releases together: epsilon {ledger.planned_epsilon():.4g}"]


def _bound(release: dict) -> str:
    size = release["max_batch_size"]
    return "" if size is None else f"at most {size} images per step, "


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
