"""The card says what privacy.json says, in words that hold."""

import math

import numpy as np
import pytest

from data.spec import DataSpec, Samples
from opacus_ext.accounting import Release, noisy_max_release
from opacus_ext.card import privacy_card
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils.run_dir import read_json, write_json

NUM_RECORDS = 50


def report_of(plan, epsilon=2.0, relation="add_or_remove_one", noise_seed=None, delta=1e-4) -> dict:
    """What privacy.json says after the whole plan was carried out on 50 black images."""
    ledger = Ledger(Budget(epsilon, delta), relation=relation)
    ledger.adopt(plan)
    for release in ledger.releases():
        ledger.book(release.name, release.num_steps)
    spec = DataSpec("toy", 4, 1, 2, NUM_RECORDS, ("a", "b"))
    samples = Samples(np.zeros((NUM_RECORDS, 1, 4, 4), np.uint8), np.zeros(NUM_RECORDS, np.int64))
    return PrivateData(samples, spec, ledger, NoiseSource(noise_seed)).report()


@pytest.fixture()
def two_stages() -> dict:
    return report_of([Release("first look", 10.0), Release("training", None, num_steps=3)])


def test_the_headline_holds_the_numbers(two_stages):
    card = privacy_card(two_stages)
    assert f"({two_stages['spent']:.4g}, 0.0001)-differentially private" in card
    assert "budget: epsilon 2" in card
    assert two_stages["spent"] <= 2.0


def test_every_stage_has_a_row_with_its_share(two_stages):
    card = privacy_card(two_stages)
    for release in two_stages["releases"]:
        row = next(line for line in card.splitlines() if line.startswith(f"| {release['name']} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        steps, share = release["planned"], release["epsilon_alone"]
        assert cells[2:] == [
            f"{release['noise_multiplier']:.4g}", "1", f"{steps} of {steps}", f"{share:.4g}"
        ]  # fmt: skip
        assert share < two_stages["spent"]


def test_a_truncated_stage_names_its_bound():
    plan = [Release("training", 10.0, 0.5, 3, max_batch_size=30, num_records=NUM_RECORDS)]
    card = privacy_card(report_of(plan, epsilon=50.0))
    assert "| 0.5, at most 30 images | 3 of 3 |" in card


def test_unit_delta_assumptions_and_caveats_are_named(two_stages):
    card = privacy_card(two_stages)
    assert "one record more or less" in card
    assert f"the number of records, {NUM_RECORDS}, is public" in card
    assert "the chance that the bound on epsilon fails" in card
    assert "hyperparameters" in card and "floating-point" in card
    assert "seeded (" not in card


def test_the_relation_is_said():
    assert "one record replaced by another" in privacy_card(
        report_of([Release("look", None)], relation="replace_one")
    )


def test_without_privacy():
    report = report_of([Release("look", None)], epsilon=math.inf)
    card = privacy_card(report)
    assert "NOT private" in card and "differentially private**" not in card


def test_a_method_that_asks_nothing():
    card = privacy_card(report_of([]))
    assert "do not depend on the private images" in card and "No stage asks" in card


def test_seeded_noise_voids_the_guarantee():
    assert "the guarantee is void" in privacy_card(report_of([Release("look", None)], noise_seed=1))


def test_choosing_classifiers_is_told_apart_from_the_samples(two_stages):
    choices = [report_of([noisy_max_release("selection/a", 0.5, "add_or_remove_one")], 0.5)] * 2
    card = privacy_card({**two_stages, "selection": choices})
    line = next(line for line in card.splitlines() if "Choosing classifiers" in line)
    assert "epsilon 1 " in line and "2 evaluation(s)" in line
    assert f"({two_stages['spent']:.4g}," in card


@pytest.mark.parametrize("epsilon", [2.0, math.inf])
def test_the_card_of_a_report_that_was_read_back_is_the_same(tmp_path, epsilon):
    report = report_of([Release("look", None)], epsilon=epsilon)
    write_json(tmp_path / "privacy.json", report)
    assert privacy_card(read_json(tmp_path / "privacy.json")) == privacy_card(report)


def test_the_card_is_plain_text(two_stages):
    assert privacy_card(two_stages).isascii()
