"""Epsilon of a list of releases, and the noise that meets a budget.

Three accountants: `pld` (dp-accounting, the default and the tightest), `rdp` and `prv`, for comparison with published
tables. All are upper bounds.
"""

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opacus_ext.errors import AccountingError, BudgetExceeded
from opacus_ext.shard_accounting import step_loss
from utils.errors import UserError
from utils.runtime import log

if TYPE_CHECKING:  # slow to import
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

ADD_OR_REMOVE_ONE = "add_or_remove_one"
REPLACE_ONE = "replace_one"
CHOSEN_SHARD = "chosen_shard"

# Grid cells per standard deviation of one step's privacy loss (root mean square over the steps of a plan).
# dp-accounting rounds pessimistically: a loss moves to the two neighbouring grid points, which adds about 1/6 of a
# squared cell to its variance, 1/4 at most. 12 cells overstate the noise by 0.06 % (0.09 % at most), however many
# steps there are. Much finer grids are no better: the rounding of float64, divided by the cell, is extra mass in
# every step.
CELLS_PER_DEVIATION = 12
NEGLIGIBLE = 1e-4  # of delta: mass in the tails that all steps together may count as lost
PRV_POINTS = (
    3e6  # of PRV's grid: above, the second opinion is left out, because it takes minutes and gigabytes
)
RDP_ROUNDING = 1e-15  # of one order's log moment in one step: float64 sums of terms that nearly cancel to 0


@dataclass(frozen=True)
class Release:
    """One planned kind of noisy query of the private data.

    noise_multiplier: noise standard deviation (Gaussian) or scale (Laplace) over the sensitivity; None = let the
    ledger solve for it. sample_rate: Poisson inclusion probability per step. mechanism: "gaussian";
    "report_noisy_max" (pure epsilon of 1 / noise_multiplier per step); or "chosen_shard", a result with Gaussian
    noise from one of 1 / sample_rate disjoint shards (see shard_accounting.py). max_batch_size: a larger sample is
    replaced by a uniformly random subset of this size (truncated Poisson sampling); its cost depends on num_records,
    the public size of the data set. noise_seeded: an earlier run executed it with noise from a known seed (tests), so
    its cost guarantees nothing. inherited: an earlier run executed it, which may have split the records differently.
    """

    name: str
    noise_multiplier: float | None
    sample_rate: float = 1.0
    num_steps: int = 1
    mechanism: str = "gaussian"
    max_batch_size: int | None = None
    num_records: int | None = None
    noise_seeded: bool = False
    inherited: bool = False

    def __post_init__(self) -> None:
        assert self.mechanism in ("gaussian", "report_noisy_max", CHOSEN_SHARD), self.mechanism
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"release '{self.name}': sample_rate {self.sample_rate} is not in (0, 1]")
        if self.num_steps < 0:
            raise UserError(f"release '{self.name}': num_steps {self.num_steps} is negative")
        if self.noise_multiplier is not None and not self.noise_multiplier >= 0:
            raise UserError(
                f"release '{self.name}': noise_multiplier {self.noise_multiplier} is not 0 or more"
            )
        if self.max_batch_size is not None:
            assert self.mechanism == "gaussian" and self.num_records, self
            if self.max_batch_size < 1:
                raise UserError(
                    f"release '{self.name}': max_batch_size {self.max_batch_size} is not 1 or more"
                )

    @property
    def takes_all(self) -> bool:
        """Whether every record takes part in every step."""
        return self.sample_rate == 1.0 and self.max_batch_size is None and self.mechanism != CHOSEN_SHARD


def epsilon_of(
    releases: Sequence[Release],
    delta: float,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
) -> float:
    """Smallest known epsilon such that all releases together are (epsilon, delta)-DP; inf if any has no noise.

    Pure-epsilon releases add up by basic composition on top of the composed Gaussians.
    """
    executed = [release for release in releases if release.num_steps]
    if any(release.noise_multiplier == 0 for release in executed):
        return math.inf
    pure = _pure_epsilon([r for r in executed if r.mechanism == "report_noisy_max"], relation)
    others = [r for r in executed if r.mechanism != "report_noisy_max"]
    bound = {"pld": _pld_epsilon, "rdp": _rdp_epsilon, "prv": _prv_epsilon}[accountant]
    return pure + bound(others, delta, relation)


def available_epsilons(releases: Sequence[Release], delta: float, relation: str) -> dict[str, float | None]:
    """Epsilon by every accountant; None where one cannot bound these releases. PLD above RDP is an error."""
    values: dict[str, float | None] = {
        "pld": epsilon_of(releases, delta, "pld", relation),
        "rdp": _if_known(releases, delta, "rdp", relation),
        "prv": None,
    }
    _require_agreement(values["pld"], values["rdp"], releases)
    if _prv_points(values["pld"], releases) <= PRV_POINTS:
        values["prv"] = _if_known(releases, delta, "prv", relation)
    return values


def require_agreement(releases: Sequence[Release], delta: float, relation: str) -> None:
    """Raise AccountingError if the PLD epsilon of these releases exceeds the RDP epsilon: both are upper bounds, PLD
    the sharper one, so one of them must be wrong."""
    pld = epsilon_of(releases, delta, "pld", relation)
    _require_agreement(pld, _if_known(releases, delta, "rdp", relation), releases)


def _require_agreement(pld: float, rdp: float | None, releases: Sequence[Release]) -> None:
    if rdp is not None and pld > rdp * (1 + 1e-3) + 1e-6:
        plan = ", ".join(
            f"'{r.name}' (noise_multiplier {r.noise_multiplier:.6g}, sample_rate {r.sample_rate:.6g}, "
            f"{r.num_steps} steps)"
            for r in releases
        )
        raise AccountingError(
            f"the PLD epsilon {pld:.6g} exceeds the RDP epsilon {rdp:.6g} for {plan}: two bounds contradict each "
            f"other, so neither is trusted; change the steps or the sample rate, and report this plan as a bug"
        )


def _if_known(releases: Sequence[Release], delta: float, accountant: str, relation: str) -> float | None:
    try:
        return epsilon_of(releases, delta, accountant, relation)
    except UserError:  # this accountant does not support the relation or the sampling
        return None


# An accountant fails on a contradiction, on a plan that it cannot bound, or on overflow or too little memory.
_NOT_COMPUTED = (ValueError, ArithmeticError, RuntimeError, MemoryError)


def spending(releases: Sequence[Release], delta: float, accountant: str, relation: str) -> dict:
    """The entries of privacy.json about the cost of these releases: `spent` by `accountant`, and `spent_by_accountant`.

    Does not raise, so that the samples of a finished training are not lost: if an epsilon cannot be computed, `spent`
    is inf, which claims nothing, and `not_computed` gives the reason (else None).
    """
    try:
        return {
            "spent": epsilon_of(releases, delta, accountant, relation),
            "spent_by_accountant": available_epsilons(releases, delta, relation),
            "not_computed": None,
        }
    except _NOT_COMPUTED as error:
        reason = f"{type(error).__name__}: {error}"
        return {"spent": math.inf, "spent_by_accountant": {}, "not_computed": reason}


def epsilon_or_inf(releases: Sequence[Release], delta: float, accountant: str, relation: str) -> float:
    """epsilon_of, or inf if it cannot be computed; for information, never for what is claimed."""
    try:
        return epsilon_of(releases, delta, accountant, relation)
    except _NOT_COMPUTED:
        return math.inf


def _prv_points(epsilon: float, releases: Sequence[Release]) -> float:
    """The approximate size of Opacus's grid: epsilon and a margin on both sides, in cells of its eps_error of 0.01 over
    the square root of the number of steps."""
    steps = sum(release.num_steps for release in releases if not release.takes_all)
    return 2 * (1.5 * epsilon + 3) * 4 * math.sqrt(steps + 1) / 0.01


def calibrate(
    with_noise: Callable[[float], Sequence[Release]],
    budget_epsilon: float,
    delta: float,
    accountant: str,
    relation: str = ADD_OR_REMOVE_ONE,
) -> float:
    """The smallest noise multiplier z, to 1e-4 relative, at which the plan `with_noise(z)` costs at most the budget.

    Raises BudgetExceeded if no amount of noise helps (the fixed releases alone exceed the budget).
    """
    from scipy.optimize import brentq

    def excess(log_z: float) -> float:
        epsilon = epsilon_of(with_noise(math.exp(log_z)), delta, accountant, relation)
        return math.log(min(max(epsilon, 1e-9), 1e6) / budget_epsilon)

    low, high = _bracket(excess, with_noise, budget_epsilon, delta)
    solved = brentq(excess, low, high, xtol=1e-5)
    while excess(solved) > 0:
        solved += 1e-5
    return math.exp(solved)


def _bracket(
    excess: Callable[[float], float],
    with_noise: Callable[[float], Sequence[Release]],
    budget_epsilon: float,
    delta: float,
) -> tuple[float, float]:
    """(low, high) log noise multipliers with excess(low) > 0 >= excess(high).

    Starts from the central-limit approximation and proceeds from much noise to little. With far too little noise,
    accountants are slow and PRV exhausts the memory.
    """
    from scipy.optimize import brentq

    def approximate(log_z: float) -> float:
        mu_squared = sum(_clt_mu_squared(release) for release in with_noise(math.exp(log_z)))
        epsilon = gaussian_epsilon(1.0 / math.sqrt(min(mu_squared, 1e4)), delta)
        return math.log(max(epsilon, 1e-9) / budget_epsilon)

    lowest, highest = math.log(0.1), math.log(1e6)
    if approximate(highest) > 0:
        start = highest
    else:
        start = brentq(approximate, lowest, highest, xtol=1e-2) if approximate(lowest) > 0 else lowest
    high = start + 0.2
    while excess(high) > 0:
        high += 0.5
        if high > highest + 1:
            raise BudgetExceeded(f"no amount of noise meets epsilon {budget_epsilon} at delta {delta:.3g}")
    low = high - 0.2
    while excess(low) <= 0:
        low, high = low - 0.2, low
    return low, high


def _clt_mu_squared(release: Release) -> float:
    """mu^2 of the Gaussian that a composed, subsampled Gaussian tends to (Bu et al. 2020, corollary 5.4)."""
    if release.noise_multiplier == 0:
        return math.inf if release.num_steps else 0.0
    exponent = min(release.noise_multiplier**-2, 50.0)
    if release.takes_all:
        return release.num_steps * release.noise_multiplier**-2
    return _effective_rate(release) ** 2 * release.num_steps * math.expm1(exponent)


def noisy_max_release(name: str, epsilon: float, relation: str) -> Release:
    """The plan of one report-noisy-max that costs `epsilon` (inf: no noise)."""
    return Release(name, _noisy_max_factor(relation) / epsilon, mechanism="report_noisy_max")


def _pure_epsilon(releases: Sequence[Release], relation: str) -> float:
    return sum(_noisy_max_factor(relation) * r.num_steps / r.noise_multiplier for r in releases)


def _noisy_max_factor(relation: str) -> float:
    # Adding a record moves all votes the same way (monotone), so scale b gives 1/b (Dwork & Roth 2014, claim 3.9);
    # replacing a record is a removal and an addition.
    return 2.0 if relation == REPLACE_ONE else 1.0


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism (Balle & Wang 2018, theorem 8), sensitivity 1; inf if delta is 0."""
    from dp_accounting import get_epsilon_gaussian

    with np.errstate(all="ignore"):  # the library subtracts logarithms that may be equal
        return float(get_epsilon_gaussian(noise_multiplier, delta))


def _merge_full_batch(releases: Sequence[Release], relation: str) -> tuple[float | None, list[Release]]:
    """Fold the unsampled Gaussians into one: multipliers compose as 1/z^2 = sum T_i / z_i^2, exactly.

    Under replace_one a sum moves by twice the bound, hence the factor 2 for the folded one.
    """
    full = [r for r in releases if r.takes_all]
    sampled = [r for r in releases if not r.takes_all]
    if not full:
        return None, sampled
    merged = 1.0 / math.sqrt(sum(r.num_steps / r.noise_multiplier**2 for r in full))
    return (merged / 2 if relation == REPLACE_ONE else merged), sampled


def _cached(bound: Callable[..., float]) -> Callable[..., float]:
    """Cache `bound`, a slow pure function: calibration, plan, report and card compute the same values."""
    bound_of_tuple = functools.lru_cache(maxsize=1024)(bound)

    @functools.wraps(bound)
    def cached(releases: Sequence[Release], delta: float, relation: str) -> float:
        return bound_of_tuple(tuple(releases), delta, relation)

    return cached


@_cached
def _pld_epsilon(releases: Sequence[Release], delta: float, relation: str) -> float:
    full, sampled = _merge_full_batch(releases, relation)
    if not sampled:
        return 0.0 if full is None else gaussian_epsilon(full, delta)
    if delta == 0:
        return math.inf
    from dp_accounting.pld import privacy_loss_distribution

    grid, lost = _grid(full, sampled), NEGLIGIBLE * delta
    total = privacy_loss_distribution.identity(grid)
    if full is not None:  # carries the factor of the relation
        total = privacy_loss_distribution.from_gaussian_mechanism(full, value_discretization_interval=grid)
    num_steps = sum(r.num_steps for r in sampled)
    for r in sampled:
        one = _step_loss(r, relation, grid, lost / num_steps)
        total = total.compose(one.self_compose(r.num_steps, lost), lost)
    return float(total.get_epsilon_for_delta(delta))


def _grid(full: float | None, sampled: Sequence[Release]) -> float:
    """Cell width of the privacy-loss grid, which the whole composition shares."""
    squares = sum(r.num_steps * _loss_deviation(_effective_rate(r), r.noise_multiplier) ** 2 for r in sampled)
    num_steps = sum(r.num_steps for r in sampled)
    if full is not None:
        squares, num_steps = squares + full**-2, num_steps + 1
    return math.sqrt(squares / num_steps) / CELLS_PER_DEVIATION


def _effective_rate(release: Release) -> float:
    """An upper bound of the rate at which a record takes part in a step."""
    if release.max_batch_size is None:
        return release.sample_rate
    return min(release.sample_rate, release.max_batch_size / release.num_records)


def _loss_deviation(rate: float, noise_multiplier: float) -> float:
    """Standard deviation of the privacy loss of one Poisson-sampled Gaussian when the record is removed, by the
    trapezoidal rule. Under replace_one, with truncation and for a chosen shard it is larger."""
    z = noise_multiplier
    x = np.linspace(-12 * z, 1 + 12 * z, 4001)  # the sum along the record's contribution, which is 1 long
    without, sampled = -((x / z) ** 2) / 2, -(((x - 1) / z) ** 2) / 2
    log_density = (
        sampled if rate == 1 else np.logaddexp(math.log1p(-rate) + without, math.log(rate) + sampled)
    )
    loss, weight = log_density - without, np.exp(log_density)
    mean = np.average(loss, weights=weight)
    return math.sqrt(np.average((loss - mean) ** 2, weights=weight))


def _step_loss(release: Release, relation: str, grid: float, lost: float) -> "PrivacyLossDistribution":
    """dp-accounting's privacy loss distribution of one step, on multiples of `grid`, rounded pessimistically; about
    the mass `lost` of its tail counts as lost. Truncated: Ganesh et al. 2025, arXiv 2508.15089."""
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution

    rate, noise_multiplier = release.sample_rate, release.noise_multiplier
    if release.mechanism == CHOSEN_SHARD:  # the same for both relations
        return step_loss(rate, noise_multiplier, grid)
    options = {
        "value_discretization_interval": grid,
        "neighboring_relation": dp_accounting.NeighboringRelation[relation.upper()],
        # Applies to the Gaussian with the record, the source of large losses, which has probability `rate`.
        "log_mass_truncation_bound": min(-10.0, math.log(lost / rate)),
    }
    if release.max_batch_size is None:
        return privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier, sampling_prob=rate, **options
        )
    # The library counts the record in question: one more than there are, if it may be added.
    num_records = release.num_records + (relation == ADD_OR_REMOVE_ONE)
    return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        num_records, rate, release.max_batch_size, noise_multiplier, **options
    )


def _require_plain_poisson(accountant: str, releases: Sequence[Release]) -> None:
    for release in releases:
        if release.mechanism == CHOSEN_SHARD:
            raise UserError(
                f"privacy.accountant={accountant} does not support the choice of a shard ('{release.name}'); use pld"
            )
        if release.max_batch_size is not None:
            raise UserError(
                f"privacy.accountant={accountant} does not support truncated Poisson sampling ('{release.name}'); "
                f"use pld or train.dp.sampling=poisson"
            )


@_cached
def _rdp_epsilon(releases: Sequence[Release], delta: float, relation: str) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    full, sampled = _merge_full_batch(releases, relation)
    if sampled and relation == REPLACE_ONE:
        raise UserError(
            "privacy.accountant=rdp cannot bound a Poisson-sampled release under replace_one; use pld"
        )
    _require_plain_poisson("rdp", sampled)
    # One-shot queries with much noise are best bounded at very large orders (PrivImage's histogram).
    accountant = RdpAccountant(
        [1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 128, 256, 512, 1024, 4096]
    )
    with _library_warnings() as messages:
        if full is not None:
            accountant.compose(dp_accounting.GaussianDpEvent(full))
        for r in sampled:
            gaussian = dp_accounting.GaussianDpEvent(r.noise_multiplier)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(r.sample_rate, gaussian), r.num_steps)
        if sampled:  # a Gaussian whose divergence is that of rounding, which could make the bound too small
            rounding = RDP_ROUNDING * sum(r.num_steps for r in sampled)
            accountant.compose(dp_accounting.GaussianDpEvent(1 / math.sqrt(2 * rounding)))
        epsilon = float(accountant.get_epsilon(delta))
    if any("Negative" in text for text in messages):
        raise UserError(
            "privacy.accountant=rdp cannot bound this plan: its losses are below rounding; use pld"
        )
    if messages:
        _log_omitted_orders()
    return epsilon


@contextlib.contextmanager
def _library_warnings() -> Iterator[list[str]]:
    """The list to which dp-accounting's warnings go inside, instead of to the terminal."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    library = logging.getLogger("absl")
    level = library.level
    library.addFilter(keep)
    library.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        library.removeFilter(keep)
        library.setLevel(level)


@functools.cache
def _log_omitted_orders() -> None:
    """Log this once, because calibration computes dozens of such bounds."""
    log.info(
        "rdp: some orders could not be computed and were omitted; the epsilon is valid, but may be larger than "
        "necessary"
    )


@_cached
def _prv_epsilon(releases: Sequence[Release], delta: float, relation: str) -> float:
    from opacus.accountants import PRVAccountant

    full, sampled = _merge_full_batch(releases, relation)
    if not sampled:
        return 0.0 if full is None else gaussian_epsilon(full, delta)
    if relation == REPLACE_ONE:
        raise UserError(
            "privacy.accountant=prv cannot bound a Poisson-sampled release under replace_one; use pld"
        )
    _require_plain_poisson("prv", sampled)
    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sample_rate, r.num_steps) for r in sampled]
    if full is not None:
        accountant.history.append((full, 1.0, 1))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Opacus warns of its own grid of orders, which only bounds the search range.
        warnings.simplefilter("ignore")
        try:
            return float(accountant.get_epsilon(delta))
        except (ValueError, OverflowError, RuntimeError, MemoryError) as error:
            raise UserError(f"privacy.accountant=prv cannot bound this plan ({error}); use pld") from error
