"""The account: plans, bookings, refusals, and what survives a resumption."""

import dataclasses
import json
import math

import pytest
import torch

from opacus_ext import accounting
from opacus_ext.accounting import Release, epsilon_of, noisy_max_release
from opacus_ext.card import RELATION, privacy_card, privacy_summary
from opacus_ext.errors import AccountingError, BudgetExceeded, UnplannedRelease
from opacus_ext.ledger import Budget, Ledger, default_delta
from utils.errors import UserError

DELTA = 1e-5
QUERY = Release("query", 5.0)
OPEN = Release("dp-sgd", None, num_steps=4)


def ledger_with(*plan: Release, epsilon: float = 10.0, **options) -> Ledger:
    ledger = Ledger(Budget(epsilon, DELTA), **options)
    ledger.adopt(list(plan))
    return ledger


def spend_all(ledger: Ledger) -> Ledger:
    for release in ledger.releases():
        ledger.book(release.name, release.num_steps)
    return ledger


@pytest.mark.parametrize("epsilon", [1.0, 10.0])
@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_the_whole_plan_costs_the_budget(epsilon, accountant, relation):
    query = Release("query", 30.0)
    ledger = ledger_with(query, OPEN, epsilon=epsilon, accountant=accountant, relation=relation)
    assert ledger.spent() == 0
    spent = spend_all(ledger).spent()
    assert epsilon * (1 - 1e-3) < spent <= epsilon
    assert spent == epsilon_of(ledger.releases(), DELTA, accountant, relation)


def test_sampled_plan_costs_the_budget():
    ledger = ledger_with(QUERY, Release("dp-sgd", None, 0.1, 20), epsilon=2.0)
    assert 2.0 * (1 - 1e-3) < spend_all(ledger).spent() <= 2.0


def test_fixed_releases_above_the_budget_are_refused_with_the_numbers():
    cost = epsilon_of([Release("query", 0.5), Release("other", 9.0)], DELTA)
    with pytest.raises(BudgetExceeded) as refused:
        ledger_with(Release("other", 9.0), Release("query", 0.5), OPEN, epsilon=1.0)
    for part in (f"{cost:.4g}", "of 1 ", "1e-05", "'query'", "noise_multiplier 0.5"):
        assert part in str(refused.value), (part, str(refused.value))


def test_fixed_releases_must_leave_something_for_the_open_one():
    """As when a run starts from a checkpoint of one that has spent the same budget."""
    inherited = dataclasses.replace(ledger_with(OPEN).planned("dp-sgd"), name="inherited")
    with pytest.raises(BudgetExceeded, match="no budget for 'dp-sgd'"):
        ledger_with(inherited, OPEN)
    spent = dataclasses.replace(inherited, inherited=True)
    with pytest.raises(BudgetExceeded, match=r"inherited .*--epsilon"):
        ledger_with(spent, OPEN)
    assert ledger_with(inherited).planned_epsilon() <= 10  # nothing more is asked


def test_fixed_releases_that_use_up_the_budget_are_refused_when_more_is_planned():
    with pytest.raises(BudgetExceeded):
        ledger_with(Release("query", 1.0), OPEN, epsilon=epsilon_of([Release("query", 1.0)], DELTA))


def test_a_plan_of_fixed_releases_keeps_its_noise():
    assert ledger_with(QUERY).releases() == [QUERY]


def test_overspending_is_refused_with_the_numbers():
    ledger = ledger_with(OPEN)
    ledger.book("dp-sgd", 3)
    with pytest.raises(BudgetExceeded, match=r"'dp-sgd'.* 4 .* 3 .* 2 "):
        ledger.book("dp-sgd", 2)
    assert ledger.executed("dp-sgd") == 3
    ledger.book("dp-sgd")
    with pytest.raises(BudgetExceeded):
        ledger.book("dp-sgd")


def test_nothing_can_be_unbooked():
    ledger = ledger_with(OPEN)
    ledger.book("dp-sgd", 4)
    with pytest.raises((ValueError, AssertionError)):
        ledger.book("dp-sgd", -1)
    assert ledger.executed("dp-sgd") == 4


def test_unplanned_releases_are_refused():
    ledger = ledger_with(QUERY)
    for method in (ledger.book, ledger.planned, ledger.executed):
        with pytest.raises(UnplannedRelease, match=r"'other'.*: query"):
            method("other")


def test_unfinished_releases_are_refused():
    ledger = ledger_with(QUERY, OPEN)
    ledger.book("query")
    ledger.book("dp-sgd", 3)
    assert not ledger.complete
    with pytest.raises(UnplannedRelease, match=r"'dp-sgd'.* 3 of 4 "):
        ledger.require_complete()
    ledger.book("dp-sgd")
    assert ledger.complete
    ledger.require_complete()


def test_one_release_at_most_leaves_its_noise_open_and_names_are_unique():
    with pytest.raises(ValueError, match="noise open"):
        ledger_with(OPEN, Release("other", None))
    with pytest.raises(ValueError, match="names repeat"):
        ledger_with(QUERY, QUERY)


def test_a_second_plan_is_refused():
    ledger = ledger_with(QUERY)
    with pytest.raises(RuntimeError, match="one plan"):
        ledger.adopt([OPEN])


def test_epsilon_inf_has_no_noise_and_is_reported_as_non_private():
    ledger = ledger_with(QUERY, OPEN, epsilon=math.inf)
    assert [release.noise_multiplier for release in ledger.releases()] == [0.0, 0.0]
    report = spend_all(ledger).report()
    assert report["spent"] == math.inf and report["private"] is False
    with pytest.raises(BudgetExceeded):  # non-private runs are counted all the same
        ledger.book("query")


def test_a_release_of_no_steps_costs_nothing_and_changes_no_other():
    ledger = ledger_with(QUERY, Release("dp-sgd", None, num_steps=0), epsilon=10.0)
    assert spend_all(ledger).spent() == epsilon_of([QUERY], DELTA)
    with pytest.raises(BudgetExceeded):
        ledger.book("dp-sgd")
    without = ledger_with(Release("dp-sgd", None, 0.1, 10), epsilon=1.0)
    beside = ledger_with(Release("query", 5.0, num_steps=0), Release("dp-sgd", None, 0.1, 10), epsilon=1.0)
    assert beside.planned("dp-sgd") == without.planned("dp-sgd")


def test_no_plan_spends_nothing():
    report = ledger_with().report()
    assert report["spent"] == 0 and report["releases"] == [] and report["private"]


def test_the_report_states_the_account():
    ledger = ledger_with(QUERY, OPEN, epsilon=10.0)
    ledger.book("query")
    ledger.book("dp-sgd", 3)
    report = json.loads(json.dumps(ledger.report()))
    assert report["budget"] == {"epsilon": 10.0, "delta": DELTA}
    assert (report["relation"], report["accountant"], report["private"]) == ("add_or_remove_one", "pld", True)
    query, training = report["releases"]
    assert query == {
        "name": "query",
        "mechanism": "gaussian",
        "noise_multiplier": 5.0,
        "sample_rate": 1.0,
        "max_batch_size": None,
        "inherited": False,
        "planned": 1,
        "executed": 1,
        "epsilon_alone": epsilon_of([QUERY], DELTA),
    }
    assert (training["planned"], training["executed"]) == (4, 3)
    taken = [QUERY, Release("dp-sgd", training["noise_multiplier"], num_steps=3)]
    assert report["spent"] == pytest.approx(epsilon_of(taken, DELTA))
    assert report["spent"] < 10
    assert report["spent_by_accountant"]["rdp"] > report["spent_by_accountant"]["pld"] == report["spent"]


def test_shares_of_a_noisy_max_budget_add_up_to_it():
    for relation in ("add_or_remove_one", "replace_one"):
        plan = [noisy_max_release(f"choice {i}", 1.0 / 3, relation) for i in range(3)]
        ledger = Ledger(Budget(1.0, 0.0), relation=relation)
        ledger.adopt(plan)
        assert spend_all(ledger).spent() == pytest.approx(1.0)
        assert ledger.report()["spent"] == pytest.approx(1.0)
        with pytest.raises(BudgetExceeded):
            Ledger(Budget(0.9, 0.0), relation=relation).adopt(plan)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_open_noise_makes_room_for_a_noisy_max(relation):
    choice = noisy_max_release("choice", 0.5, relation)
    ledger = ledger_with(choice, OPEN, epsilon=2.0, relation=relation)
    assert ledger.planned("choice") == choice
    assert 2.0 * (1 - 1e-3) < spend_all(ledger).spent() <= 2.0


# ------------------------------------------------------------------------------------------ resuming


def test_the_account_survives_a_checkpoint(tmp_path):
    ledger = ledger_with(QUERY, OPEN)
    ledger.book("query")
    ledger.book("dp-sgd", 3)
    torch.save(ledger.state_dict(), tmp_path / "state.pth")
    resumed = ledger_with(QUERY, OPEN)
    resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert resumed.report() == ledger.report()
    with pytest.raises(BudgetExceeded):
        resumed.book("query")
    resumed.book("dp-sgd")
    resumed.require_complete()


def test_saved_noise_multipliers_stay_in_force():
    ledger = ledger_with(OPEN)
    state = ledger.state_dict()
    state["plan"][0]["noise_multiplier"] *= 1.0001
    resumed = ledger_with(OPEN)
    resumed.load_state_dict(state)
    assert resumed.planned("dp-sgd").noise_multiplier == state["plan"][0]["noise_multiplier"]


@pytest.mark.parametrize(
    "other",
    [
        ledger_with(QUERY, OPEN, epsilon=9.0),
        ledger_with(QUERY, Release("dp-sgd", None, num_steps=5)),
        ledger_with(QUERY, Release("dp-sgd", None, 0.5, num_steps=4)),
        ledger_with(Release("query", 6.0), OPEN),
        ledger_with(OPEN),
        ledger_with(QUERY, OPEN, epsilon=math.inf),
    ],
    ids=["epsilon", "steps", "rate", "query noise", "no query", "non-private"],
)
def test_another_plan_cannot_be_resumed(other):
    saved = ledger_with(QUERY, OPEN).state_dict()
    with pytest.raises(UserError, match=r"--resume_exp.*'query' z=5 q=1 x1"):
        other.load_state_dict(saved)


def test_loading_a_state_forgets_no_booking():
    ledger = ledger_with(QUERY, OPEN)
    before = ledger.state_dict()
    ledger.book("query")
    with pytest.raises((AssertionError, UserError)):
        ledger.load_state_dict(before)


# ------------------------------------------------------------------------------------------ around it


def test_default_delta():
    assert default_delta(55_000) == pytest.approx(1.66575e-6, rel=1e-4)
    assert default_delta(269_538) == pytest.approx(2.96698e-7, rel=1e-4)


def test_the_card_agrees_with_the_report(make_private):
    private = make_private([QUERY, OPEN], epsilon=10.0)
    spend_all(private.ledger)
    report = private.report()
    card = privacy_card(report)
    assert f"({report['spent']:.4g}, 1e-05)" in card and "epsilon 10" in card
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    assert ["query", "gaussian", "5", "1", "1 of 1"] in [row[:5] for row in rows] and "4 of 4" in card
    assert any("60" in line for line in card.partition("**Assumed public**")[2].splitlines()[:5])
    assert "privacy.noise_seed" not in card and RELATION["add_or_remove_one"] in card


def test_the_card_of_a_seeded_and_of_a_non_private_run(make_private):
    seeded = make_private([QUERY], epsilon=10.0, noise_seed=3)
    seeded.noisy_sum("query", lambda images, labels: images, 1.0)
    assert "privacy.noise_seed" in privacy_card(seeded.report())
    assert "NOT private" in privacy_card(make_private([QUERY], epsilon=math.inf).report())


# ------------------------------------------------------------------------------------------ accountants that fail


def test_a_contradiction_of_the_accountants_shows_when_the_plan_is_adopted(monkeypatch):
    """As one line for the user, before anything is asked of the records."""
    monkeypatch.setattr(accounting, "_rdp_epsilon", lambda *_: 0.5)
    with pytest.raises(AccountingError, match=r"RDP epsilon 0\.5"):
        ledger_with(Release("query", 30.0), Release("dp-sgd", None, 0.1, 20), epsilon=1.0)
    assert issubclass(AccountingError, UserError)


@pytest.mark.parametrize("failure", [AccountingError("accountants disagree"), MemoryError("too much")])
def test_a_report_that_cannot_be_computed_claims_nothing_and_raises_nothing(monkeypatch, failure):
    ledger = spend_all(ledger_with(QUERY, OPEN))

    def fail(*_):
        raise failure

    monkeypatch.setattr("opacus_ext.accounting.available_epsilons", fail)
    report = ledger.report()
    assert report["spent"] == math.inf and str(failure) in report["not_computed"]
    shown = report | {"noise_seeded": False, "assumptions": [], "data": "toy", "num_records": 60}
    for text in (privacy_card(shown), privacy_summary(shown)):
        assert str(failure) in text and "-differentially" not in text


def test_an_accountant_that_fails_for_one_release_costs_no_report(monkeypatch):
    """As after resuming a run whose calibrated noise differs in the last digits."""
    ledger = spend_all(ledger_with(QUERY))

    def fail(*_):
        raise UserError("no bound")

    monkeypatch.setattr("opacus_ext.accounting.epsilon_of", fail)
    report = ledger.report()
    assert report["releases"][0]["epsilon_alone"] == report["spent"] == math.inf
    assert "no bound" in report["not_computed"]
