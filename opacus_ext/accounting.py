"""Epsilon of a list of releases, and the noise that meets a budget.

Three accountants: `pld` (dp-accounting, the default and the tightest), `rdp` and `prv`, for comparison with published
tables. All are upper bounds up to the discretisation stated at PLD_GRID.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opacus_ext.errors import AccountingError, BudgetExceeded
from opacus_ext.shard_accounting import step_loss
from utils.errors import UserError

ADD_OR_REMOVE_ONE = "add_or_remove_one"
REPLACE_ONE = "replace_one"
CHOSEN_SHARD = "chosen_shard"

# Width of the privacy-loss grid. dp-accounting rounds pessimistically: a coarser grid can only overstate epsilon.
# Between the two grids epsilon moves by 0.3 % at epsilon 1 and 0.01 % at epsilon 10 (2100 steps at rate 1/14).
PLD_GRID = 1e-4
PLD_GRID_SEARCH = 1e-3
PRV_RANGE = 40.0  # epsilon above which the second opinions are left out: PRV's grid then exhausts the memory


@dataclass(frozen=True)
class Release:
    """One planned kind of noisy answer about the private data.

    noise_multiplier: noise standard deviation (Gaussian) or scale (Laplace) over the sensitivity; None = let the
    ledger solve for it. sample_rate: Poisson inclusion probability per step. mechanism: "gaussian";
    "report_noisy_max" (pure epsilon of 1 / noise_multiplier per step); or "chosen_shard", an answer with Gaussian noise
    of one of 1 / sample_rate disjoint shards (see shard_accounting.py). max_batch_size: of a larger sample a uniformly
    random subset of this size is taken (truncated Poisson sampling); its cost depends on num_records, the public size
    of the data set. noise_seeded: an earlier run has made it with noise from a known seed (tests), so that the cost
    says nothing. inherited: an earlier run has made it, which may have split the records into other parts.
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
        """Every record takes part in every step."""
        return self.sample_rate == 1.0 and self.max_batch_size is None and self.mechanism != CHOSEN_SHARD


def epsilon_of(
    releases: Sequence[Release],
    delta: float,
    accountant: str = "pld",
    relation: str = ADD_OR_REMOVE_ONE,
    grid: float = PLD_GRID,
) -> float:
    """Smallest known epsilon such that all releases together are (epsilon, delta)-DP; inf if any has no noise.

    Pure-epsilon releases add up by basic composition on top of the composed Gaussians. `grid` is of `pld` alone.
    """
    executed = [release for release in releases if release.num_steps]
    if any(release.noise_multiplier == 0 for release in executed):
        return math.inf
    pure = _pure_epsilon([r for r in executed if r.mechanism == "report_noisy_max"], relation)
    others = [r for r in executed if r.mechanism != "report_noisy_max"]
    if accountant == "pld":
        return pure + _pld_epsilon(others, delta, relation, grid)
    return pure + {"rdp": _rdp_epsilon, "prv": _prv_epsilon}[accountant](others, delta, relation)


def available_epsilons(releases: Sequence[Release], delta: float, relation: str) -> dict[str, float | None]:
    """Epsilon by every accountant; None where one cannot bound these releases. PLD above RDP is an error."""
    values: dict[str, float | None] = {
        "pld": epsilon_of(releases, delta, "pld", relation),
        "rdp": None,
        "prv": None,
    }
    if values["pld"] > PRV_RANGE:
        return values
    for name in ("rdp", "prv"):
        try:
            values[name] = epsilon_of(releases, delta, name, relation)
        except UserError:  # this accountant does not know the relation, or the way of sampling
            values[name] = None
    pld, rdp = values["pld"], values["rdp"]
    if rdp is not None and pld > rdp * (1 + 1e-3) + 1e-3:
        raise AccountingError(f"the PLD epsilon {pld} exceeds the RDP epsilon {rdp} for {list(releases)}")
    return values


def calibrate(
    with_noise: Callable[[float], Sequence[Release]],
    budget_epsilon: float,
    delta: float,
    accountant: str,
    relation: str = ADD_OR_REMOVE_ONE,
) -> float:
    """The smallest noise multiplier z, to 1e-4 relative, at which the plan `with_noise(z)` costs at most the budget.

    Searches on a coarse PLD grid first, then verifies from above on the fine one. Raises BudgetExceeded if no amount
    of noise helps (the fixed releases alone exceed the budget).
    """
    from scipy.optimize import brentq

    def excess(log_z: float, grid: float) -> float:
        epsilon = epsilon_of(with_noise(math.exp(log_z)), delta, accountant, relation, grid)
        return math.log(min(max(epsilon, 1e-9), 1e6) / budget_epsilon)

    low, high = _bracket(lambda log_z: excess(log_z, PLD_GRID_SEARCH), with_noise, budget_epsilon, delta)
    solved = brentq(excess, low, high, args=(PLD_GRID_SEARCH,), xtol=1e-5)
    if accountant == "pld":
        # The fine grid asks for slightly less noise, never for more.
        low = solved - 1e-2
        while excess(low, PLD_GRID) <= 0:
            low -= 1e-2
        solved = brentq(excess, low, solved + 1e-5, args=(PLD_GRID,), xtol=1e-5)
    while excess(solved, PLD_GRID) > 0:
        solved += 1e-5
    return math.exp(solved)


def _bracket(excess: Callable[[float], float], with_noise, budget_epsilon: float, delta: float):
    """(low, high) log noise multipliers with excess(low) > 0 >= excess(high).

    Starts from the central-limit approximation and walks from much noise to little: accountants are slow, and PRV
    exhausts the memory, at noise far below the budget.
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
    rate = release.sample_rate
    if release.max_batch_size is not None:
        rate = min(rate, release.max_batch_size / release.num_records)
    return rate**2 * release.num_steps * math.expm1(exponent)


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
    """Exact epsilon of the Gaussian mechanism (Balle & Wang 2018, theorem 8), sensitivity 1."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    mu = 1.0 / noise_multiplier

    def log_delta(epsilon: float) -> float:
        first = log_ndtr(mu / 2 - epsilon / mu)
        second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return first + math.log(-math.expm1(min(second - first, -1e-16)))

    if math.log(delta) >= log_delta(0.0):
        return 0.0
    high = 1.0
    while log_delta(high) > math.log(delta):
        high *= 2
    return brentq(lambda e: log_delta(e) - math.log(delta), 0.0, high, xtol=1e-10)


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


def _remembered(bound: Callable[..., float]) -> Callable[..., float]:
    """`bound`, a slow function of releases and numbers alone, computed once for the same ones: calibration, plan,
    report and card ask for the same."""
    remembered = functools.lru_cache(maxsize=1024)(bound)

    @functools.wraps(bound)
    def asked(releases: Sequence[Release], *rest) -> float:
        return remembered(tuple(releases), *rest)

    return asked


@_remembered
def _pld_epsilon(releases: Sequence[Release], delta: float, relation: str, grid: float) -> float:
    import dp_accounting

    full, sampled = _merge_full_batch(releases, relation)
    if not sampled:
        return 0.0 if full is None else gaussian_epsilon(full, delta)
    neighbours = dp_accounting.NeighboringRelation[relation.upper()]
    accountant = _pld_accountant(neighbours, grid)
    if full is not None:
        # `full` already carries the factor of the relation, which dp-accounting would apply a second time.
        already = 2.0 if relation == REPLACE_ONE else 1.0
        accountant.compose(dp_accounting.GaussianDpEvent(full * already))
    for r in sampled:
        if r.mechanism == CHOSEN_SHARD:  # the same for both relations
            accountant.compose_loss(step_loss(r.sample_rate, r.noise_multiplier, grid), r.num_steps)
        else:
            accountant.compose(_sampled_event(r, relation), r.num_steps)
    return float(accountant.get_epsilon(delta))


def _pld_accountant(neighbours, grid: float):
    """dp-accounting's, which also takes privacy loss distributions that it has no event for."""
    from dp_accounting.pld import PLDAccountant

    class Accountant(PLDAccountant):
        def compose_loss(self, loss, count: int) -> None:
            self._pld = self._pld.compose(loss.self_compose(count))

    return Accountant(neighbours, value_discretization_interval=grid)


def _sampled_event(release: Release, relation: str):
    """dp-accounting's name for one step of a sampled Gaussian. Truncated: Ganesh et al. 2025, arXiv 2508.15089."""
    import dp_accounting

    if release.max_batch_size is not None:
        # The event counts the record in question: one more than there are, where it may be added.
        num_records = release.num_records + (relation == ADD_OR_REMOVE_ONE)
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            num_records, release.sample_rate, release.max_batch_size, release.noise_multiplier
        )
    gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
    return dp_accounting.PoissonSampledDpEvent(release.sample_rate, gaussian)


def _require_plain_poisson(accountant: str, releases: Sequence[Release]) -> None:
    for release in releases:
        if release.mechanism == CHOSEN_SHARD:
            raise UserError(
                f"privacy.accountant={accountant} does not know the choice of a shard ('{release.name}'); use pld"
            )
        if release.max_batch_size is not None:
            raise UserError(
                f"privacy.accountant={accountant} does not know truncated Poisson sampling ('{release.name}'); "
                f"use pld or train.dp.sampling=poisson"
            )


@_remembered
def _rdp_epsilon(releases: Sequence[Release], delta: float, relation: str) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    full, sampled = _merge_full_batch(releases, relation)
    if sampled and relation == REPLACE_ONE:
        raise UserError("privacy.accountant=rdp bounds no Poisson-sampled release under replace_one; use pld")
    _require_plain_poisson("rdp", sampled)
    # One-shot queries with much noise are best bounded at very large orders (PrivImage's histogram).
    accountant = RdpAccountant(
        [1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 128, 256, 512, 1024, 4096]
    )
    if full is not None:
        accountant.compose(dp_accounting.GaussianDpEvent(full))
    for r in sampled:
        accountant.compose(_sampled_event(r, relation), r.num_steps)
    return float(accountant.get_epsilon(delta))


@_remembered
def _prv_epsilon(releases: Sequence[Release], delta: float, relation: str) -> float:
    from opacus.accountants import PRVAccountant

    full, sampled = _merge_full_batch(releases, relation)
    if not sampled:
        return 0.0 if full is None else gaussian_epsilon(full, delta)
    if relation == REPLACE_ONE:
        raise UserError("privacy.accountant=prv bounds no Poisson-sampled release under replace_one; use pld")
    _require_plain_poisson("prv", sampled)
    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sample_rate, r.num_steps) for r in sampled]
    if full is not None:
        accountant.history.append((full, 1.0, 1))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter(
            "ignore"
        )  # Opacus warns of its own order grid, which only bounds the search range
        try:
            return float(accountant.get_epsilon(delta))
        except (ValueError, OverflowError, RuntimeError) as error:
            raise UserError(f"privacy.accountant=prv cannot bound this plan ({error}); use pld") from error
