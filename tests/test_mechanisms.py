"""Clipping, and PrivateData: what any function may get out of it, and for what price."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.spec import DataSpec, Samples
from opacus_ext import private_data
from opacus_ext.accounting import Release, noisy_max_release
from opacus_ext.disclosure import Disclosure
from opacus_ext.errors import BudgetExceeded, UnplannedRelease
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.mechanisms import clip_rows, sum_clipped_rows, vote_sum
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils.errors import UserError

ALPHA = 1e-6
SUM = Release("sum", 1.0)
ROUNDING = 1 + 1e-5

# Values that a record may have or a network may make of it; hypothesis adds nan, inf and subnormal numbers.
VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)


def matrices(min_rows: int = 0, max_rows: int = 6):
    def of_width(width: int):
        row = st.lists(VALUES, min_size=width, max_size=width)
        return st.lists(row, min_size=min_rows, max_size=max_rows)

    return st.integers(1, 4).flatmap(of_width)


def private_of(values: torch.Tensor, plan, labels=None, num_classes=1, epsilon=math.inf, noise=None):
    """PrivateData whose i-th record stands for the i-th row of `values`; fn `read` gives that row back, and one of them
    for any other image."""
    count = len(values)
    labels = np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)
    pixels = np.zeros((count, 3, 2, 2), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    ledger = Ledger(Budget(epsilon, 1e-5))
    ledger.adopt(plan)
    names = tuple(str(label) for label in range(num_classes))
    spec = DataSpec("values", 2, 3, num_classes, max(2, count), names)
    private = PrivateData(Samples(pixels, labels), spec, ledger, noise or NoiseSource(0), batch_size=4)

    def read(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return values[((images[:, 0, 0, 0] + 1) * 127.5).round().long() % max(1, count)]

    return private, read


# ------------------------------------------------------------------------------------------ clipping


@settings(deadline=None, max_examples=200)
@given(matrices(min_rows=1), st.sampled_from([1e-3, 1.0, 50.0]))
def test_no_row_is_longer_than_the_bound(rows, bound):
    clipped = clip_rows(torch.tensor(rows), bound)
    assert torch.isfinite(clipped).all()
    assert torch.linalg.vector_norm(clipped.double(), dim=1).max() <= bound * ROUNDING


@settings(deadline=None, max_examples=200)
@given(matrices(min_rows=1))
def test_short_rows_stay_and_long_rows_keep_their_direction(rows):
    values = torch.tensor(rows)
    values = torch.where(torch.isfinite(values).all(1, keepdim=True), values, 0.0).double()
    norms = torch.linalg.vector_norm(values, dim=1)
    clipped = clip_rows(values.float(), 1.0).double()
    torch.testing.assert_close(clipped[norms <= 1], values[norms <= 1], rtol=1e-6, atol=1e-30)
    long = norms > 1
    torch.testing.assert_close(clipped[long], values[long] / norms[long, None], rtol=1e-5, atol=1e-30)


def test_a_row_with_one_bad_entry_becomes_zero_and_harms_no_other():
    values = torch.tensor([[3.0, 4.0], [math.nan, 0.0], [0.0, math.inf], [0.3, 0.4]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.3, 0.4]])
    torch.testing.assert_close(clip_rows(values, 1.0), expected)


def test_images_are_clipped_over_all_their_axes():
    clipped = clip_rows(torch.full((2, 3, 4, 4), 10.0), 1.0)
    assert clipped.shape == (2, 48)
    torch.testing.assert_close(clipped.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_bound_holds_in_every_precision(dtype):
    values = torch.tensor([[3e4, 3e4, 1.0], [1e-3, 0.0, 0.0]], dtype=dtype)
    clipped = clip_rows(values, 1.0)
    assert clipped.dtype == torch.float32
    assert clipped.norm(dim=1).max() <= ROUNDING
    torch.testing.assert_close(clipped[1], values[1].float())


def test_an_empty_batch_is_a_zero_sum():
    total = sum_clipped_rows(torch.zeros(0, 5), 1.0, torch.zeros(0, dtype=torch.int64), 2)
    assert total.shape == (2, 5) and not total.any()


def test_rows_are_summed_by_group():
    values = torch.tensor([[1.0], [0.5], [9.0], [0.25]])
    total = sum_clipped_rows(values, 1.0, torch.tensor([0, 1, 1, 0]), 3)
    assert total.dtype == torch.float64 and total.flatten().tolist() == [1.25, 1.5, 0.0]


def test_votes_are_counted_by_group_and_unknown_bins_refused():
    votes, groups = torch.tensor([[0, 2], [1, 2], [2, 0]]), torch.tensor([0, 1, 0])
    assert vote_sum(votes, math.sqrt(2), groups, 2, 3).tolist() == [[2, 0, 2], [0, 1, 1]]
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=r"0\.\.2"):
            vote_sum(torch.tensor([[0, bad]]), math.sqrt(2), groups[:1], 1, 3)


def test_no_votes_give_a_zero_histogram():
    nobody = torch.zeros(0, dtype=torch.int64)
    total = vote_sum(nobody.view(0, 2), math.sqrt(2), nobody, 2, 5)
    assert total.shape == (2, 5) and not total.any()


def test_votes_that_belong_to_no_record_are_refused():
    with pytest.raises(ValueError, match="votes of 3 records for 2"):
        vote_sum(torch.tensor([[0], [1], [1]]), 1.0, torch.tensor([0, 0]), 1, 2)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=7), st.data())
def test_counting_votes_equals_the_sum_of_clipped_rows(votes, data):
    """The dense way: a row of all bins per record, clipped to the bound."""
    votes = torch.tensor(votes)
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(votes), max_size=len(votes))))
    rows = torch.zeros(len(votes), 7).scatter_add_(1, votes, torch.ones(votes.shape))
    dense = sum_clipped_rows(rows, 2.0, groups, 3)
    torch.testing.assert_close(vote_sum(votes, 2.0, groups, 3, 7), dense, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------ sensitivity


def clean_sum(values, labels, bound, by_class, num_classes=3):
    """What `noisy_sum` adds noise to, observed where the plan has no noise."""
    private, read = private_of(values, [SUM], labels, num_classes)
    return private.noisy_sum("sum", read, bound, by_class=by_class).double()


@settings(deadline=None, max_examples=100)
@given(matrices(min_rows=2, max_rows=9), st.data(), st.booleans())
def test_a_record_moves_a_sum_by_at_most_the_bound(rows, data, by_class):
    values = torch.tensor(rows)
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    left_out = data.draw(st.integers(0, len(rows) - 1))
    rest = [i for i in range(len(rows)) if i != left_out]
    whole = clean_sum(values, labels, 0.5, by_class)
    without = clean_sum(values[rest], [labels[i] for i in rest], 0.5, by_class)
    assert torch.isfinite(whole).all()
    assert (whole - without).norm() <= 0.5 * ROUNDING


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=7), st.booleans())
def test_a_record_moves_a_histogram_by_at_most_the_bound(votes, by_class):
    """Also where it votes three times for one bin: then each vote counts for less than one."""

    def histogram(rows):
        private, read = private_of(torch.tensor(rows), [SUM], np.arange(len(rows)) % 2, 2)
        return private.noisy_histogram("sum", read, 5, 3, by_class=by_class)

    moved = (histogram(votes) - histogram(votes[:-1])).norm()
    assert moved <= math.sqrt(3) * ROUNDING
    if len(set(votes[-1])) == 3:
        assert moved == pytest.approx(math.sqrt(3), rel=1e-5)


def test_sums_are_right():
    values = torch.tensor([[0.1, 0.2], [0.3, 0.0], [30.0, 40.0], [0.0, 0.5], [0.0, 0.1]])  # two batches
    assert clean_sum(values, [0] * 5, 1.0, False).tolist() == pytest.approx([1.0, 1.6], abs=1e-6)
    by_class = clean_sum(values, [0, 2, 2, 0, 0], 1.0, True)
    torch.testing.assert_close(by_class, torch.tensor([[0.1, 0.8], [0, 0], [0.9, 0.8]], dtype=torch.float64))


def test_a_function_that_mixes_up_its_rows_is_refused():
    """A value that no single record owns cannot be clipped."""
    for wrong in (lambda x, y: x.flatten(1).mean(0, keepdim=True), lambda x, y: torch.cat([x, x]).flatten(1)):
        private, _ = private_of(torch.zeros(4, 1), [SUM])
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            private.noisy_sum("sum", wrong, 1.0)


# ------------------------------------------------------------------------------------------ noise


def repeated(num_queries: int, query, noise=None, epsilon=3.0, **options):
    plan = [Release("sum", None, num_steps=num_queries)]
    private, read = private_of(torch.full((5, 1000), 0.001), plan, epsilon=epsilon, noise=noise, **options)
    answers = torch.stack([query(private, read) for _ in range(num_queries)]).double()
    return answers, private.ledger.planned("sum").noise_multiplier


@pytest.mark.parametrize("bound", [0.5, 20.0])
def test_noise_of_a_sum_is_the_multiplier_times_the_bound(bound):
    answers, multiplier = repeated(40, lambda private, read: private.noisy_sum("sum", read, bound))
    residual = (answers - 5 * 0.001) / (multiplier * bound)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], residual.numel()) / residual.numel()
    assert low < residual.square().mean().item() < high
    assert stats.kstest(residual.flatten().numpy(), "norm").pvalue > ALPHA
    assert torch.corrcoef(residual)[~torch.eye(40, dtype=bool)].abs().max() < 0.2  # answers share no noise


def test_noise_covers_every_bin_and_class_also_the_empty_ones():
    plan = [Release("sum", 3.0)]
    votes = torch.zeros((5, 2), dtype=torch.int64)
    private, read = private_of(votes, plan, num_classes=20, epsilon=10.0)
    answer = private.noisy_histogram("sum", read, 500, 2, by_class=True).double()
    assert answer.shape == (20, 500)
    residual = answer[1:] / (3.0 * math.sqrt(2))
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], residual.numel()) / residual.numel()
    assert low < residual.square().mean().item() < high


def test_unseeded_results_differ_between_calls_and_runs():
    def query(private, read):
        return private.noisy_sum("sum", read, 1.0)

    one, _ = repeated(2, query, NoiseSource())
    other, _ = repeated(2, query, NoiseSource())
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_private_data_draws_unseeded_noise_by_default(samples, spec):
    ledger = Ledger(Budget(5.0, 1e-5))
    ledger.adopt([SUM])
    assert PrivateData(samples, spec, ledger).report()["noise_seeded"] is False
    assert PrivateData(samples, spec, ledger, NoiseSource(1)).report()["noise_seeded"] is True


# ------------------------------------------------------------------------------------------ the boundary


def test_there_is_no_way_to_hold_the_records():
    private, _ = private_of(torch.zeros(3, 1), [SUM])
    for access in (lambda: private[0], lambda: len(private), lambda: iter(private), lambda: 0 in private):
        with pytest.raises(TypeError):
            access()
    shown = {name for name in dir(private) if not name.startswith("_")}
    assert shown == {
        "spec", "ledger", "device", "noisy_sum", "sampled_noisy_sum", "noisy_histogram", "report_noisy_max", "map",
        "report",
    }  # fmt: skip


def test_reveal_waits_for_the_end_and_is_reported():
    private, read = private_of(torch.zeros(3, 1), [SUM])
    records = Samples(np.zeros((3, 3, 2, 2), np.uint8), np.zeros(3, np.int64))
    door = Disclosure(records, private.ledger)
    with pytest.raises(UnplannedRelease, match="before training has finished"):
        door.reveal("a look")
    assert private.report()["revealed"] == []
    private.noisy_sum("sum", read, 1.0)
    assert door.reveal("a look") is records
    assert private.report()["revealed"] == ["a look"]


def test_unplanned_and_surplus_queries_are_refused_before_a_record_is_read():
    private, read = private_of(torch.zeros(3, 1), [SUM, noisy_max_release("max", 1.0, "add_or_remove_one")])
    private.noisy_sum("sum", read, 1.0)
    private.report_noisy_max("max", lambda x, y: torch.ones(len(x), 2))

    def never(images, labels):
        raise AssertionError("a record was shown")

    with pytest.raises(UnplannedRelease):
        private.noisy_sum("other", never, 1.0)
    with pytest.raises(UnplannedRelease):
        private.sampled_noisy_sum("other", never, 1.0)
    with pytest.raises(BudgetExceeded):
        private.noisy_sum("sum", never, 1.0)
    with pytest.raises(BudgetExceeded):
        private.noisy_histogram("sum", never, 3, 1)
    with pytest.raises(BudgetExceeded):
        private.report_noisy_max("max", never)


@pytest.mark.parametrize(
    "mechanism", ["noisy_sum", "sampled_noisy_sum", "noisy_histogram", "report_noisy_max"]
)
def test_a_failed_query_stays_booked_and_cannot_be_repeated(mechanism):
    """Retrying until it works would turn one planned answer into many."""
    private, _ = private_of(torch.zeros(3, 1), [SUM, noisy_max_release("max", 1.0, "add_or_remove_one")])

    def fail(images, labels):
        raise RuntimeError("out of memory")

    def query():
        if mechanism == "noisy_sum":
            return private.noisy_sum("sum", fail, 1.0)
        if mechanism == "sampled_noisy_sum":
            return private.sampled_noisy_sum("sum", fail, 1.0)
        if mechanism == "noisy_histogram":
            return private.noisy_histogram("sum", fail, 3, 1)
        return private.report_noisy_max("max", fail)

    with pytest.raises(RuntimeError, match="out of memory"):
        query()
    with pytest.raises(BudgetExceeded):
        query()
    assert private.ledger.executed("max" if mechanism == "report_noisy_max" else "sum") == 1


def test_wrong_votes_end_the_query_without_a_result():
    private, read = private_of(torch.full((3, 1), 7), [SUM])
    with pytest.raises(IndexError):
        private.noisy_histogram("sum", read, 5, 1)
    assert private.ledger.executed("sum") == 1


def test_a_sampled_release_refuses_a_sum_over_all_records():
    private, read = private_of(torch.zeros(3, 1), [Release("sum", 1.0, sample_rate=0.5)])
    with pytest.raises(UnplannedRelease, match=r"sample_rate 0\.5"):
        private.noisy_sum("sum", read, 1.0)


def test_a_truncated_release_refuses_a_sum_over_all_records():
    """Also at sample_rate 1, where it is charged for some of the records alone."""
    private, read = private_of(torch.zeros(3, 1), [Release("sum", 1.0, max_batch_size=2, num_records=3)])
    with pytest.raises(UnplannedRelease, match="max_batch_size 2"):
        private.noisy_sum("sum", read, 1.0)


@pytest.mark.parametrize("mechanism", ["noisy_sum", "sampled_noisy_sum"])
def test_a_noisy_max_release_covers_no_sum(mechanism):
    """It is charged 1 / multiplier in pure epsilon, which Gaussian noise of that size does not give."""
    private, read = private_of(
        torch.zeros(3, 1), [noisy_max_release("max", 0.1, "add_or_remove_one")], epsilon=1.0
    )
    with pytest.raises((UnplannedRelease, AssertionError)):
        getattr(private, mechanism)("max", read, 1.0)


def test_a_gaussian_release_covers_no_noisy_max():
    private, _ = private_of(torch.zeros(3, 1), [SUM])
    with pytest.raises((UnplannedRelease, AssertionError)):
        private.report_noisy_max("sum", lambda x, y: torch.ones(len(x), 2))


def test_map_processes_each_image_once():
    private, _ = private_of(torch.zeros(7, 1), [Release("sum", 1.0, num_steps=2)])
    seen = []

    def kept(images):
        seen.append(len(images))
        return images

    mapped = private.map(kept)
    assert seen == []
    for _ in range(2):
        mapped.noisy_sum("sum", lambda x, y: x[:, 0, :1, 0], 1.0)
    tried_on_public = (3 + 3 * 2) + 3  # whether three mix, and what the first question is tried on
    assert sum(seen) == tried_on_public + 4 + 4


def normalised(images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """A network in training mode: bounding each row then bounds nothing."""
    return torch.nn.BatchNorm1d(1, affine=False)(images.flatten(1)[:, :1])


def against_the_first(images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Rows that keep their value when any but the first is left out."""
    return images.flatten(1)[:, :1] - images.flatten(1)[:1, :1]


def within_a_class(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    values = images.flatten(1)[:, :1]
    return values - torch.stack([values[labels == label].mean(0) for label in labels])


def across_classes(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rows that keep their value while all records are of one class."""
    values = images.flatten(1)[:, :1]
    others = (labels[:, None] != labels).to(values.dtype)
    return values - others @ values / others.sum(1, keepdim=True).clamp_min(1)


def against_the_last(images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    values = images.flatten(1).sum(1, keepdim=True)  # one pixel of the last two public images is the same
    return values - values[-1:]


def against_the_brightest(images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    brightness = images.flatten(1).sum(1, keepdim=True)
    return brightness + 0.001 - brightness.max()


def against_the_darkest(images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    brightness = images.flatten(1).sum(1, keepdim=True)
    return brightness - 0.001 - brightness.min()


BY_CLASS = (within_a_class, across_classes)
MIXING = [
    normalised,
    against_the_first,
    against_the_last,
    against_the_brightest,
    against_the_darkest,
    *BY_CLASS,
]
QUERIES = {
    "noisy_sum": lambda private, fn: private.noisy_sum("sum", fn, 1.0),
    "sampled_noisy_sum": lambda private, fn: private.sampled_noisy_sum("sum", fn, 1.0),
    "map": lambda private, fn: private.map(fn).noisy_sum("sum", lambda x, y: x, 1.0),
    "noisy_histogram": lambda private, fn: private.noisy_histogram(
        "sum", lambda *r: (fn(*r) > 0).long(), 2, 1
    ),
    "report_noisy_max": lambda private, fn: private.report_noisy_max("max", lambda *r: fn(*r) > 0),
}


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("query", QUERIES)
def test_functions_that_mix_records_are_refused_before_a_record_is_read(query, mixing):
    """Whether a run ends with an error must tell nothing of the records: functions are tried on public images."""
    if query == "map" and mixing in BY_CLASS:
        pytest.skip("a map is given no labels")
    plan = [SUM, noisy_max_release("max", 1.0, "add_or_remove_one")]
    private, _ = private_of(torch.zeros(9, 1), plan, np.arange(9) % 2, num_classes=2)

    class Hidden:
        def __getitem__(self, which):
            raise AssertionError("a record was shown")

    private._records._images = Hidden()
    with pytest.raises(UserError, match="depends on another"):
        QUERIES[query](private, mixing)


@pytest.mark.parametrize("query", ["noisy_sum", "sampled_noisy_sum", "map"])
def test_functions_that_mix_records_a_little_are_refused(query):
    """By a twelfth, as the number of records may: more than any rounding."""
    private, _ = private_of(torch.zeros(9, 1), [SUM], np.arange(9) % 2, num_classes=2)
    with pytest.raises(UserError, match="depends on another"):
        QUERIES[query](private, lambda images, labels=None: images.flatten(1)[:, :1] * (10 + len(images)))


@pytest.mark.parametrize("query", QUERIES)
def test_functions_of_one_record_are_not_refused(query):
    plan = [SUM, noisy_max_release("max", 1.0, "add_or_remove_one")]
    private, _ = private_of(torch.zeros(9, 1), plan, np.arange(9) % 2, num_classes=2)
    QUERIES[query](private, lambda images, labels=None: images.flatten(1)[:, :1] * 2 + 1)


@pytest.mark.parametrize("query", ["map", "noisy_histogram", "report_noisy_max"])
def test_choices_are_always_computed_for_the_same_number_of_records(query):
    """Libraries round by the size of what they are given: one record more could move what all others choose."""

    def sizes(num_records: int) -> set[int]:
        plan = [SUM, noisy_max_release("max", 1.0, "add_or_remove_one")]
        private, _ = private_of(torch.zeros(num_records, 1), plan, np.arange(num_records) % 2, num_classes=2)
        private._records.batch_size = 4  # as follows from the public number of records, which both sets have
        seen = []

        def fn(images, labels=None):
            seen.append(len(images))
            return images.flatten(1)[:, :1]

        QUERIES[query](private, fn)
        return set(seen)

    assert sizes(8) == sizes(9) == sizes(11)


def test_map_changes_the_images_and_keeps_ledger_and_noise():
    private, _ = private_of(torch.zeros(3, 1), [Release("sum", 1.0, num_steps=2)])
    halved = private.map(lambda images: images[:, :1] / 2)
    assert halved.ledger is private.ledger
    before = private.noisy_sum("sum", lambda x, y: x[:, 0, :1, 0], 1000.0)
    after = halved.noisy_sum("sum", lambda x, y: x[:, 0, :1, 0], 1000.0)
    torch.testing.assert_close(after, before / 2)
    with pytest.raises(BudgetExceeded):
        private.noisy_sum("sum", lambda x, y: x, 1.0)
    private.ledger.revealed.append("a look")
    assert halved.report()["revealed"] == ["a look"]


# ------------------------------------------------------------------------------------------ sampled sums


def sampled(values, rate, steps=1, labels=None, num_classes=1, **options):
    plan = [Release("sum", 1.0, sample_rate=rate, num_steps=steps)]
    private, read = private_of(values, plan, labels, num_classes, **options)
    return private, lambda bound=1.0, **by: private.sampled_noisy_sum("sum", read, bound, **by)


def test_a_sampled_sum_is_that_of_the_records_that_the_noise_source_draws():
    """The same secret masks as in DP-SGD: a fresh one at every step, over several batches."""
    private, query = sampled(torch.eye(11), 0.5, steps=3)
    read, samples = [], []
    take = private._records.take
    private._records.take = lambda which: (read.extend(which.tolist()), take(which))[1]
    for step in range(3):
        read.clear()
        drawn = NoiseSource(0).sample(11, 0.5, "sum", step)
        torch.testing.assert_close(query(), torch.eye(11)[drawn].sum(0))
        assert read == drawn.tolist()  # those left out are not even looked at
        samples.append(tuple(read))
    assert len(set(samples)) == 3


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_records_enter_sampled_sums_at_the_planned_rate_one_by_one(rate):
    _, query = sampled(torch.eye(40), rate, steps=200)
    inclusion = torch.stack([query() for _ in range(200)])
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], inclusion.numel(), rate)
    assert low <= inclusion.sum().item() <= high
    sizes = inclusion.sum(1)  # of a Poisson sample they are binomial, not fixed
    assert sizes.var().item() == pytest.approx(40 * rate * (1 - rate), rel=0.5)


@settings(deadline=None, max_examples=60)
@given(matrices(min_rows=2, max_rows=9), st.data(), st.booleans())
def test_a_record_moves_a_sampled_sum_by_at_most_the_bound(rows, data, by_class):
    """The last record, so that all others are sampled as before: neighbours are coupled record by record."""
    values = torch.tensor(rows)
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    _, query = sampled(values, 0.6, labels=labels, num_classes=3)
    _, query_without = sampled(values[:-1], 0.6, labels=labels[:-1], num_classes=3)
    moved = query(0.5, by_class=by_class).double() - query_without(0.5, by_class=by_class).double()
    assert torch.isfinite(moved).all()
    assert moved.norm() <= 0.5 * ROUNDING


def test_a_sampled_sum_has_the_planned_noise_even_for_an_empty_sample():
    """One class is empty, and so are most samples."""
    values = torch.full((5, 2000), 0.001)
    private, query = sampled(values, 1e-6, labels=[0, 0, 2, 2, 2], num_classes=3, epsilon=10.0, steps=10)
    answers = torch.stack([query(7.0, by_class=True) for _ in range(10)]).double()
    assert answers.shape == (10, 3, 2000)
    residual = answers / 7.0
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], residual.numel()) / residual.numel()
    assert low < residual.square().mean().item() < high
    assert torch.corrcoef(residual.flatten(1))[~torch.eye(10, dtype=bool)].abs().max() < 0.1
    assert private.ledger.complete


def test_a_sampled_sum_at_rate_one_is_the_sum():
    _, query = sampled(torch.full((9, 2), 0.25), 1.0)
    assert query().tolist() == [2.25, 2.25]


def test_a_sampled_sum_takes_one_planned_step_and_no_more():
    private, query = sampled(torch.zeros(3, 1), 0.5, steps=2)
    query()
    query()
    private._records.take = lambda which: pytest.fail("a record was read")
    with pytest.raises(BudgetExceeded):
        query()


def test_a_truncated_release_refuses_a_sampled_sum():
    plan = [Release("sum", 1.0, sample_rate=0.5, max_batch_size=2, num_records=3)]
    private, read = private_of(torch.zeros(3, 1), plan)
    with pytest.raises(UnplannedRelease, match="max_batch_size 2"):
        private.sampled_noisy_sum("sum", read, 1.0)


def test_a_truncated_release_planned_for_other_records_takes_no_sample():
    """What truncation costs hangs on their number."""
    plan = [Release("sum", 1.0, sample_rate=0.5, max_batch_size=2, num_records=300)]
    private, _ = private_of(torch.zeros(3, 1), plan)
    with pytest.raises(UnplannedRelease, match=r"300 .* 3"):
        private._records.sampled_indices(private.ledger.planned("sum"), 0)


# ------------------------------------------------------------------------------------------ noisy max


def choose(votes, epsilon, seed=0):
    plan = [noisy_max_release("max", epsilon, "add_or_remove_one")]
    private, read = private_of(votes, plan, epsilon=epsilon, noise=NoiseSource(seed))
    return private.report_noisy_max("max", read)


def test_noisy_max_takes_the_best_when_noise_is_small():
    votes = torch.tensor(
        [[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    )
    assert [choose(votes, math.inf), choose(votes, 1000.0)] == [1, 1]


def test_noisy_max_gives_every_record_one_vote_at_most():
    """Three records for candidate 1; one shouts for candidate 0, one against candidate 1, one is not a number."""
    votes = torch.tensor(
        [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1e9, 0.0], [0.0, -1e9], [math.nan, math.nan], [math.inf, 0.0]]
    )
    assert choose(votes, math.inf) == 1


def test_noisy_max_hesitates_when_noise_is_large():
    votes = torch.tensor([[1.0, 0.0]] * 3)
    chosen = [choose(votes, 0.01, seed) for seed in range(60)]
    assert 10 < sum(chosen) < 50


def test_the_winner_is_found_before_votes_are_rounded(monkeypatch):
    """2^24 and 2^24 + 1 are one number in float32."""
    private, _ = private_of(torch.zeros(1, 1), [noisy_max_release("choice", math.inf, "add_or_remove_one")])
    votes = torch.tensor([[2.0**24, 2.0**24 + 1]], dtype=torch.float64)
    monkeypatch.setattr(
        private_data,
        "_ballots",
        lambda fn, images, _: torch.cat([votes, votes.new_zeros(len(images) - 1, 2)]),
    )
    assert private.report_noisy_max("choice", None) == 1


def test_noisy_max_keeps_its_promise():
    """P(the same answer) changes by at most e^epsilon when a record joins: empirically, with room for chance."""
    epsilon, rounds = 1.0, 3000
    without = [choose(torch.tensor([[1.0, 0.0]]), epsilon, seed) for seed in range(rounds)]
    joined = [
        choose(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), epsilon, rounds + seed) for seed in range(rounds)
    ]
    assert 0 < sum(without) < sum(joined)
    assert sum(joined) / sum(without) < math.exp(epsilon) * 1.1


def test_noisy_max_refuses_more_ballots_than_records():
    private, _ = private_of(torch.zeros(3, 1), [noisy_max_release("max", 1.0, "add_or_remove_one")])
    with pytest.raises((RuntimeError, ValueError, AssertionError, IndexError)):
        private.report_noisy_max("max", lambda x, y: torch.ones(100 * len(x), 2))


# ------------------------------------------------------------------------------------------ the checks catch mutants


def test_missing_clipping_is_caught(monkeypatch):
    def unclipped(values, bound, groups, num_groups):
        return sum_clipped_rows(values, 1e9, groups, num_groups)

    def unscaled(votes, bound, groups, num_groups, num_bins):
        return vote_sum(votes, 1e9, groups, num_groups, num_bins)

    monkeypatch.setattr("opacus_ext.private_data.sum_clipped_rows", unclipped)
    monkeypatch.setattr("opacus_ext.private_data.vote_sum", unscaled)
    with pytest.raises(AssertionError):
        test_a_record_moves_a_sum_by_at_most_the_bound()
    with pytest.raises(AssertionError):
        test_a_record_moves_a_histogram_by_at_most_the_bound()
    with pytest.raises(AssertionError):
        test_a_record_moves_a_sampled_sum_by_at_most_the_bound()


@pytest.mark.parametrize("factor", [0.5, 0.97])
def test_too_little_noise_is_caught(monkeypatch, factor):
    stated = NoiseSource.gaussian

    def weak(self, size, std, *where):
        return stated(self, size, std * factor, *where)

    monkeypatch.setattr(NoiseSource, "gaussian", weak)
    with pytest.raises(AssertionError):
        test_noise_of_a_sum_is_the_multiplier_times_the_bound(0.5)
    with pytest.raises(AssertionError):
        test_a_sampled_sum_has_the_planned_noise_even_for_an_empty_sample()


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_another_sampling_rate_is_caught(monkeypatch, factor):
    stated = NoiseSource.sample

    def off(self, num_records, rate, *where):
        return stated(self, num_records, rate * factor, *where)

    monkeypatch.setattr(NoiseSource, "sample", off)
    with pytest.raises(AssertionError):
        test_records_enter_sampled_sums_at_the_planned_rate_one_by_one(0.7)


def test_a_sample_used_twice_is_caught(monkeypatch):
    stated = NoiseSource.sample
    monkeypatch.setattr(
        NoiseSource,
        "sample",
        lambda self, num, rate, name, step, *size: stated(self, num, rate, name, 0, *size),
    )
    with pytest.raises(AssertionError):
        test_a_sampled_sum_is_that_of_the_records_that_the_noise_source_draws()


def test_a_result_before_its_booking_is_caught(monkeypatch):
    def unbooked(self, name, fn, l2_bound, by_class=False):
        images, labels = self._records.take(slice(None))
        values = fn(images, labels)
        self.ledger.book(name)
        return values

    monkeypatch.setattr(PrivateData, "noisy_sum", unbooked)
    with pytest.raises(AssertionError, match="a record was shown"):
        test_unplanned_and_surplus_queries_are_refused_before_a_record_is_read()
