"""The card says what privacy.json says, in words that hold."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from data.sensitive import spec_of
from data.spec import DataSpec, Samples
from models import METHODS
from opacus_ext.accounting import Release, noisy_max_release
from opacus_ext.card import RELATION, privacy_card, privacy_summary, unprotected_group
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils.config import load_config
from utils.files import read_json, write_json
from utils.text import at_most

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


def row_of(card: str, stage: str) -> list[str]:
    row = next(line for line in card.splitlines() if line.startswith(f"| {stage} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def section(card: str, title: str) -> list[str]:
    """The entries of the list below the bold line that begins with `title`; none without such a line."""
    found, inside = [], False
    for line in card.splitlines():
        if line.startswith("**"):
            inside = line.startswith(f"**{title}")
        elif inside and line.startswith("- "):
            found.append(line.removeprefix("- "))
    return found


@pytest.fixture()
def two_stages() -> dict:
    return report_of([Release("first look", 10.0), Release("training", None, num_steps=3)])


def test_the_headline_holds_the_numbers(two_stages):
    card = privacy_card(two_stages)
    assert f"({at_most(two_stages['spent'])}, 0.0001)-differentially private" in card
    assert "budget: epsilon 2" in card
    assert two_stages["spent"] <= 2.0


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (9.5711e-5, "9.572e-05"),
        (1e-4, "0.0001"),
        (9.99996, "10"),
        (10.0, "10"),
        (1.00001, "1.001"),
        (math.inf, "inf"),
    ],
)
def test_bounds_are_rounded_up(bound, text):
    """What is printed is a claim: a smaller number than the one that was proven would be a false one."""
    assert at_most(bound) == text and float(text) >= bound


def test_only_one_accountant_makes_the_claim(two_stages):
    values = {"pld": 1.9, "rdp": 2.5, "prv": None}
    line = next(
        line
        for line in privacy_card({**two_stages, "spent_by_accountant": values}).splitlines()
        if "pld" in line
    )
    assert line.index("pld") < line.index("rdp 2.5")
    assert "1.9" not in line and "prv" not in line


def test_every_stage_has_a_row_with_its_share(two_stages):
    card = privacy_card(two_stages)
    for release in two_stages["releases"]:
        cells = row_of(card, release["name"])
        steps, share = release["planned"], release["epsilon_alone"]
        assert cells[2:] == [
            f"{release['noise_multiplier']:.4g}", "1", f"{steps} of {steps}", at_most(share)
        ]  # fmt: skip
        assert share < two_stages["spent"]


def test_a_truncated_stage_names_its_bound():
    plan = [Release("training", 10.0, 0.5, 3, max_batch_size=30, num_records=NUM_RECORDS)]
    sampling = row_of(privacy_card(report_of(plan, epsilon=50.0)), "training")[3]
    assert re.findall(r"[0-9.]+", sampling) == ["0.5", "30"]


def test_validation_images_that_an_earlier_run_may_have_queried_are_reported():
    """It may have trained on them: then no set of images is free of the training's epsilon."""
    chosen = report_of([noisy_max_release("selection/wrn", 0.5, "add_or_remove_one")])
    for inherited in (False, True):
        plan = [Release("checkpoint: dp-sgd", 10.0, inherited=inherited), Release("training", None)]
        report = {**report_of(plan), "selection": [chosen]}
        for text in (privacy_card(report), privacy_summary(report)):
            assert ("add up" in text) == inherited


def test_data_revealed_without_noise_are_reported(two_stages):
    assert "Revealed" not in privacy_card(two_stages)
    card = privacy_card(
        {**two_stages, "revealed": ["fidelity metrics compare", "fidelity metrics compare", "else"]}
    )
    assert section(card, "Revealed") == ["fidelity metrics compare", "else"]


def test_unit_delta_assumptions_and_caveats_are_named(two_stages):
    card = privacy_card(two_stages)
    assert RELATION["add_or_remove_one"] in card and "- **delta**: 0.0001," in card
    assert any(str(NUM_RECORDS) in entry for entry in section(card, "Assumed public"))
    assert "exp((k - 1)" in card and "hyperparameters" in card and "floating-point" in card
    assert "privacy.noise_seed" not in card


def test_the_card_lists_private_files_and_the_command_that_removes_them(two_stages):
    section = privacy_card(two_stages).split("**Not for sharing**")[1]
    for name in (
        "results.json",
        "details.json",
        "report.html",
        "stdout.txt",
        "private/",
        "meta.json",
        ".cache",
    ):
        assert name in section
    assert "--forget toy`" in section


def weights_section(report: dict) -> str:
    return privacy_card(report).split("**Weights and previews**")[1].split("**")[0]


def test_the_card_states_that_epsilon_covers_checkpoints(two_stages):
    text = weights_section(two_stages)
    assert "train/" in text and "pretrain/" in text and "epsilon" in text and "not share" not in text
    assert "train/" not in privacy_card(two_stages).split("**Not for sharing**")[1]


@pytest.mark.parametrize(
    "change", [{"private": False}, {"noise_seeded": True}, {"not_computed": "the grid is too coarse"}]
)
def test_checkpoints_without_a_guarantee_are_not_for_sharing(two_stages, change):
    text = weights_section({**two_stages, **change})
    assert "not share" in text and "epsilon" not in text


def test_checkpoints_of_a_run_without_queries_depend_on_public_data(two_stages):
    text = weights_section({**two_stages, "releases": []})
    assert "licenses" in text and "not share" not in text and "epsilon" not in text


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(10.0, 1e-4), (1.0, 1e-5), (0.1, 1e-6), (3.0, 0.4), (0.0, 0.01)]
)
def test_the_least_group_for_which_nothing_is_guaranteed(epsilon, delta):
    least = unprotected_group(epsilon, delta)
    deltas = [k * math.exp((k - 1) * epsilon) * delta for k in range(1, least + 1)]
    assert deltas[-1] >= 1 and all(value < 1 for value in deltas[:-1])


@pytest.mark.parametrize(("epsilon", "least"), [(10.0, 2), (1.0, 10)])
def test_the_card_states_for_how_many_images_nothing_is_guaranteed(epsilon, least):
    card = privacy_card(
        report_of([Release("look", None)], epsilon=epsilon, delta=1e-4 if epsilon == 10 else 2e-5)
    )
    (line,) = lines_about_a_person(card)
    assert {int(number) for number in re.findall(r"\b[0-9]+\b", line)} == {least, 1}
    for other in ([], [Release("look", None)]):
        card = privacy_card(report_of(other, epsilon=math.inf if other else 1.0))
        assert not lines_about_a_person(card)


def lines_about_a_person(card: str) -> list[str]:
    """The claims about a person with several images, which are bold."""
    return [line for line in card.splitlines() if re.match(r"- \*\*[^*]*\bperson\b", line)]


MADE = {
    "public_data": {"name": "letters", "images": 1240, "classes": 62},
    "overrides": ["train.n_epochs=2"],
    "learns_class_shares": False,
    "samples_per_class": [20, 20],
    "public_copies": 0,
    "sample_warnings": ["3 of 40 samples are odd"],
}


def test_the_card_describes_the_samples_and_their_inputs(two_stages):
    card = privacy_card({**two_stages, **MADE})
    public, given = section(card, "Other inputs")
    assert "**letters**, 1,240 " in public and given.endswith("train.n_epochs=2")
    copies, labels, warning = section(card, "What the samples")
    assert "byte" in copies and warning == f"warning: {MADE['sample_warnings'][0]}"
    learning = privacy_card({**two_stages, **MADE, "learns_class_shares": True})
    assert labels.startswith("labels: 20 ") and "noise" not in labels
    assert "noise" in section(learning, "What the samples")[1]
    uneven = section(privacy_card({**two_stages, **MADE, "samples_per_class": [5, 35]}), "What the samples")[
        1
    ]
    assert uneven.startswith("labels: 5 to 35 ") and len(uneven) < len(labels)  # says nothing of equal shares
    without = privacy_card({**two_stages, **MADE, "public_data": None, "overrides": []})
    assert all(entry.endswith(": none") for entry in section(without, "Other inputs"))
    assert not any("byte" in entry for entry in section(without, "What the samples"))
    copied = privacy_card({**two_stages, **MADE, "public_copies": 38})
    assert {"38", "40", "letters,"} <= set(section(copied, "What the samples")[0].split())
    assert not section(privacy_card(two_stages), "What the samples")  # not drawn yet


def test_the_card_names_run_and_private_set(two_stages):
    card = privacy_card({**two_stages, "run": "dpdm/toy_eps2.0-2026"})
    assert "gen/gen.npz" in card and "**dpdm/toy_eps2.0-2026**" in card
    assert f" {NUM_RECORDS} " in card and "**toy**" in card


def test_a_stage_of_no_steps_is_not_reported():
    """A run that only samples from a checkpoint has such a DP-SGD stage."""
    report = report_of([Release("look", 10.0), Release("training", None, num_steps=0)])
    assert "training" not in privacy_summary(report) and "| training |" not in privacy_card(report)
    assert "| look |" in privacy_card(report)


@pytest.mark.parametrize("count", [1, 3])
def test_without_an_epsilon_nothing_is_claimed_for_a_person(two_stages, count):
    failed = {"spent": math.inf, "spent_by_accountant": {}, "not_computed": "MemoryError"}
    card = privacy_card({**two_stages, **failed, "images_per_person": count})
    assert not lines_about_a_person(card) and "nan" not in card
    assert lines_about_a_person(privacy_card({**two_stages, "images_per_person": count}))


def test_presets_that_were_tuned_on_these_very_images_are_named(two_stages):
    argv = ["--method", "Noise", "--data_name", "digits_8"]
    spec, _ = spec_of(load_config(argv, METHODS).sensitive_data, "syn", Path("nowhere"))
    samples = Samples(np.zeros((spec.num_train, 1, 8, 8), np.uint8), np.zeros(spec.num_train, np.int64))
    ledger = Ledger(Budget(1.0, 1e-4))
    ledger.adopt([])
    tuned = section(privacy_card(PrivateData(samples, spec, ledger).report()), "Assumed public")
    other = section(privacy_card(two_stages), "Assumed public")
    assert "presets" in str(tuned) and "presets" not in str(other)


def test_the_neighbouring_relation_is_stated():
    """Exchanging a record is bounded then; that one is there at all is not."""
    card = privacy_card(report_of([Release("look", None)], relation="replace_one"))
    assert RELATION["replace_one"] in card
    assert "presence" not in card and RELATION["add_or_remove_one"] not in card


def test_without_privacy():
    report = report_of([Release("look", None)], epsilon=math.inf)
    card = privacy_card(report)
    assert "NOT private" in card and "differentially private**" not in card and "above" not in card


def test_a_method_without_queries():
    card = privacy_card(report_of([]))
    assert "-differentially" not in card and "NOT private" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 2  # the head of the table alone


def test_seeded_noise_voids_the_guarantee():
    assert "privacy.noise_seed" in privacy_card(report_of([Release("look", None)], noise_seed=1))


def test_choosing_classifiers_is_reported_apart_from_the_samples(two_stages):
    choices = [report_of([noisy_max_release("selection/a", 0.5, "add_or_remove_one")], 0.5)] * 2
    card = privacy_card({**two_stages, "selection": choices})
    line = next(line for line in card.splitlines() if "Choosing classifiers" in line)
    assert "epsilon 1 " in line and "2 evaluation(s)" in line
    assert f"({at_most(two_stages['spent'])}," in card


@pytest.mark.parametrize("epsilon", [2.0, math.inf])
def test_the_card_of_a_report_that_was_read_back_is_the_same(tmp_path, epsilon):
    report = report_of([Release("look", None)], epsilon=epsilon)
    write_json(tmp_path / "privacy.json", report)
    assert privacy_card(read_json(tmp_path / "privacy.json")) == privacy_card(report)


def test_the_card_is_plain_text(two_stages):
    assert privacy_card(two_stages).isascii()


# ------------------------------------------------------------------------------------------------- the summary


def test_the_summary_is_short_and_reports_what_was_spent(two_stages):
    first, *stages = privacy_summary(two_stages).splitlines()
    assert f"({at_most(two_stages['spent'])}, 0.0001)-differentially private" in first
    assert RELATION["add_or_remove_one"] in first
    assert [line.split(":")[0] for line in stages] == ["  first look", "  training"]
    for line, release in zip(stages, two_stages["releases"], strict=True):
        taken = release["executed"]
        assert f" {taken} of {taken} " in line and f" {at_most(release['epsilon_alone'])} " in line


def test_the_summary_of_runs_without_a_guarantee_or_without_a_query():
    assert "NOT private" in privacy_summary(report_of([Release("look", None)], epsilon=math.inf))
    assert not {"NOT", "epsilon"} & set(privacy_summary(report_of([])).split())


def test_no_sum_of_costs_is_rounded_down(two_stages):
    choice = {"spent": 0.12344, "noise_seeded": False}
    stages = [{**release, "epsilon_alone": 1.00001} for release in two_stages["releases"]]
    report = {**two_stages, "releases": stages, "selection": [choice] * 3}  # 0.37032
    for text in (privacy_card(report), privacy_summary(report)):
        assert "spent epsilon 0.3704 " in text and text.count("1.001") == len(stages)


def test_the_summary_adds_up_what_choosing_classifiers_spent(two_stages):
    choices = [report_of([noisy_max_release("selection/a", 0.5, "add_or_remove_one")], 0.5)] * 2
    assert "spent epsilon 1 " in privacy_summary({**two_stages, "selection": choices})


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (0.02, "1/N = 0.02"),
        (0.005, "delta 0.005 is large"),
        (1e-4, None),
    ],
)
def test_a_weak_delta_is_reported_in_summary_and_card(delta, words):
    report = report_of([Release("look", None)], delta=delta)
    for text in (privacy_summary(report), privacy_card(report)):
        assert words in text if words else "1/N" not in text and "weak" not in text
    assert "weak" not in privacy_card(report_of([Release("look", None)], epsilon=math.inf, delta=0.005))


def test_seeded_noise_is_reported_in_the_summary():
    assert "privacy.noise_seed" in privacy_summary(report_of([Release("look", None)], noise_seed=1))
