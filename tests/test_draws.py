"""Position-addressed randomness: what a position is dealt depends on key, call and position, and on nothing else."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from opacus_ext.noise import NoiseSource
from utils.draws import Draws, philox
from utils.runtime import Runtime

KEY = bytes(range(32))
ALPHA = 1e-6


def all_draws(draws: Draws) -> list[torch.Tensor]:
    """The calls that a loss makes, in its order."""
    return [draws.uniform(), draws.normal(3), draws.normal(3, 1, 2, 2)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 70), st.lists(st.integers(0, 70), max_size=6))
def test_any_cutting_deals_the_same(size, cuts):
    whole = Draws(KEY, 0, size)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    parts = [all_draws(whole[a:b]) for a, b in itertools.pairwise(edges)]
    for at_once, pieces in zip(all_draws(whole), zip(*parts, strict=True), strict=True):
        assert torch.equal(at_once, torch.cat(pieces))


def test_a_part_of_a_part_keeps_its_positions():
    """As a process takes its share of a batch, and a retry half of a chunk."""
    share = Draws(KEY, 0, 100)[37:90]
    assert len(share) == 53
    assert torch.equal(share[20:41][3:].normal(), Draws(KEY, 0, 100).normal()[60:78])
    assert torch.equal(Draws(KEY, 57, 60).normal(), Draws(KEY, 0, 100).normal()[57:60])


def test_more_positions_leave_the_first_as_they_are():
    draws = Draws(KEY, 0, 40)[5:9]
    assert len(draws.stretched(70)) == 70
    assert torch.equal(draws.stretched(70).normal(3)[:4], draws.normal(3))


def test_a_retry_is_dealt_the_same():
    draws = Draws(KEY, 5, 30)
    used = draws[2:9]
    first = all_draws(used)
    assert all(torch.equal(a, b) for a, b in zip(first, all_draws(draws[2:9]), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, all_draws(used), strict=True))  # its later calls


def test_empty_ranges_deal_nothing():
    for empty in (Draws(KEY, 0, 0), Draws(KEY, 16, 16), Draws(KEY, 0, 40)[20:20], Draws(KEY, 0, 40)[30:10]):
        assert len(empty) == 0
        assert empty.normal(2, 3).shape == (0, 2, 3) and empty.uniform().shape == (0,)


def test_positions_calls_and_keys_share_nothing():
    """Every number of 40 positions, 3 calls and 2 keys occurs once."""
    parts = [Draws(key, 0, 40) for key in (KEY, KEY[::-1])]
    values = torch.cat([draws.normal(5).flatten() for draws in parts for _ in range(3)])
    assert len(values.unique()) == 40 * 5 * 3 * 2


@pytest.mark.parametrize("byte", [0, 15, 31])
def test_every_byte_of_the_key_counts(byte):
    """Torch's own generator for the CPU would look at 32 bits."""
    assert not torch.equal(Draws(KEY, 0, 4).normal(), Draws(another(KEY, byte), 0, 4).normal())


@pytest.mark.parametrize("byte", range(16))
def test_every_byte_counts_in_the_generator_of_noise(byte):
    assert philox(KEY[:16]).random() != philox(another(KEY[:16], byte)).random()


def another(key: bytes, byte: int) -> bytes:
    """The same key but for one bit."""
    return bytes(value ^ (index == byte) for index, value in enumerate(key))


def test_normal_draws_are_standard_normal_and_uniform_ones_uniform():
    normal, uniform = Draws(KEY, 3, 5003).normal(20), Draws(KEY, 3, 5003).uniform(20)
    assert normal.dtype == uniform.dtype == torch.float32
    assert stats.kstest(normal.flatten().double(), "norm").pvalue > ALPHA
    assert stats.kstest(uniform.flatten().double(), "uniform").pvalue > ALPHA
    assert uniform.min() >= 0 and uniform.max() < 1
    bound = stats.norm.ppf(1 - ALPHA / 2) / math.sqrt(5000)
    assert abs(torch.corrcoef(normal[:, :2].T)[0, 1]) < bound  # draws of one example
    assert abs(torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]) < bound  # neighbours


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    all_draws(Draws(KEY, 0, 20))
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------ whose they are


def test_public_draws_repeat_by_seed_and_name():
    def dealt(seed, name):
        return Runtime(seed=seed).draws(name, 20).normal()

    assert torch.equal(dealt(0, "pretrain 1"), dealt(0, "pretrain 1"))
    assert not torch.equal(dealt(0, "pretrain 1"), dealt(0, "pretrain 2"))
    assert not torch.equal(dealt(0, "pretrain 1"), dealt(1, "pretrain 1"))


def test_secret_draws_differ_by_release_step_and_source():
    def dealt(source, release="a", step=0):
        return source.loss_draws(release, step, 20).normal()

    source = NoiseSource()
    seen = [dealt(source), dealt(source, "b"), dealt(source, step=1), dealt(NoiseSource())]
    assert len(torch.cat(seen).unique()) == 80
    assert torch.equal(dealt(NoiseSource(3)), dealt(NoiseSource(3)))
    assert not torch.equal(dealt(NoiseSource(3)), dealt(NoiseSource(4)))


def test_processes_that_share_a_key_are_dealt_the_same():
    leader = NoiseSource()
    follower = NoiseSource(key=leader.key)
    assert len(leader.key) == 32 and not follower.seeded
    one, other = (source.loss_draws("a", 7, 20) for source in (leader, follower))
    assert torch.equal(one.normal(), torch.cat([other[:9].normal(), other[9:].normal()]))
