"""Noisy sums of values that stay in factors: bounded like any other, and equal to those of the written-out vectors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.spec import DataSpec, Samples
from opacus_ext.accounting import Release
from opacus_ext.errors import BudgetExceeded
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.mechanisms import clip_products, clip_rows, sum_clipped_rows
from opacus_ext.noise import NoiseSource
from opacus_ext.outer_products import OuterProducts
from opacus_ext.private_data import PrivateData

ALPHA = 1e-6
ROUNDING = 1 + 1e-12  # everything is in float64
SIDES = (2, 3, 1, 2)  # widths of the factors of two blocks: D = 8

# What a network may make of a record; hypothesis adds nan, inf and subnormal numbers.
VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)


def factors(min_rows: int, max_rows: int = 7):
    row = st.lists(VALUES, min_size=sum(SIDES), max_size=sum(SIDES))
    return st.lists(row, min_size=min_rows, max_size=max_rows).map(of_rows)


def of_rows(rows) -> OuterProducts:
    sides = torch.tensor(rows, dtype=torch.float32).reshape(-1, sum(SIDES)).split(SIDES, dim=1)
    return OuterProducts([(sides[0], sides[1]), (sides[2], sides[3])])


def random_products(count: int, seed: int = 0, size: float = 1.0) -> OuterProducts:
    rng = torch.Generator().manual_seed(seed)
    return of_rows((torch.randn(count, sum(SIDES), generator=rng) * size).tolist())


def some(products: OuterProducts, which) -> OuterProducts:
    return OuterProducts([(left[which], right[which]) for left, right in products.blocks])


def written_out(products: OuterProducts) -> torch.Tensor:
    """(B, D) float64, example by example."""
    return torch.stack(
        [
            torch.cat([torch.outer(left[i].double(), right[i].double()).flatten() for left, right in blocks])
            for i, blocks in ((i, products.blocks) for i in range(len(products.blocks[0][0])))
        ]
    )


def summed(products: OuterProducts, labels, bound=1.0, num_classes=3) -> torch.Tensor:
    return sum_clipped_rows(products, bound, torch.as_tensor(labels, dtype=torch.int64), num_classes)


# ------------------------------------------------------------------------------------------ sums and norms


def test_sums_and_norms_are_those_of_the_vectors():
    products, labels = random_products(9), torch.tensor([0, 2, 2, 0, 0, 2, 0, 2, 2])
    vectors = written_out(products)
    assert products.num_features == vectors.shape[1] == 8
    torch.testing.assert_close(products.norms().double(), vectors.norm(dim=1), rtol=1e-6, atol=0)
    by_hand = torch.stack([vectors[labels == label].sum(0) for label in range(3)])
    torch.testing.assert_close(products.sums(labels, 3).double(), by_hand, rtol=1e-5, atol=1e-6)
    assert not products.sums(labels, 3)[1].any()


def test_a_sum_equals_that_of_the_clipped_vectors():
    """The slow way: every vector written out, and clipped as rows are."""
    products, labels = random_products(20, size=0.8), torch.arange(20) % 3
    vectors = written_out(products)
    norms = vectors.norm(dim=1)
    assert 3 < (norms > 1).sum() < 17
    expected = sum_clipped_rows(vectors, 1.0, labels, 3)
    found = summed(products, labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    by_hand = torch.stack([(vectors / norms.clamp_min(1)[:, None])[labels == k].sum(0) for k in range(3)])
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)


@settings(max_examples=200)
@given(factors(min_rows=1), st.sampled_from([1e-3, 1.0, 50.0]))
def test_no_vector_is_longer_than_the_bound(products, bound):
    """The norm is measured here, whatever the caller believes: huge, subnormal and non-finite factors included."""
    clipped = written_out(clip_products(products, bound))
    assert torch.isfinite(clipped).all()
    assert torch.linalg.vector_norm(clipped, dim=1).max() <= bound * ROUNDING


@settings(max_examples=200)
@given(factors(min_rows=1))
def test_short_vectors_stay_and_long_ones_keep_their_direction(products):
    vectors = written_out(products)
    finite = torch.stack([torch.isfinite(side).all(1) for block in products.blocks for side in block]).all(0)
    vectors = torch.where(finite[:, None], vectors, 0.0)
    norms = torch.linalg.vector_norm(vectors, dim=1)
    expected = torch.where(norms[:, None] > 1, vectors / norms[:, None], vectors)
    torch.testing.assert_close(written_out(clip_products(products, 1.0)), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", range(4))
def test_one_bad_entry_drops_its_record_and_harms_no_other(side, bad):
    """Also where the other factor is zero: 0 * inf is not a number."""
    for other in (0.0, 1.0):
        rows = [[0.1] * 8, [other] * 8, [0.2] * 8]
        products = of_rows(rows)
        [left_or_right for block in products.blocks for left_or_right in block][side][1, 0] = bad
        kept = of_rows([rows[0], rows[2]])
        assert torch.equal(summed(products, [0, 1, 2]), summed(kept, [0, 2]))


def test_float64_factors_beyond_float32_drop_their_record():
    products = OuterProducts([(torch.tensor([[1e100], [1.0]], dtype=torch.float64), torch.ones(2, 1))])
    assert sum_clipped_rows(products, 1.0, torch.tensor([0, 0]), 1).tolist() == [[1.0]]


def test_an_empty_batch_is_a_zero_sum():
    total = summed(random_products(0), [])
    assert total.shape == (3, 8) and not total.any()


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("side", range(4))
def test_factors_of_another_number_of_records_are_refused(side, rows):
    """One row would otherwise be spread over all records, and many records could hide in one."""
    sides = [torch.ones(4, width) for width in SIDES]
    sides[side] = torch.ones(rows, SIDES[side])
    with pytest.raises(ValueError, match="for 4 records"):
        summed(OuterProducts([(sides[0], sides[1]), (sides[2], sides[3])]), [0, 1, 2, 0])
    with pytest.raises(ValueError, match="for 4 records"):
        summed(OuterProducts([(torch.ones(4, 2, 2), torch.ones(4, 2))]), [0, 1, 2, 0])


def test_a_class_of_its_own_norms_is_not_believed():
    class Humble(OuterProducts):
        def norms(self):
            return torch.zeros(len(self.blocks[0][0]))

    total = summed(Humble(random_products(1, size=100.0).blocks), [0])
    assert total.norm().item() == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------ through PrivateData


def private_of(products: OuterProducts, plan, labels, epsilon=math.inf, noise=None, num_classes=3):
    """PrivateData whose i-th record stands for the i-th vector of `products`; fn `read` gives it back."""
    count = len(labels)
    pixels = np.zeros((count, 3, 2, 2), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    ledger = Ledger(Budget(epsilon, 1e-5))
    ledger.adopt(plan)
    spec = DataSpec("values", 2, 3, num_classes, max(2, count), tuple("abc"[:num_classes]))
    samples = Samples(pixels, np.asarray(labels, np.int64))
    private = PrivateData(samples, spec, ledger, noise or NoiseSource(0), batch_size=4)
    return private, lambda x, _: some(products, ((x[:, 0, 0, 0] + 1) * 127.5).round().long() % max(1, count))


def release_of(products, labels, mechanism="noisy_sum", rate=1.0, **more):
    private, read = private_of(products, [Release("sum", 1.0, sample_rate=rate)], labels, **more)
    return getattr(private, mechanism)("sum", read, 0.5, by_class=True).double(), private


@settings(max_examples=100)
@given(factors(min_rows=2, max_rows=9), st.data())
def test_a_record_moves_a_sum_by_at_most_the_bound(products, data):
    count = len(products.blocks[0][0])
    labels = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    left_out = data.draw(st.integers(0, count - 1))
    rest = [i for i in range(count) if i != left_out]
    whole, _ = release_of(products, labels)
    without, _ = release_of(some(products, rest), [labels[i] for i in rest])
    assert torch.isfinite(whole).all()
    assert (whole - without).norm() <= 0.5 * (1 + 1e-5)  # the answer itself is float32


def test_a_sum_over_batches_is_that_of_all_records():
    products, labels = random_products(11), [0, 1, 2, 0, 0, 0, 2, 2, 1, 0, 2]
    found, _ = release_of(products, labels)
    torch.testing.assert_close(found, summed(products, labels, 0.5), rtol=1e-6, atol=1e-6)


def test_a_sampled_sum_is_that_of_the_records_that_are_drawn():
    products, labels = random_products(11), np.arange(11) % 3
    found, _ = release_of(products, labels, "sampled_noisy_sum", rate=0.5)
    drawn = NoiseSource(0).sample(11, 0.5, "sum", 0)
    expected = summed(some(products, drawn), labels[drawn.numpy()], 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_noise_is_the_multiplier_times_the_bound_on_every_entry():
    """One class is empty; its row is noise alone."""
    count, width = 6, 400
    sides = torch.full((count, 1), 0.001), torch.ones(count, width)
    products = OuterProducts([sides, sides])
    found, private = release_of(products, [0, 0, 0, 2, 2, 2], epsilon=10.0)
    residual = (found - summed(products, [0, 0, 0, 2, 2, 2], 0.5)) / 0.5
    assert found.shape == (3, 2 * width)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], residual.numel()) / residual.numel()
    assert low < residual.square().mean().item() < high
    assert stats.kstest(residual.flatten().numpy(), "norm").pvalue > ALPHA
    assert private.ledger.complete
    with pytest.raises(BudgetExceeded):
        private.noisy_sum("sum", lambda x, y: pytest.fail("a record was shown"), 0.5)


def test_factors_and_vectors_are_clipped_alike():
    products = random_products(8, size=3.0)
    torch.testing.assert_close(
        written_out(clip_products(products, 0.7)).float(),
        clip_rows(written_out(products), 0.7),
        rtol=1e-5,
        atol=1e-6,
    )
