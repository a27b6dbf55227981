"""Privacy of a result computed from one shard of the records: a fresh, secret, uniform choice among all shards.

The mechanism (opacus_ext/sanitize.py). Records are assigned to N shards at random, independently of their content. In
each step one shard i is chosen with probability 1/N, and the result is f_i + Gaussian noise of standard deviation s,
where f_i may depend in any way on the records of shard i, on earlier results and on randomness of its own, but not on
which shards were chosen before. No two values of any f_i are further apart than D.

Why the amplification of Poisson sampling does not apply. There a record is in the sum or not; here its shard always
yields a result when it is chosen, and the record may change this result arbitrarily. So the two results to compare are

    P  = (1 - q) A + q N(f, s^2),    P' = (1 - q) A + q N(f', s^2),    q = 1/N,

where A is the mixture of the other shards' results, which is the same on both sides (couple the coins: the record
that is added, removed or exchanged changes one shard). For epsilon >= 0 and epsilon' = ln(1 + q (e^epsilon - 1)),
advanced joint convexity (Balle, Barthe, Gaboardi 2018, theorem 2, arXiv:1807.01647) bounds the hockey-stick
divergence

    H_{e^epsilon'}(P || P') <= q ((1 - b) H_{e^epsilon}(N(f, s^2) || A) + b H_{e^epsilon}(N(f, s^2) || N(f', s^2)))

for a b in [0, 1]. Both divergences are at most that of two Gaussians at distance D (joint convexity over the components
of A), so H_{e^epsilon'} <= q delta_Gauss(epsilon; D / s) =: h(epsilon'). This holds for (P', P) as well, and for
epsilon' < 0 it follows by H_a(P || P') = 1 - a + a H_{1/a}(P' || P). Where A = N(f') the bound is reached, so h is the
smallest that holds.

It is above the curve of the Poisson-sampled Gaussian, whose two directions differ. Booked as Poisson samples these
steps would come out a tenth to a quarter cheaper, and too cheap: results that adapt to earlier results reach the
larger of both directions in every step (tests/test_gs_wgan.py computes such a case).

Composition is adaptive: given the earlier results and all random draws but the choices, the f_i of a step are fixed
before its shard is chosen. That is why f_i must not depend on earlier choices: a shard that learns only when it is
chosen remembers the choice, later results reveal it, and the choice is no longer secret.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # slow to import
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# Standard deviations of the Gaussian's privacy loss that the grid covers; the rest counts as lost.
REACH = 12.0


def step_curve(rate: float, noise_multiplier: float, epsilons: np.ndarray) -> np.ndarray:
    """h(epsilon) of one step, for epsilons >= 0. noise_multiplier: s / D."""
    from scipy.special import log_ndtr, ndtr

    inner = np.log1p(np.expm1(epsilons) / rate)  # the epsilon of the Gaussian alone
    half = 0.5 / noise_multiplier
    gaussian = ndtr(half - inner * noise_multiplier) - np.exp(
        inner + log_ndtr(-half - inner * noise_multiplier)
    )
    return rate * np.maximum(gaussian, 0.0)


def step_loss(rate: float, noise_multiplier: float, grid: float) -> "PrivacyLossDistribution":
    """dp-accounting's privacy loss distribution of one step, on multiples of `grid`, rounded pessimistically.

    The curve is joined by chords in e^epsilon (Connect the Dots, Doroshenko et al. 2022, arXiv:2207.04380). It is its
    own dual, so a loss of -l has e^-l times the mass of l, and the remaining mass is at 0.
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    farthest = min(700.0, 0.5 / noise_multiplier**2 + REACH / noise_multiplier)
    count = max(1, math.ceil(math.log1p(rate * math.expm1(farthest)) / grid))
    curve = np.minimum.accumulate(step_curve(rate, noise_multiplier, grid * np.arange(count + 1)))
    falls = -np.diff(curve)
    mass = np.append(falls[:-1] * math.exp(grid) - falls[1:], 0.0) / math.expm1(grid)
    mass[-1] = falls[-1] / -math.expm1(-grid)
    mass = np.maximum(mass, 0.0)
    steps = np.arange(1, count + 1)
    mirrored = mass * np.exp(-grid * steps)
    lost = float(curve[-1])
    masses = {0: max(0.0, 1.0 - lost - float(mass.sum() + mirrored.sum()))}
    masses |= dict(zip((-steps).tolist(), mirrored.tolist(), strict=True))
    masses |= dict(zip(steps.tolist(), mass.tolist(), strict=True))
    pmf = pld_pmf.create_pmf(masses, grid, lost, pessimistic_estimate=True)
    return privacy_loss_distribution.PrivacyLossDistribution(pmf)
