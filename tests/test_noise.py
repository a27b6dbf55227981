"""Privacy noise: its distribution, its seed, and that no two draws are the same."""

import math

import pytest
import torch
from scipy import stats

from opacus_ext.noise import GridNoise, NoiseSource, grid_of

ALPHA = 1e-6  # chance of a false alarm, were the seeds below not fixed
DRAWS = 200_000


def gaussian(source: NoiseSource, size: int, std=1.0, release="release", step=0) -> torch.Tensor:
    return source.gaussian(size, std, release, step).add_to(torch.zeros(size))


def chi_square_bounds(count: int) -> tuple[float, float]:
    return stats.chi2.ppf(ALPHA / 2, count) / count, stats.chi2.ppf(1 - ALPHA / 2, count) / count


@pytest.mark.parametrize("std", [1e-3, 1.0, 300.0])
def test_gaussian_noise_has_the_stated_deviation(std):
    noise = gaussian(NoiseSource(7), DRAWS, std).double()
    low, high = chi_square_bounds(DRAWS)
    assert low < noise.square().mean().item() / std**2 < high
    assert abs(noise.mean().item()) < std * stats.norm.ppf(1 - ALPHA / 2) / math.sqrt(DRAWS)
    assert stats.kstest(noise.numpy() / std, "norm").pvalue > ALPHA


def test_laplace_noise_has_the_stated_scale():
    noise = NoiseSource(7).laplace(DRAWS, 2.5, "release", 0).add_to(torch.zeros(DRAWS)).double()
    assert stats.kstest(noise.numpy(), "laplace", args=(0.0, 2.5)).pvalue > ALPHA


def test_coordinates_of_one_draw_are_independent():
    noise = gaussian(NoiseSource(7), 2 * DRAWS).view(DRAWS, 2)
    correlation = torch.corrcoef(noise.T)[0, 1].item()
    assert abs(correlation) < stats.norm.ppf(1 - ALPHA / 2) / math.sqrt(DRAWS)


def test_noise_of_no_multiplier_is_none():
    """Also no rounding: epsilon inf is the plain sum."""
    total = torch.tensor([1 / 3, 1e-30, 1e30])
    for none in (NoiseSource().gaussian(3, 0.0, "r", 0), NoiseSource().laplace(3, 0.0, "r", 0)):
        assert torch.equal(none.add_to(total), total)


def draws(source: NoiseSource, release: str = "release", step: int = 0) -> list[torch.Tensor]:
    return [
        gaussian(source, 100, 1.0, release, step),
        source.laplace(100, 1.0, release, step).add_to(torch.zeros(100)),
        source.sample(100, 0.5, release, step),
    ]


def test_unseeded_noise_is_fresh_at_every_call_and_in_every_source():
    """As a resumed run asks for the same release and step again. Who is sampled is the same within one run alone."""
    first = NoiseSource()
    *noise, sample = draws(first)
    *again, same_sample = draws(first)
    assert not any(torch.equal(one, other) for one, other in zip(noise, again, strict=True))
    assert torch.equal(sample, same_sample)
    for one, other in zip(draws(NoiseSource()), draws(NoiseSource()), strict=True):
        assert not torch.equal(one, other)


def test_unseeded_noise_ignores_the_global_seed():
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        seen.append(gaussian(NoiseSource(), 100))
    assert not torch.equal(*seen)


def test_drawing_noise_does_not_use_the_global_generator():
    before = torch.get_rng_state()
    draws(NoiseSource())
    draws(NoiseSource(3))
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_noise_repeats_per_release_and_step_and_is_reported():
    assert NoiseSource(3).seeded and not NoiseSource().seeded
    for one, other in zip(draws(NoiseSource(3)), draws(NoiseSource(3)), strict=True):
        assert torch.equal(one, other)
    for different in (draws(NoiseSource(4)), draws(NoiseSource(3), "other"), draws(NoiseSource(3), step=1)):
        for one, other in zip(draws(NoiseSource(3)), different, strict=True):
            assert not torch.equal(one, other)


def test_processes_that_share_a_key_agree_on_the_sample_and_share_no_noise():
    leader = NoiseSource()
    follower = NoiseSource(key=leader.key)
    assert not follower.seeded
    for bound in (None, 400):
        assert torch.equal(*(source.sample(1000, 0.5, "r", 3, bound) for source in (leader, follower)))
    assert not torch.equal(gaussian(leader, 100), gaussian(follower, 100))


# ------------------------------------------------------------------------------------------ sampling


def membership(samples: list[torch.Tensor], records: int) -> torch.Tensor:
    """(steps, records) of 0/1, from sorted indices without repetition."""
    assert all((sample.diff() > 0).all() for sample in samples)
    return torch.stack([torch.zeros(records, dtype=torch.float64).index_fill(0, s, 1.0) for s in samples])


def test_poisson_inclusion_frequencies():
    """Every record with probability q, independently of the others and of other steps."""
    source, rate, records, steps = NoiseSource(11), 0.3, 50, 4000
    masks = membership([source.sample(records, rate, "r", step) for step in range(steps)], records)
    counts = masks.sum(0)
    statistic = ((counts - steps * rate) ** 2 / (steps * rate * (1 - rate))).sum().item()
    assert stats.chi2.ppf(ALPHA, records) < statistic < stats.chi2.ppf(1 - ALPHA, records)
    sizes = masks.sum(1)
    low, high = chi_square_bounds(steps - 1)
    assert low < sizes.var().item() / (records * rate * (1 - rate)) < high
    pairs = torch.corrcoef(masks.T)[~torch.eye(records, dtype=bool)]
    assert pairs.abs().max() < stats.norm.ppf(1 - ALPHA / 2 / len(pairs)) / math.sqrt(steps)


def test_poisson_at_full_rate_takes_everyone():
    assert torch.equal(NoiseSource().sample(1000, 1.0, "r", 0), torch.arange(1000))


def test_poisson_batches_may_be_empty():
    sizes = {len(NoiseSource(5).sample(3, 0.1, "r", step)) for step in range(50)}
    assert 0 in sizes and len(sizes) > 1


@pytest.mark.parametrize(("rate", "bound"), [(0.3, 15), (1.0, 20)])
def test_truncation_keeps_a_uniform_subset(rate, bound):
    """No sample above the bound, smaller ones untouched, and every record and pair of records equally often."""
    source, records, steps = NoiseSource(11), 50, 4000
    samples = [source.sample(records, rate, "r", step, bound) for step in range(steps)]
    whole = [source.sample(records, rate, "r", step) for step in range(steps)]
    cut = 0
    for kept, drawn in zip(samples, whole, strict=True):
        assert len(kept) == min(len(drawn), bound) and set(kept.tolist()) <= set(drawn.tolist())
        cut += len(kept) < len(drawn)
    assert cut > steps / 3
    masks = membership(samples, records)
    mean = masks.mean().item()
    counts = masks.sum(0)
    # Indicators of one sample are negatively correlated, which can only narrow the spread of the counts.
    statistic = ((counts - steps * mean) ** 2 / (steps * mean * (1 - mean))).sum().item()
    assert statistic < stats.chi2.ppf(1 - ALPHA, records)
    pairs = torch.corrcoef(masks.T)[~torch.eye(records, dtype=bool)]
    assert (pairs - pairs.mean()).abs().max() < stats.norm.ppf(1 - ALPHA / 2 / len(pairs)) / math.sqrt(steps)


def test_a_large_bound_changes_nothing():
    source = NoiseSource(11)
    for step in range(20):
        assert torch.equal(source.sample(50, 0.5, "r", step), source.sample(50, 0.5, "r", step, 50))


# ------------------------------------------------------------------------------------------ floating point


@pytest.mark.parametrize("std", [3e-7, 0.015, 1.0, 1.9, 4096.0])
def test_a_noisy_sum_reveals_no_low_bits(std):
    """Sums that agree on the grid give the same answer under the same noise, bit by bit."""
    torch.manual_seed(0)
    total = torch.randn(10_000, dtype=torch.float64) * 10 * std
    grid = grid_of(std)
    assert std * 2**-33 < grid <= std * 2**-32 and math.log2(grid).is_integer()
    rounded = (total / grid).round() * grid
    assert not torch.equal(total, rounded)
    noise = NoiseSource(1).gaussian(len(total), std, "r", 0)
    assert torch.equal(noise.add_to(total), noise.add_to(rounded))


def test_noise_moves_on_the_grid_as_the_sum_does():
    """Sum + k steps of noise and sum + k steps in itself: the same answers, so none betrays which it was."""
    total = torch.randn(1000, dtype=torch.float64)
    noise = NoiseSource(1).gaussian(1000, 0.7, "r", 0)
    steps = torch.randint(-(2**33), 2**33, (1000,)).double()
    moved = GridNoise(noise.multiples + steps, noise.grid)
    assert torch.equal(
        moved.add_to(total), noise.add_to((total / noise.grid).round() * noise.grid + steps * noise.grid)
    )


@pytest.mark.parametrize("multiplier", [0.5, 15.0])
def test_rounding_adds_next_to_nothing_to_the_sensitivity(multiplier):
    """sqrt(P) steps at most, 2e-5 of the bound for 4 million coordinates; here, the worst of random neighbours."""
    torch.manual_seed(0)
    coordinates, bound = 100_000, 1e-3
    grid = grid_of(multiplier * bound)
    record = torch.randn(coordinates, dtype=torch.float64)
    record *= bound / record.norm()
    total = torch.randn(coordinates, dtype=torch.float64)
    moved = (((total + record) / grid).round() - (total / grid).round()) * grid
    allowed = math.sqrt(coordinates) * grid
    assert (moved - record).norm() <= allowed
    assert moved.norm() <= bound + allowed and math.sqrt(4e6) * grid < 1e-5 * bound


def test_low_bits_of_noise_are_even():
    """Every step of the grid is hit: the deviates are much finer than the grid."""
    multiples = NoiseSource(2).gaussian(DRAWS, 1.3, "r", 0).multiples
    assert torch.equal(multiples, multiples.round())
    for bits in (1, 4, 8):
        counts = torch.bincount((multiples % 2**bits).long(), minlength=2**bits)
        assert stats.chisquare(counts.numpy()).pvalue > ALPHA
    assert len(multiples.unique()) > 0.999 * DRAWS


def test_noise_keeps_the_shape_of_the_sum():
    total = torch.arange(6.0).view(2, 3)
    answer = NoiseSource(1).gaussian(6, 1e-6, "r", 0).add_to(total)
    assert answer.shape == (2, 3) and answer.dtype == torch.float32
    torch.testing.assert_close(answer, total, atol=1e-4, rtol=0)
