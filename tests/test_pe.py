"""Private Evolution: votes and their noise, selection, populations, its generators, what is refused."""

import dataclasses
import importlib.util
import math
import typing
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data.glyphs import FONT_NAMES, character_mask, load_fonts
from data.sensitive import spec_of
from data.spec import Samples
from models import METHODS
from models.evolution import voting
from models.evolution.apis import APIS
from models.evolution.apis.api import Candidates, ImageAPI, checked
from models.evolution.apis.glyphs import GLYPH, POSE, RANGES, GlyphsAPI, outlines, render
from models.evolution.apis.nearest import ROW, NearestAPI, NearestConfig
from models.evolution.population import class_labels, class_sizes, survivors
from models.evolution.voting import NearestCandidates, ballots, choose_backend
from models.pe import PE, ApiParams
from opacus_ext import private_data
from opacus_ext.accounting import Release
from opacus_ext.ledger import Budget, Ledger, default_delta
from opacus_ext.noise import GridNoise
from pipeline.checkpoints import Checkpoints
from utils.config import load_config
from utils.errors import UserError
from utils.runtime import Runtime

NUM_RECORDS, NUM_CLASSES = 60, 3  # of the toy in conftest.py
BACKENDS = ["torch", *(["faiss"] if importlib.util.find_spec("faiss") else [])]


# ------------------------------------------------------------------------------------------ a generator by the book


@dataclass(frozen=True)
class ShiftConfig:
    step: int = 10


class ShiftAPI(ImageAPI):
    """Random pixels; a variation of degree d adds d * step to every pixel. `calls` counts the images it made."""

    Config = ShiftConfig

    def __init__(self, config, spec, runtime):
        super().__init__(config, spec, runtime)
        self.calls = []

    def random_api(self, labels, rng_name):
        self.calls.append(rng_name)
        rng = np.random.default_rng(len(rng_name))
        images = rng.integers(0, 200, (len(labels), *self.image_shape), dtype=np.uint8)
        return Candidates(images, labels, {"born": np.arange(len(labels))})

    def variation_api(self, candidates, degree, rng_name):
        self.calls.append(rng_name)
        moved = candidates.images + np.uint8(degree * self.config.step)
        return Candidates(moved, candidates.labels, candidates.info)


class BrokenAPI(ShiftAPI):
    """Answers as `answer` says."""

    answer = staticmethod(lambda images: images)

    def random_api(self, labels, rng_name):
        found = super().random_api(labels, rng_name)
        return dataclasses.replace(found, images=self.answer(found.images))


SHIFT = [f"model.api={__name__}:ShiftAPI", "model.feature_extractor=pixels"]


# ------------------------------------------------------------------------------------------ voting


def brute_force(candidates: np.ndarray, records: np.ndarray, mode: str, count: int) -> np.ndarray:
    """(B, k) indices, nearest first, of equally near candidates the first."""
    if mode == "cosine":
        candidates = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    scores = (
        ((records[:, None] - candidates[None]) ** 2).sum(2) if mode == "L2" else -(records @ candidates.T)
    )
    return np.argsort(scores, axis=1, kind="stable")[:, :count]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["L2", "IP"])
@pytest.mark.parametrize("block", [4, 1000])
def test_votes_equal_a_brute_force_search_ties_included(block, mode, count, monkeypatch):
    """Small whole numbers are exact in float32, and lie equally near often."""
    monkeypatch.setattr(voting, "CANDIDATES_AT_ONCE", block)
    rng = np.random.default_rng(0)
    candidates, records = (rng.integers(-2, 3, (n, 3)).astype(np.float64) for n in (30, 200))
    expected = brute_force(candidates, records, mode, count)
    assert len(np.unique(candidates, axis=0)) < 30  # there are ties
    search = NearestCandidates(torch.tensor(candidates).float(), mode, count, "torch")
    assert np.array_equal(search(torch.tensor(records).float()).numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["L2", "IP", "cosine"])
def test_every_backend_finds_the_nearest(backend, mode):
    rng = np.random.default_rng(1)
    candidates, records = (rng.standard_normal((n, 12)) for n in (70, 50))
    search = NearestCandidates(torch.tensor(candidates).float(), mode, 4, backend)
    found = search(torch.tensor(records).float()).numpy()
    assert np.array_equal(found, brute_force(candidates, records, mode, 4))


def test_more_votes_than_a_block_has_candidates(monkeypatch):
    monkeypatch.setattr(voting, "CANDIDATES_AT_ONCE", 2)
    search = NearestCandidates(torch.tensor([[5.0], [1.0], [9.0], [2.0], [4.0]]), "L2", 4, "torch")
    assert search(torch.tensor([[3.0]])).tolist() == [[3, 4, 0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_with_features_that_are_not_finite_votes_like_any_other(backend):
    search = NearestCandidates(torch.tensor([[5.0, 1.0], [1.0, 1.0]]), "L2", 1, backend)
    votes = search(torch.tensor([[torch.nan, torch.inf], [0.0, 0.0], [-3e38, 3e38]]))
    assert votes.shape == (3, 1) and votes[1].item() == 1 and set(votes.flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_vote_within_their_class(backend):
    """Also where a class has no record in the batch, and where the nearest of all candidates is another class's."""
    blocks = [torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [9.0]]), torch.tensor([[0.0], [7.0]])]
    cast = ballots([NearestCandidates(features, "L2", 1, backend) for features in blocks], 1)
    votes = cast(torch.tensor([[0.9], [0.9], [8.0]]), torch.tensor([0, 1, 1]))
    assert votes.flatten().tolist() == [1, 0, 1]


class Rounding:
    """A library whose results are off by rounding, differently in every place, and anew for every size of batch."""

    def __init__(self, monkeypatch):
        exact, self.sizes = torch.addmm, set()

        def addmm(offsets, records, features, **options):
            found = exact(offsets, records, features, **options)
            self.sizes.add(len(records))
            rng = torch.Generator().manual_seed(len(records))
            off = torch.randint(-2, 3, found.shape, generator=rng)
            return found * (1 + off * torch.finfo(found.dtype).eps)

        monkeypatch.setattr(torch, "addmm", addmm)


@pytest.mark.parametrize("mode", ["L2", "IP", "cosine"])
def test_rounding_does_not_distinguish_copies_of_a_candidate(mode, monkeypatch):
    """Which of them wins would be chance: the same for all records of a batch, and another one with one record more."""
    Rounding(monkeypatch)
    rng = torch.Generator().manual_seed(0)
    different = torch.rand(10, 24, generator=rng)
    search = NearestCandidates(different.repeat(6, 1), mode, 1, "torch")
    assert int(search(torch.rand(90, 24, generator=rng)).max()) < 10  # the first of the copies


@pytest.mark.parametrize("num_classes", [1, 3])
def test_no_record_moves_the_votes_of_others_through_the_size_of_a_batch(num_classes, monkeypatch):
    """Candidates that differ by little more than float32 can tell."""
    rounding = Rounding(monkeypatch)
    rng = torch.Generator().manual_seed(0)
    near = torch.rand(1, 24, generator=rng) * (1 + 1e-7 * torch.randn(40, 24, generator=rng))
    records, labels = torch.rand(100, 24, generator=rng), torch.arange(100) % num_classes
    cast = ballots([NearestCandidates(near.clone(), "L2", 1, "torch") for _ in range(num_classes)], 1)
    together = cast(records, labels)
    for count in (1, 2, 31, 32, 33, 64, 65, 99):
        assert torch.equal(cast(records[:count], labels[:count]), together[:count])
    assert rounding.sizes == {voting.RECORDS_AT_ONCE}


def test_votes_do_not_depend_on_which_backends_are_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto") == choose_backend("torch") == "torch"
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        choose_backend("faiss")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose_backend("auto") == "torch" and choose_backend("faiss") == "faiss"


# ------------------------------------------------------------------------------------------ the release


def test_the_plan_is_one_release_of_a_step_per_iteration(make_method):
    assert make_method("PE").privacy_plan() == [Release("votes", None, num_steps=2)]


@pytest.fixture
def asked(monkeypatch):
    """The noisy votes that every iteration was given, and the population and features that they were cast on."""
    found = []
    ask = PE._query_votes

    def watched(self, records, features):
        answer = ask(self, records, features)
        found.append((answer.clone(), features.clone(), self.population))
        return answer

    monkeypatch.setattr(PE, "_query_votes", watched)
    return found


def votes_by_hand(features, population, samples, count) -> np.ndarray:
    """(K, n / K): clean counts by NumPy."""
    pixels = samples.images.reshape(len(samples), -1) / 255
    block = len(population) // NUM_CLASSES
    counts = np.zeros((NUM_CLASSES, block))
    for label in range(NUM_CLASSES):
        own = features.numpy()[population.labels == label].astype(np.float64)
        for vote in brute_force(own, pixels[samples.labels == label], "L2", count).ravel():
            counts[label, vote] += 1
    return counts


@pytest.mark.parametrize("count", [1, 2])
def test_without_noise_the_votes_are_those_of_the_records(count, make_trial, samples, asked):
    trial = make_trial("PE", *SHIFT, f"train.num_nearest_neighbor={count}", epsilon=math.inf)
    trial.run()
    assert len(asked) == 2
    for votes, features, population in asked:
        expected = votes_by_hand(features, population, samples, count)
        assert np.array_equal(votes.sum(1).numpy(), [20 * count] * NUM_CLASSES)
        # Two copies of a parent are equally near, up to how a matrix product rounds in one column and in another.
        for label in range(NUM_CLASSES):
            _, copies = np.unique(features[population.labels == label].numpy(), axis=0, return_inverse=True)
            found = np.bincount(copies.ravel(), votes[label].numpy())
            assert np.array_equal(found, np.bincount(copies.ravel(), expected[label]))


@pytest.mark.parametrize("count", [1, 3])
def test_one_record_moves_the_votes_by_the_bound_and_in_its_class_alone(count, make_trial, samples, asked):
    settings = (*SHIFT, f"train.num_nearest_neighbor={count}", "train.num_samples_schedule=[30,30]",
                "train.variation_degree_schedule=[0,1]")  # fmt: skip
    for records in (samples, samples.take(np.arange(59))):
        make_trial("PE", *settings, epsilon=math.inf, records=records).run()
    moved = asked[0][0] - asked[1][0]
    assert moved.norm().item() == pytest.approx(math.sqrt(count))
    assert (moved.abs().sum(1) > 0).tolist() == [False, False, True]


@pytest.mark.parametrize("count", [1, 4])
def test_every_vote_carries_the_planned_noise(count, make_trial, samples, asked):
    settings = (*SHIFT, f"train.num_nearest_neighbor={count}", "train.num_samples_schedule=[1500,30]",
                "train.variation_degree_schedule=[0,1]")  # fmt: skip
    trial = make_trial("PE", *settings, epsilon=1)
    trial.run()
    votes, features, population = asked[0]
    noise = votes.numpy() - votes_by_hand(features, population, samples, count)
    planned = trial.private.ledger.planned("votes").noise_multiplier * math.sqrt(count)
    assert noise.std() == pytest.approx(planned, rel=0.08)  # 4.4 standard errors
    assert abs(noise.mean()) < 5 * planned / math.sqrt(noise.size)


def test_missing_noise_is_caught(make_trial, samples, asked, monkeypatch):
    monkeypatch.setattr(GridNoise, "add_to", lambda self, total: total.float())
    with pytest.raises(AssertionError):
        test_every_vote_carries_the_planned_noise(1, make_trial, samples, asked)


def test_votes_counted_twice_are_caught(make_trial, samples, asked, monkeypatch):
    count = private_data.vote_sum
    monkeypatch.setattr(private_data, "vote_sum", lambda *args, **named: 2 * count(*args, **named))
    with pytest.raises(AssertionError):
        test_one_record_moves_the_votes_by_the_bound_and_in_its_class_alone(1, make_trial, samples, asked)


def test_votes_for_other_classes_are_caught(make_trial, samples, asked, monkeypatch):
    def mixed(nearest, num_neighbors):
        return lambda records, labels: nearest[0](records)

    monkeypatch.setattr("models.evolution.synthesizer.ballots", mixed)
    with pytest.raises(AssertionError):
        test_without_noise_the_votes_are_those_of_the_records(1, make_trial, samples, asked)


def test_without_classes_all_records_vote_among_all_candidates(make_trial, samples, asked):
    trial = make_trial("PE", *SHIFT, "train.cond=false", epsilon=math.inf)
    trial.run()
    votes, features, population = asked[0]
    pixels = samples.images.reshape(len(samples), -1) / 255
    expected = np.bincount(
        brute_force(features.numpy().astype(np.float64), pixels, "L2", 1).ravel(), minlength=30
    )
    assert np.array_equal(votes.numpy(), expected[None])
    assert len(population) == 30
    assert np.bincount(trial.synthesizer.generate(9).labels).tolist() == [3, 3, 3]


# ------------------------------------------------------------------------------------------ what is kept


def test_no_state_holds_a_clean_count(make_trial, samples, asked):
    """Also in the moment between the answer and the selection, which has a snapshot of its own."""
    states = []
    runtime = Runtime(snapshot=lambda stage: states.append(trial.synthesizer.state_dict()))
    trial = make_trial("PE", *SHIFT, epsilon=10, runtime=runtime)
    trial.run()
    assert [(state["iteration"], state["votes"] is None) for state in states] == [
        (0, True), (0, False), (1, True), (1, False), (2, True)
    ]  # fmt: skip
    for (votes, features, population), state in zip(asked, (states[1], states[3]), strict=True):
        assert set(state) == {"iteration", "population", "votes", "api"}
        assert set(state["population"]) == {"images", "labels", "info"}
        assert set(state["population"]["info"]) == {"born"}
        assert torch.equal(state["votes"], votes)
        clean = votes_by_hand(features, population, samples, 1)
        assert not np.isclose(votes.numpy(), clean, atol=1e-4).any()
        assert not (votes == votes.round()).any()


def test_kept_clean_counts_are_caught(make_trial, samples, asked, monkeypatch):
    monkeypatch.setattr(GridNoise, "add_to", lambda self, total: total.float())
    with pytest.raises(AssertionError):
        test_no_state_holds_a_clean_count(make_trial, samples, asked)


def test_everything_after_the_votes_reads_the_noisy_votes_alone(make_trial, samples, monkeypatch):
    """Two sets of records with the same released votes lead to the same images."""
    released = torch.from_numpy(np.random.default_rng(0).normal(3, 4, (NUM_CLASSES, 10))).float()
    monkeypatch.setattr(PE, "_query_votes", lambda self, records, features: released)
    made = []
    for records in (samples, samples.take(np.arange(20))):
        trial = make_trial("PE", epsilon=1, records=records)
        trial.run()
        made.append(trial.synthesizer.generate(12))
    assert np.array_equal(made[0].images, made[1].images)


# ------------------------------------------------------------------------------------------ selection


def test_classes_have_equal_shares_whatever_the_records(make_trial, samples):
    assert class_sizes(11, 4).tolist() == [3, 3, 3, 2]
    assert class_labels(5, 3).tolist() == [0, 0, 1, 1, 2]
    imbalanced = samples.take(np.flatnonzero(samples.labels != 1))
    trial = make_trial("PE", "train.num_samples_schedule=[20,20,11]", epsilon=10, records=imbalanced)
    trial.run()
    assert np.bincount(trial.synthesizer.population.labels).tolist() == [4, 4, 3]


def test_survivors_are_drawn_by_their_votes_above_the_threshold():
    votes = np.array([2.0, 5.0, -9.0, 3.0, 11.0])
    found = survivors(votes, 12_000, "sample", 2.0, np.random.default_rng(0))
    shares = np.bincount(found, minlength=5) / 12_000
    assert shares.tolist() == pytest.approx([0, 3 / 13, 0, 1 / 13, 9 / 13], abs=0.02)


@pytest.mark.parametrize("votes", [[1.0, 2.0, -3.0, 0.5], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -3.0, -4.0]])
def test_where_nobody_is_above_the_threshold_all_are_equally_likely(votes):
    found = survivors(np.array(votes), 8000, "sample", 2.0, np.random.default_rng(0))
    assert (np.bincount(found, minlength=4) / 8000).tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_ranking_takes_the_most_votes_of_equal_ones_the_first():
    votes = np.array([1.0, 4.0, -2.0, 4.0, 3.0])
    assert survivors(votes, 3, "rank", 100.0, np.random.default_rng(0)).tolist() == [1, 3, 4]


def test_the_winners_of_a_class_are_its_own(make_trial, monkeypatch):
    """All votes go to one candidate of each class: the next population descends from these three."""
    released = torch.zeros(NUM_CLASSES, 10)
    released[[0, 1, 2], [4, 0, 9]] = 50.0
    monkeypatch.setattr(PE, "_query_votes", lambda self, records, features: released)
    trial = make_trial("PE", *SHIFT, "train.num_samples_schedule=[30,30]",
                       "train.variation_degree_schedule=[0,1]")  # fmt: skip
    trial.run()
    population = trial.synthesizer.population
    born = [set(population.info["born"][population.labels == label]) for label in range(NUM_CLASSES)]
    assert born == [{4}, {10}, {29}]
    first = trial.synthesizer.api.random_api(class_labels(30, 3), "initial").images
    assert np.array_equal(population.images[0], first[4] + 10)  # one variation of degree 1


# ------------------------------------------------------------------------------------------ populations


def test_folds_and_kept_parents(make_trial, asked):
    """Sizes per iteration, parents before their variations, and the parents as the result."""
    settings = (*SHIFT, "train.num_samples_schedule=[9,6,6,6]", "train.variation_degree_schedule=[1,1,2,3]",
                "train.initial_variation_fold=1", "train.next_variation_fold=[2,1,3]",
                "train.keep_selected=[true,false,true]", "train.selection=[rank,sample,rank]",
                "train.lookahead_degree=0")  # fmt: skip
    trial = make_trial("PE", *settings, epsilon=10)
    trial.run()
    assert [len(population) for *_, population in asked] == [18, 18, 6]
    method = trial.synthesizer
    assert np.bincount(method.population.labels).tolist() == [8, 8, 8]
    first = method.population.take(slice(0, 8))
    # Every parent (two of a class) comes first, then the first variation of both, and so on.
    for fold in range(1, 4):
        assert np.array_equal(first.images[2 * fold : 2 * fold + 2], first.images[:2] + np.uint8(30))
    samples = method.generate(6)
    parents = [method.population.images[8 * label + place] for label in range(3) for place in (0, 1)]
    assert {image.tobytes() for image in samples.images} == {image.tobytes() for image in parents}


def test_a_candidate_is_represented_by_the_mean_of_its_variations(make_trial, asked):
    trial = make_trial("PE", *SHIFT, "train.lookahead_degree=3", epsilon=10)
    trial.run()
    _, features, population = asked[1]
    assert [name for name in trial.synthesizer.api.calls if "iteration 2 lookahead" in name] == [
        f"iteration 2 lookahead {index}" for index in range(3)
    ]
    expected = (population.images.reshape(30, -1) + np.uint8(20)) / 255  # degree 2
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)


def test_without_lookahead_a_candidate_is_represented_by_itself(make_trial, asked):
    make_trial("PE", *SHIFT, "train.lookahead_degree=0", epsilon=10).run()
    _, features, population = asked[1]
    np.testing.assert_allclose(features.numpy(), population.images.reshape(30, -1) / 255, atol=1e-6)


@pytest.mark.parametrize("num_samples", [7, 30, 80])
def test_samples_are_the_population_then_variations_of_it(num_samples, make_trial):
    trial = make_trial("PE", *SHIFT, epsilon=10)
    trial.run()
    method = trial.synthesizer
    samples = method.generate(num_samples)
    known = {image.tobytes(): label for image, label in zip(method.population.images, method.population.labels,
                                                            strict=True)}  # fmt: skip
    are_members = np.array([image.tobytes() in known for image in samples.images])
    assert are_members[:30].all()
    moved = samples.images[~are_members] - np.uint8(20)  # by the last degree
    assert len(moved) == max(0, num_samples - 30) and all(image.tobytes() in known for image in moved)
    counts = np.bincount(samples.labels, minlength=3)
    assert counts.max() - counts.min() <= 1


def test_evolution_finds_the_character_of_each_class(make_trial, spec):
    """The private images of class k show one character; the first population shows all. Wrong classes, votes that
    are not counted, and selection of the losers all end near one in four."""
    settings = ("model.api_params.glyphs.characters=0147", "train.num_samples_schedule=[120,120,120]",
                "train.lookahead_degree=2", "gen.data_num=120")  # fmt: skip
    renderer = make_trial("PE", *settings, epsilon=10).synthesizer.api
    drawn = renderer.random_api(np.zeros(2000, np.int64), "private images")
    rows = np.concatenate([np.flatnonzero(drawn.info[GLYPH][:, 0] == kind)[:20] for kind in (2, 0, 3)])
    records = Samples(drawn.images[rows], np.repeat(np.arange(3), 20))
    trial = make_trial("PE", *settings, epsilon=20, noise_seed=0, records=records)
    trial.run()
    population = trial.synthesizer.population
    shares = [(population.info[GLYPH][population.labels == label, 0] == kind).mean() for label, kind in
              enumerate((2, 0, 3))]  # fmt: skip
    assert min(shares) > 0.6


# ------------------------------------------------------------------------------------------ resuming


class Killed(BaseException):
    pass


def resumed(make_trial, folder):
    trial = make_trial("PE", epsilon=10, noise_seed=5, runtime=Runtime(folder=folder))
    kept = Checkpoints(folder, "PE", trial.synthesizer, trial.private.ledger)
    trial.synthesizer.runtime.snapshot = lambda stage: kept.save(stage, "snapshot")
    restored = kept.restore()
    if restored is None:
        trial.synthesizer.pretrain(trial.public, trial.private)
    trial.synthesizer.train(trial.private)
    return trial


@pytest.mark.parametrize("killed_in", ["votes 1", "iteration 1 variation 0", "iteration 2 lookahead 0", "votes 2",
                                       "iteration 2 variation 0"])  # fmt: skip
def test_a_killed_run_resumes_and_repeats_no_query(killed_in, make_trial, tmp_path, monkeypatch):
    whole = make_trial("PE", epsilon=10, noise_seed=5)
    whole.run()
    bookings = []
    book, vary = Ledger.book, GlyphsAPI.variation_api

    def dying_book(self, name, *args):
        bookings.append(self.executed(name) + 1)
        if killed_in == f"{name} {self.executed(name) + 1}":
            raise Killed
        return book(self, name, *args)

    def dying_variation(self, candidates, degree, rng_name):
        if rng_name == killed_in:
            raise Killed
        return vary(self, candidates, degree, rng_name)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "book", dying_book)
        patch.setattr(GlyphsAPI, "variation_api", dying_variation)
        with pytest.raises(Killed):
            resumed(make_trial, tmp_path)
    trial = resumed(make_trial, tmp_path)
    assert trial.private.ledger.report() == whole.private.ledger.report()
    assert np.array_equal(trial.synthesizer.population.images, whole.synthesizer.population.images)
    one, other = trial.synthesizer.generate(9), whole.synthesizer.generate(9)
    assert np.array_equal(one.images, other.images)
    assert bookings[: len(set(bookings))] == sorted(set(bookings))


def test_another_schedule_cannot_take_up_what_was_spent(make_trial, tmp_path):
    trial = resumed(make_trial, tmp_path)
    other = make_trial(
        "PE", "train.num_samples_schedule=[30,30,30,30]", "train.variation_degree_schedule=[0,1,2,3]"
    )
    kept = Checkpoints(tmp_path, "PE", other.synthesizer, other.private.ledger)
    with pytest.raises(UserError, match="the interrupted run planned"):
        kept.restore()
    assert trial.private.ledger.complete


# ------------------------------------------------------------------------------------------ generators


@pytest.fixture
def glyphs(make_method) -> GlyphsAPI:
    return make_method("PE", "model.api_params.glyphs.characters=0123").api


def test_glyphs_draw_every_character_font_and_pose(glyphs):
    drawn = glyphs.random_api(np.zeros(2000, np.int64), "a")
    assert drawn.images.shape == (2000, 1, 8, 8) and drawn.images.dtype == np.uint8
    assert np.bincount(drawn.info[GLYPH][:, 0]).min() > 400  # of 4 characters
    assert len(np.unique(drawn.info[GLYPH][:, 1])) == len(FONT_NAMES)
    for values, (low, high) in zip(drawn.info[POSE].T, RANGES.values(), strict=True):
        assert (
            low <= values.min() < low + 0.05 * (high - low)
            and high - 0.05 * (high - low) < values.max() <= high
        )
    assert np.array_equal(glyphs.random_api(np.zeros(2000, np.int64), "a").images, drawn.images)
    assert not np.array_equal(glyphs.random_api(np.zeros(2000, np.int64), "b").images, drawn.images)
    assert drawn.images.reshape(2000, -1).max(1).min() > 20  # ink everywhere


def test_glyphs_change_less_with_every_degree_and_keep_the_label(glyphs):
    drawn = glyphs.random_api(class_labels(600, 3), "a")
    changes = []
    for degree in range(6):
        varied = glyphs.variation_api(drawn, degree, "b")
        assert np.array_equal(varied.labels, drawn.labels)
        for values, (low, high) in zip(varied.info[POSE].T, RANGES.values(), strict=True):
            assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        changes.append(np.abs(varied.images.astype(float) - drawn.images).mean())
    assert changes == sorted(changes, reverse=True) and changes[-1] < changes[0] / 3
    assert (glyphs.variation_api(drawn, 1, "b").info[GLYPH][:, 0] == drawn.info[GLYPH][:, 0]).all()


def test_a_glyph_is_what_a_large_picture_of_it_shrinks_to(glyphs):
    """The distance field against the bitmap of the font itself."""
    from PIL import Image

    pose = torch.tensor([[0.75, 1.0, 0.0, 0.0, 0.0]])
    for row, character in enumerate("0123"):
        mask = character_mask(load_fonts()[0], character)
        height = 24
        shrunk = mask.resize((round(24 * mask.width / mask.height), height), Image.Resampling.BOX)
        expected = np.zeros((32, 32))
        left = (32 - shrunk.width) // 2
        expected[4:28, left : left + shrunk.width] = np.asarray(shrunk)
        found = render(outlines("0123")[[len(FONT_NAMES) * row]], pose, 32)[0].numpy()
        assert np.abs(found - expected).mean() < 12  # of 255; a mirrored or turned one is above 40


def test_glyphs_turn_and_grow_with_the_pose():
    letter = outlines("L")[[0]]

    def drawn(**values):
        pose = {"size": 0.6, "stretch": 1.0, "angle": 0.0, "slant": 0.0, "stroke": 0.0, **values}
        return render(letter, torch.tensor([[pose[name] for name in RANGES]]), 40)[0].float()

    upright = drawn()
    rows = upright.sum(1).nonzero().flatten()
    assert (rows[-1] - rows[0] + 1).item() == pytest.approx(24, abs=1)  # 0.6 of 40 pixels
    quarter = torch.rot90(upright, 1)
    assert (drawn(angle=90.0) - quarter).abs().mean() < 5 or (
        drawn(angle=-90.0) - quarter
    ).abs().mean() < 5  # a turn, not a mirror image
    assert drawn(stroke=0.05).sum() > 1.3 * upright.sum()
    assert drawn(stretch=1.3).sum(0).count_nonzero() > upright.sum(0).count_nonzero()


@pytest.fixture
def nearest(make_method, public, spec) -> NearestAPI:
    api = NearestAPI(NearestConfig("pixels", None, 10), spec, Runtime())
    api.prepare(public)
    return api


def test_nearest_draws_every_public_image_before_one_comes_again(nearest, public):
    drawn = nearest.random_api(class_labels(len(public) + 5, 3), "a")
    assert np.bincount(drawn.info[ROW]).tolist().count(1) == len(public) - 5
    assert np.array_equal(drawn.images, public.samples.images[drawn.info[ROW]])


def test_nearest_varies_within_the_neighbours(nearest, public):
    drawn = nearest.random_api(class_labels(40, 3), "a")
    assert np.array_equal(nearest.variation_api(drawn, 1, "b").images, drawn.images)  # itself
    pixels = public.samples.images.reshape(len(public), -1) / 255
    neighbours = brute_force(pixels, pixels, "L2", 4)
    rows = [nearest.variation_api(drawn, 4, f"b {turn}").info[ROW] for turn in range(60)]
    for place, row in enumerate(drawn.info[ROW]):
        assert {found[place] for found in rows} == set(neighbours[row])
    assert len(nearest.variation_api(drawn, 1000, "b")) == 40  # more neighbours than images


def test_nearest_keeps_the_public_images_it_was_given(nearest, public, spec):
    small = NearestAPI(NearestConfig("pixels", 10, 10), spec, Runtime())
    small.prepare(public)
    assert small.images.shape == (10, 1, 8, 8)
    again = NearestAPI(NearestConfig("pixels", 10, 10), spec, Runtime())
    again.load_state_dict(small.state_dict())
    labels = class_labels(9, 3)
    one, other = (api.variation_api(api.random_api(labels, "a"), 3, "b") for api in (small, again))
    assert np.array_equal(one.images, other.images)


def test_pe_on_the_nearest_images_from_pretraining_to_samples(make_trial):
    settings = ("public_data.name=glyphs", "model.api=nearest", "model.api_params.nearest.embedding=pixels",
                "train.variation_degree_schedule=[5,5,2]")  # fmt: skip
    trial = make_trial("PE", *settings)
    trial.run()
    known = {image.tobytes() for image in trial.public.samples.images}
    assert {image.tobytes() for image in trial.synthesizer.generate(9).images} <= known


def test_a_generator_of_ones_own_takes_its_options(make_method):
    method = make_method("PE", *SHIFT, "model.api_options=[step=3]")
    assert isinstance(method.api, ShiftAPI) and method.api.config.step == 3


def test_each_generator_of_the_table_has_its_section():
    sections = typing.get_type_hints(ApiParams)
    assert sections == {name: APIS.resolve(name).Config | None for name in APIS}


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.num_samples_schedule=[]"], ["num_samples_schedule", "at least one"]),
        (["train.variation_degree_schedule=[0,1]"], ["variation_degree_schedule", "a list of 2", "3"]),
        (["train.num_samples_schedule=[30,2,30]"], ["num_samples_schedule[1]: 2", "3 classes"]),
        (["train.next_variation_fold=[1,1,1]"], ["next_variation_fold", "1 entry", "2"]),
        (["train.next_variation_fold=[0]"], ["next_variation_fold: 0", "not kept"]),
        (["train.num_nearest_neighbor=0"], ["num_nearest_neighbor: 0", "1 or more"]),
        (["train.num_nearest_neighbor=11"], ["num_nearest_neighbor: 11", "at most the 10"]),
        (["train.lookahead_degree=-1"], ["lookahead_degree: -1"]),
        (["train.count_threshold=-2"], ["count_threshold: -2"]),
        (["train.nn_mode=L1"], ["nn_mode 'L1'", "did you mean 'L2'"]),
        (["train.nn_backend=fais"], ["nn_backend 'fais'", "did you mean 'faiss'"]),
        (["train.selection=[ranks]"], ["selection 'ranks'", "did you mean 'rank'"]),
        (["train.selection=[rank]", "train.num_samples_schedule=[30,60,30]"], ["[1]: 60", "ranking"]),
        (["model.api=glyph"], ["api 'glyph'", "did you mean 'glyphs'"]),
        (["model.api=nearest"], ["public_data.name: null", "give one, for example public_data.name=glyphs"]),
        (["public_data.name=central_mean"], ["public_data.name: central_mean", "a public set or null"]),
        (["model.api=models.evolution.apis.api:Nothing"], ["model.api", "cannot load"]),
        (["model.api=no_such_module:API"], ["model.api", "cannot load", "no_such_module"]),
        (["model.api=models.evolution.apis.api:Candidates"], ["Candidates", "not a subclass"]),
        ([*SHIFT, "model.api_options=[stop=3]"], ["api_options.stop", "did you mean 'model.api_options.step'"]),
        ([*SHIFT, "model.api_options=[step=far]"], ["api_options.step", "far", "int"]),
        (["train.variation_degree_schedule=[0,1,6]"], ["variation_degree_schedule: 6", "0 to 5"]),
        (["train.variation_degree_schedule=[0,1,1.5]"], ["variation_degree_schedule: 1.5", "0 to 5"]),
        (["model.api_params.glyphs.characters="], ["glyphs.characters", "without spaces"]),
        (["model.api_params.glyphs.new_font=[2,0,0,0,0,0]"], ["glyphs.new_font", "[0, 1]"]),
        (["model.api_params.glyphs.size=[0.1]"], ["glyphs.size", "as long as new_character, 6"]),
        (["model.api_params.nearest.max_images=0"], ["nearest.max_images: 0"]),
        (["model.api_params.guided_diffusion.network.num_channels=10"],
         ["model.api_params.guided_diffusion.network.num_channels: 10", "a positive multiple of 32"]),
        (["model.api=guided_diffusion", "train.variation_degree_schedule=[0,1,5000]"],
         ["train.variation_degree_schedule: 5000", "guided_diffusion", "from 0 to"]),
        (["public_data.name=glyphs", "model.api=nearest", "train.variation_degree_schedule=[0,0,1]"],
         ["variation_degree_schedule: 0", "neighbours"]),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, words, make_method):
    with pytest.raises(UserError) as refused:
        make_method("PE", *settings)
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda images: images[:-1], ["(29, 1, 8, 8)", "(30, 1, 8, 8)"]),
        (lambda images: images[:, :, :7], ["(30, 1, 7, 8)", "(30, 1, 8, 8)"]),
        (lambda images: images / 255, ["float64 pixels", "uint8"]),
        (lambda images: images / np.float32(0) * 0, ["float32 pixels", "not finite", "uint8"]),
    ],
)
def test_a_generator_with_malformed_output_is_refused(answer, words, make_trial, monkeypatch):
    monkeypatch.setattr(BrokenAPI, "answer", staticmethod(answer))
    trial = make_trial("PE", f"model.api={__name__}:BrokenAPI", "model.feature_extractor=pixels")
    with pytest.raises(UserError, match="random_api returned") as refused, np.errstate(all="ignore"):
        trial.run()
    assert all(word in str(refused.value) for word in words), refused.value
    assert trial.private.ledger.executed("votes") == 0


def test_rows_of_information_must_fit_the_images():
    found = Candidates(np.zeros((3, 1, 2, 2), np.uint8), np.zeros(3, np.int64), {"seed": np.zeros(2)})
    with pytest.raises(UserError, match="2 rows of 'seed' for 3 images"):
        checked(found, np.zeros(3, np.int64), (1, 2, 2), "random_api")


# ------------------------------------------------------------------------------------------ published settings

PUBLISHED = [  # data, epsilon, iterations, threshold, respacing, noise multiplier (analytic Gaussian mechanism)
    ("mnist_28", 10, 11, 3.0, "10", 1.765),
    ("mnist_28", 1, 10, 24.0, "10", None),
    ("fmnist_28", 1, 11, 24.0, "10", 13.661),
    ("eurosat_32", 10, 11, 3.0, "10", 1.703),
    ("cifar10_32", 10, 5, 2.0, "100", 1.181),
    ("cifar100_32", 1, 5, 15.0, "100", 9.107),
    ("celeba_male_32", 10, 5, 2.0, "100", 1.231),
    ("camelyon_32", 1, 7, 30.0, "ddim10", 11.823),
    ("camelyon_32", 10, 7, 4.0, "ddim10", 1.486),
]


@pytest.mark.parametrize(("data", "epsilon", "iterations", "threshold", "respacing", "noise"), PUBLISHED)
def test_published_settings_and_their_noise(data, epsilon, iterations, threshold, respacing, noise):
    argv = ["--method", "PE", "--data_name", data, "--epsilon", str(epsilon), "eval.mode=val"]
    config = load_config(argv, METHODS)
    model, train = config.method_config.model, config.method_config.train
    assert (model.api, model.feature_extractor) == ("improved_diffusion", "inception")
    assert model.api_params.improved_diffusion.timestep_respacing == respacing
    assert (train.num_iterations, train.count_threshold) == (iterations, threshold)
    assert set(train.num_samples_schedule) == {60_000} and train.lookahead_degree == 8
    spec, _ = spec_of(config.sensitive_data, "val", config.data_root)
    ledger = Ledger(Budget(epsilon, default_delta(spec.num_train)))
    ledger.adopt([Release("votes", None, num_steps=train.num_iterations)])
    if noise is not None:
        assert ledger.planned("votes").noise_multiplier == pytest.approx(noise, rel=2e-3)
