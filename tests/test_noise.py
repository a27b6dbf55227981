"""Privacy noise: its distribution, its seed, and that no two draws are the same."""

import math

import pytest
import torch
from scipy import stats

from opacus_ext.noise import NoiseSource

ALPHA = 1e-6  # chance of a false alarm, were the seeds below not fixed
DRAWS = 200_000


def chi_square_bounds(count: int) -> tuple[float, float]:
    return stats.chi2.ppf(ALPHA / 2, count) / count, stats.chi2.ppf(1 - ALPHA / 2, count) / count


@pytest.mark.parametrize("std", [1e-3, 1.0, 300.0])
def test_gaussian_noise_has_the_stated_deviation(std):
    noise = NoiseSource(7).gaussian((DRAWS,), std, "release", 0).double()
    low, high = chi_square_bounds(DRAWS)
    assert low < noise.square().mean().item() / std**2 < high
    assert abs(noise.mean().item()) < std * stats.norm.ppf(1 - ALPHA / 2) / math.sqrt(DRAWS)
    assert stats.kstest(noise.numpy() / std, "norm").pvalue > ALPHA


def test_laplace_noise_has_the_stated_scale():
    noise = NoiseSource(7).laplace((DRAWS,), 2.5, "release", 0)
    assert noise.dtype == torch.float64
    assert stats.kstest(noise.numpy(), "laplace", args=(0.0, 2.5)).pvalue > ALPHA


def test_coordinates_of_one_draw_are_independent():
    noise = NoiseSource(7).gaussian((DRAWS, 2), 1.0, "release", 0)
    correlation = torch.corrcoef(noise.T)[0, 1].item()
    assert abs(correlation) < stats.norm.ppf(1 - ALPHA / 2) / math.sqrt(DRAWS)


def test_noise_of_no_multiplier_is_none():
    assert not NoiseSource().gaussian((5,), 0.0, "release", 0).any()
    assert not NoiseSource().laplace((5,), 0.0, "release", 0).any()


def draws(source: NoiseSource, release: str = "release", step: int = 0) -> list[torch.Tensor]:
    return [
        source.gaussian((100,), 1.0, release, step),
        source.laplace((100,), 1.0, release, step),
        source.inclusion_mask(100, 0.5, release, step),
    ]


def test_unseeded_noise_is_fresh_at_every_call_and_in_every_source():
    first = NoiseSource()
    for one, other in zip(draws(first), draws(first), strict=True):
        assert not torch.equal(one, other)
    for one, other in zip(draws(NoiseSource()), draws(NoiseSource()), strict=True):
        assert not torch.equal(one, other)


def test_unseeded_noise_ignores_the_global_seed():
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        seen.append(NoiseSource().gaussian((100,), 1.0, "release", 0))
    assert not torch.equal(*seen)


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draws(NoiseSource())
    draws(NoiseSource(3))
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_noise_repeats_per_release_and_step_and_says_so():
    assert NoiseSource(3).seeded and not NoiseSource().seeded
    for one, other in zip(draws(NoiseSource(3)), draws(NoiseSource(3)), strict=True):
        assert torch.equal(one, other)
    for different in (draws(NoiseSource(4)), draws(NoiseSource(3), "other"), draws(NoiseSource(3), step=1)):
        for one, other in zip(draws(NoiseSource(3)), different, strict=True):
            assert not torch.equal(one, other)


def test_poisson_inclusion_frequencies():
    """Every record with probability q, independently of the others and of other steps."""
    source, rate, records, steps = NoiseSource(11), 0.3, 50, 4000
    masks = torch.stack([source.inclusion_mask(records, rate, "r", step) for step in range(steps)]).double()
    counts = masks.sum(0)
    statistic = ((counts - steps * rate) ** 2 / (steps * rate * (1 - rate))).sum().item()
    assert stats.chi2.ppf(ALPHA, records) < statistic < stats.chi2.ppf(1 - ALPHA, records)
    sizes = masks.sum(1)
    low, high = chi_square_bounds(steps - 1)
    assert low < sizes.var().item() / (records * rate * (1 - rate)) < high
    pairs = torch.corrcoef(masks.T)[~torch.eye(records, dtype=bool)]
    assert pairs.abs().max() < stats.norm.ppf(1 - ALPHA / 2 / len(pairs)) / math.sqrt(steps)


def test_poisson_at_full_rate_takes_everyone():
    assert NoiseSource().inclusion_mask(1000, 1.0, "r", 0).all()


def test_poisson_batches_may_be_empty():
    sizes = {int(NoiseSource(5).inclusion_mask(3, 0.1, "r", step).sum()) for step in range(50)}
    assert 0 in sizes and len(sizes) > 1
