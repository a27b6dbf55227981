"""The ledger: plans every query of the private data, solves for the noise, books each query, reports the epsilon."""

import dataclasses
import math
from dataclasses import dataclass

from opacus_ext.accounting import (
    ADD_OR_REMOVE_ONE,
    Release,
    calibrate,
    epsilon_of,
    epsilon_or_inf,
    require_agreement,
    spending,
)
from opacus_ext.errors import BudgetExceeded, UnplannedRelease
from utils.errors import UserError
from utils.sections import check

# The share of epsilon that fixed releases must leave for the open one. With less, the open one is noise only.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Budget:
    """The most that the whole plan may cost. epsilon = inf means non-private: no release then has noise."""

    epsilon: float
    delta: float

    @property
    def private(self) -> bool:
        return math.isfinite(self.epsilon)


def default_delta(num_train: int) -> float:
    """1 / (N ln N), the choice of the published benchmark; N must be at least 3."""
    check(num_train >= 3, "number of private training images", num_train, "at least 3")
    return 1.0 / (num_train * math.log(num_train))


def weak_delta(delta: float, num_train: int) -> str | None:
    """A warning if delta guarantees little: with delta = 1/N a mechanism may publish a whole record."""
    if delta >= 1 / num_train:
        return f"delta {delta:.3g} is not smaller than 1/N = {1 / num_train:.3g}: whole records may leak"
    if delta > 1e-3:
        return f"delta {delta:.3g} is large for only N = {num_train} images: the guarantee is weak"
    return None


class Ledger:
    """One account per private set. Order of use: `adopt` a plan, `book` before every query, `report`.

    Guarantees:
    - No result leaves without a booking, because mechanisms book before they read a record.
    - The booked steps never exceed the plan.
    - The plan as a whole costs at most the budget, under the chosen accountant and neighbouring relation.
    """

    def __init__(self, budget: Budget, accountant: str = "pld", relation: str = ADD_OR_REMOVE_ONE) -> None:
        self.budget = budget
        self.accountant = accountant
        self.relation = relation
        # Whether the noise of any result comes from a known seed, in this run or in an earlier one.
        self.noise_seeded = False
        self.revealed: list[str] = []  # reasons why raw records were revealed after training, for evaluation
        self._adopted = False
        self._planned: dict[str, Release] = {}
        self._executed: dict[str, int] = {}

    def adopt(self, plan: list[Release]) -> None:
        """Adopt the plan: solve for its one open noise_multiplier, so that all releases together meet the budget.

        Guarantees:
        - After it returns, the whole plan costs at most the budget. The open noise_multiplier is the smallest that
          achieves this, to 1e-4 relative.
        - If it raises, the account is unchanged.

        | plan | result |
        |---|---|
        | epsilon = inf | every noise_multiplier becomes 0 |
        | fixed releases cost more than the budget, or leave nothing for the open one | BudgetExceeded |
        | two accountants contradict each other | AccountingError |
        | two open releases, or a name that occurs twice | ValueError |
        | a plan was adopted before | RuntimeError |
        """
        if self._adopted:
            raise RuntimeError("a ledger adopts one plan")
        names = [release.name for release in plan]
        if len(set(names)) != len(names):
            raise ValueError(f"release names repeat: {names}")
        open_releases = [
            release for release in plan if release.noise_multiplier is None and release.num_steps
        ]
        if len(open_releases) > 1:
            raise ValueError(f"more than one release leaves its noise open: {open_releases}")
        solved = self._solve(plan) if self.budget.private else _without_noise(plan)
        if (
            self.budget.private
        ):  # so that the report, after training, is not the first to find a contradiction
            require_agreement(solved, self.budget.delta, self.relation)
        self._planned = {release.name: release for release in solved}
        self._executed = dict.fromkeys(names, 0)
        self.noise_seeded |= any(release.noise_seeded for release in plan)
        self._adopted = True

    def _solve(self, plan: list[Release]) -> list[Release]:
        fixed = [release for release in plan if release.noise_multiplier is not None]
        cost = self._cost(fixed)
        if cost > self.budget.epsilon * (1 + 1e-9):  # shares of a budget add up to it up to rounding
            costliest = max(fixed, key=lambda release: self._cost([release]))
            raise BudgetExceeded(
                f"the releases with fixed noise cost epsilon {cost:.4g} of {self.budget.epsilon:g} at delta "
                f"{self.budget.delta:.3g} (the most expensive, '{costliest.name}', has noise_multiplier "
                f"{costliest.noise_multiplier:g}); {_remedy(fixed)}"
            )

        def with_noise(noise_multiplier: float) -> list[Release]:
            return [
                dataclasses.replace(r, noise_multiplier=noise_multiplier) if r.noise_multiplier is None else r
                for r in plan
            ]

        unsolved = [r.name for r in plan if r.noise_multiplier is None and r.num_steps]
        if not unsolved:
            return with_noise(0.0)  # only releases of zero steps are open
        if cost > self.budget.epsilon * (1 - LEAST_SHARE):
            raise BudgetExceeded(
                f"the other releases cost epsilon {cost:.4g} of {self.budget.epsilon:g}, which leaves no budget "
                f"for '{unsolved[0]}'; {_remedy(fixed)}"
            )
        return with_noise(
            calibrate(with_noise, self.budget.epsilon, self.budget.delta, self.accountant, self.relation)
        )

    def _cost(self, releases: list[Release]) -> float:
        return epsilon_of(releases, self.budget.delta, self.accountant, self.relation)

    def planned(self, name: str) -> Release:
        """The calibrated release; UnplannedRelease if the plan has none of that name."""
        if name not in self._planned:
            raise UnplannedRelease(
                f"'{name}' is in no plan; planned: {', '.join(self._planned) or 'nothing'}"
            )
        return self._planned[name]

    def executed(self, name: str) -> int:
        """Steps of `name` booked so far."""
        self.planned(name)
        return self._executed[name]

    def book(self, name: str, steps: int = 1) -> Release:
        """Charge `steps` steps of release `name`; returns the calibrated release. Mechanisms call it before they read.

        Guarantees:
        - The booked steps never exceed the planned ones, and no method reduces them.
        - A step stays booked if the query fails afterwards.

        | case | result |
        |---|---|
        | the plan has no release of that name | UnplannedRelease |
        | more steps than remain | BudgetExceeded, nothing is booked |
        | a negative number of steps | ValueError |
        """
        release = self.planned(name)
        if steps < 0:
            raise ValueError(f"'{name}': {steps} steps cannot be booked")
        if self._executed[name] + steps > release.num_steps:
            raise BudgetExceeded(
                f"'{name}' was planned for {release.num_steps} steps, {self._executed[name]} are booked and "
                f"{steps} more were requested"
            )
        self._executed[name] += steps
        return release

    def require_complete(self) -> None:
        """Raise UnplannedRelease unless every planned step of every release is booked."""
        for name, release in self._planned.items():
            if self._executed[name] != release.num_steps:
                raise UnplannedRelease(
                    f"'{name}' took {self._executed[name]} of {release.num_steps} planned steps"
                )

    @property
    def complete(self) -> bool:
        """Whether a plan was adopted and all of its steps are booked. An empty plan is complete at once."""
        return self._adopted and all(
            self._executed[name] == release.num_steps for name, release in self._planned.items()
        )

    def releases(self) -> list[Release]:
        """The calibrated plan, in order."""
        return list(self._planned.values())

    def planned_epsilon(self) -> float:
        """Epsilon of the whole plan, by the ledger's accountant."""
        return self._cost(self.releases())

    def spent(self) -> float:
        """Epsilon of what has been booked, by the ledger's accountant; inf for non-private runs."""
        return self._cost(self._booked())

    def _booked(self) -> list[Release]:
        return [dataclasses.replace(r, num_steps=self._executed[name]) for name, r in self._planned.items()]

    def rows(self) -> list[dict]:
        """Planned and booked steps of every release, and its epsilon if run alone."""
        return [
            {
                "name": r.name,
                "mechanism": r.mechanism,
                "noise_multiplier": r.noise_multiplier,
                "sample_rate": r.sample_rate,
                "max_batch_size": r.max_batch_size,
                "planned": r.num_steps,
                "executed": self._executed[r.name],
                "inherited": r.inherited,
                "epsilon_alone": epsilon_or_inf([r], self.budget.delta, self.accountant, self.relation),
            }
            for r in self._planned.values()
        ]

    def report(self) -> dict:
        """The content of privacy.json about this account; plain containers.

        Does not raise if epsilon cannot be computed, so that the samples of a finished training are not lost: `spent`
        is then inf, which claims nothing, and `not_computed` gives the reason.
        """
        return {
            "budget": {"epsilon": self.budget.epsilon, "delta": self.budget.delta},
            "relation": self.relation,
            "accountant": self.accountant,
            "private": self.budget.private,
            "releases": self.rows(),
            **spending(self._booked(), self.budget.delta, self.accountant, self.relation),
            "revealed": list(self.revealed),
        }

    def state_dict(self) -> dict:
        return {
            "plan": [dataclasses.asdict(release) for release in self._planned.values()],
            "executed": dict(self._executed),
            "noise_seeded": self.noise_seeded,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the bookings of an interrupted run; its plan must be the one adopted here."""
        saved = [Release(**release) for release in state["plan"]]
        if not _same_plan(saved, self.releases()):
            raise UserError(
                f"--resume_exp: the interrupted run planned {_describe(saved)}, this command plans "
                f"{_describe(self.releases())}; resume with the same configuration"
            )
        if any(state["executed"][name] < taken for name, taken in self._executed.items()):
            raise BudgetExceeded(
                f"restoring {state['executed']} would undo steps that are already booked: {self._executed}"
            )
        self._planned = {release.name: release for release in saved}
        self._executed = dict(state["executed"])
        self.noise_seeded |= state.get("noise_seeded", False)


def _remedy(fixed: list[Release]) -> str:
    """The advice to print if these releases leave too little budget."""
    if all(release.inherited for release in fixed):
        return "this cost is inherited from the run whose checkpoint or query is reused: raise --epsilon"
    return "raise their noise_multiplier or --epsilon"


def _without_noise(plan: list[Release]) -> list[Release]:
    return [dataclasses.replace(release, noise_multiplier=0.0) for release in plan]


def _same_plan(one: list[Release], other: list[Release]) -> bool:
    def fixed(release: Release) -> Release:
        return dataclasses.replace(release, noise_multiplier=None)

    # Calibration may differ in the last digits between versions of the library; the saved multiplier applies.
    return [fixed(r) for r in one] == [fixed(r) for r in other] and all(
        math.isclose(a.noise_multiplier, b.noise_multiplier, rel_tol=1e-3)
        for a, b in zip(one, other, strict=True)
    )


def _describe(plan: list[Release]) -> str:
    return "; ".join(
        f"'{r.name}' z={r.noise_multiplier:.4g} q={r.sample_rate:.4g}"
        f"{'' if r.max_batch_size is None else f' max {r.max_batch_size}'} x{r.num_steps}"
        for r in plan
    )
