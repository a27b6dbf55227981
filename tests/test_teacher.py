"""gen.teacher: a DP classifier in the ledger of any method, whose labels the samples get."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_runs import arguments, call

import run as run_program
from models.dp_linear import DPLinear
from models.linear.taught import FILTER, RELABEL, Taught
from opacus_ext.ledger import Budget, Ledger


@pytest.fixture
def make_taught(make_method):
    """make_taught(name, *settings, use) -> the method with a teacher by class means."""

    def make(name: str, *settings: str, use: str = RELABEL, noise: float = 5.0) -> Taught:
        teacher: DPLinear = make_method("DP-Linear")
        teacher.linear.name = "teacher"
        return Taught(make_method(name, *settings), teacher.linear, noise, use)

    return make


def test_both_queries_are_planned_and_together_meet_the_budget(make_taught, make_private):
    taught = make_taught("DP-MERF")
    plan = taught.privacy_plan()
    assert [(release.name, release.noise_multiplier) for release in plan] == [
        ("teacher", 5.0),
        ("mean embedding", None),
    ]
    private = make_private(plan, 10.0)
    assert private.ledger.report()["spent"] == 0
    taught.train(private)
    private.ledger.require_complete()
    assert 9 < private.ledger.report()["spent"] <= 10


@pytest.mark.parametrize("name", ["DP-MERF", "DPDM", "PE", "DP-FETA"])
def test_samples_get_the_labels_of_the_teacher(name, make_taught, make_private):
    taught = make_taught(name)
    private = make_private(taught.privacy_plan(), 10.0)
    taught.train(private)
    samples = taught.generate(17)
    logits = taught.teacher.classifier()(torch.from_numpy(samples.images) / 127.5 - 1)
    assert samples.labels.tolist() == logits.argmax(1).tolist() and len(samples) == 17


def test_filtered_samples_are_balanced_and_prefer_those_that_agree(make_taught, make_private, monkeypatch):
    taught = make_taught("Noise", use=FILTER)
    taught.train(make_private(taught.privacy_plan(), 10.0))
    agreeing = np.array([0, 1, 1, 2, 1, 2])  # what the teacher gives to each half dozen of samples
    monkeypatch.setattr(Taught, "_labels_of", lambda self, images: np.resize(agreeing, len(images)))
    samples = taught.generate(6)
    assert np.bincount(samples.labels).tolist() == [2, 2, 2]
    drawn = taught.method.generate(24)
    agrees = np.resize(agreeing, 24) == drawn.labels
    chosen = {image.tobytes() for image in drawn.images[agrees]}
    assert sum(image.tobytes() in chosen for image in samples.images) == 6


def test_the_checkpoint_of_the_method_stays_usable(make_taught, make_private, make_method):
    taught = make_taught("DP-MERF")
    taught.train(make_private(taught.privacy_plan(), 10.0))
    state = taught.state_dict()
    other = make_taught("DP-MERF")
    other.load_state_dict(state)
    assert torch.equal(other.teacher.layer.weight, taught.teacher.layer.weight)
    assert set(make_method("DP-MERF").state_dict()) == set(state) - {"teacher"}


def test_a_run_with_a_teacher(tmp_path):
    argv = arguments(
        "DP-MERF", tmp_path / "exp", "gen.teacher=[]", "gen.teacher_share=0.5", "eval.metrics=[accuracy]"
    )
    outcome = call(run_program.main, [*argv, "--epsilon", "2"])
    assert outcome.code == 0, outcome.err
    privacy = json.loads((outcome.folder / "privacy.json").read_text())
    names = {release["name"]: release["epsilon_alone"] for release in privacy["releases"]}
    assert names["teacher"] == pytest.approx(1.0, rel=1e-2) and privacy["spent"] <= 2
    results = json.loads((outcome.folder / "results.json").read_text())
    assert "accuracy/released/last_epoch" in results["metrics"]


def test_without_privacy_the_teacher_has_no_noise(make_taught):
    ledger = Ledger(Budget(math.inf, 1e-5))
    ledger.adopt(make_taught("DP-MERF").privacy_plan())
    assert ledger.planned("teacher").noise_multiplier == 0


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("DP-MERF", ["gen.teacher=[model.featurs=pixels]"], "model.features"),
        ("DP-MERF", ["gen.teacher=[]", "gen.teacher_share=1"], "teacher_share"),
        ("DP-MERF", ["gen.teacher=[]", "gen.teacher_use=label"], "relabel"),
        ("DP-MERF", ["gen.teacher=[model.num_directions=5]"], "num_directions"),
        ("DP-Linear", ["gen.teacher=[]", "model.features=random_conv"], "no images"),
        ("DP-MERF", ["gen.teacher_use=filter"], "gen.teacher=[]"),
        ("DP-MERF", ["gen.teacher=[gen.data_num=5]"], "gen.data_num"),
        ("DP-MERF", ["gen.teacher=[train.fit=sgd,train.batch_size=2000]"], "gen.teacher: train.batch_size"),
        ("DP-MERF", ["gen.teacher=[train.fit=sgd,train.batch_size=200,train.n_epochs=0]"], "n_epochs"),
    ],
)
def test_mistakes_are_one_line(method, settings, named, tmp_path):
    refusal = call(run_program.main, arguments(method, tmp_path / "exp", *settings)).refusal
    assert named in refusal


def test_a_method_that_selects_public_classes_can_have_a_teacher(make_taught):
    plan = make_taught("PrivImage").privacy_plan()
    assert [release.name for release in plan] == ["teacher", "semantic query", "dp-sgd"]
