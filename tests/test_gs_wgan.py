"""GS-WGAN: what the choice of a shard costs, what leaves the critics, and what they may depend on."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from scipy.stats import norm
from test_contract import Killed, kill_at_booking, resumed_run

from data.spec import Samples
from models.nn.shard_critics import CriticLoss, CriticSchedule, ShardCritics, WarmUpConfig
from models.nn.sn_gan import ConvCritic, ResNetGenerator
from models.nn.stack import Stack
from opacus_ext import sanitize
from opacus_ext.accounting import (
    CHOSEN_SHARD,
    REPLACE_ONE,
    Release,
    available_epsilons,
    calibrate,
    epsilon_of,
)
from opacus_ext.errors import UnplannedRelease
from opacus_ext.noise import NoiseSource
from opacus_ext.sanitize import SanitisedGradients, Shards, sanitised_release
from opacus_ext.shard_accounting import step_curve, step_loss
from utils.draws import Draws
from utils.errors import UserError
from utils.runtime import Runtime

# ------------------------------------------------------------------------------------------ accounting

GRID = np.linspace(-40, 40, 80_001)  # for densities, in units of the diameter D = 1


def hockey_stick(one: np.ndarray, other: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(one - math.exp(epsilon) * other, 0).sum() * (GRID[1] - GRID[0]))


def output_density(rate: float, std: float, own: float, others: list[float]) -> np.ndarray:
    """Density of an answer: of the shard in question with probability `rate`, else of one of the others."""
    rest = np.mean([norm.pdf(GRID, mean, std) for mean in others], axis=0)
    return rate * norm.pdf(GRID, own, std) + (1 - rate) * rest


@pytest.mark.parametrize("others", [[0.0], [1.0], [0.5], [0.0, 1.0], [0.0, 0.2, 0.9]])
@pytest.mark.parametrize(("rate", "std"), [(0.01, 0.5), (0.1, 0.6), (0.25, 1.0), (1.0, 2.0)])
def test_no_pair_of_datasets_is_distinguished_better_than_booked(rate, std, others):
    """A record moves its shard's answer from 0 to 1, wherever in between the other shards' answers are."""
    one, other = (output_density(rate, std, own, others) for own in (0.0, 1.0))
    for epsilon in (0.0, 0.05, 0.3, 1.0, 2.0):
        booked = step_curve(rate, std, np.array(epsilon))
        for pair in ((one, other), (other, one)):
            assert hockey_stick(*pair, epsilon) <= booked * (1 + 1e-6) + 1e-9


def test_the_curve_is_reached_in_both_directions():
    one, other = output_density(0.1, 0.6, 1.0, [0.0]), output_density(0.1, 0.6, 0.0, [0.0])
    mirrored = output_density(0.1, 0.6, 0.0, [1.0]), output_density(0.1, 0.6, 1.0, [1.0])
    for epsilon in (0.0, 0.2, 1.0):
        booked = float(step_curve(0.1, 0.6, np.array(epsilon)))
        assert hockey_stick(one, other, epsilon) == pytest.approx(booked, rel=1e-4)
        assert hockey_stick(*mirrored, epsilon) == pytest.approx(booked, rel=1e-4)


def losses(one: np.ndarray, other: np.ndarray, grid: np.ndarray, width: float) -> tuple[int, np.ndarray]:
    """The lowest privacy loss, in steps of `width` and rounded down, and the mass of it and of those above."""
    steps = np.floor(np.log(one / other) / width).astype(int)
    return steps.min(), np.bincount(steps - steps.min(), weights=one * (grid[1] - grid[0]))


def adaptive_delta(rate: float, std: float, num_steps: int, epsilon: float, width: float = 2e-3) -> float:
    """Hockey-stick divergence, from below, of critics that choose in every step what suits the loss so far: that the
    record's shard stands out (1, the others at 0), or that it would stand out without the record."""
    grid = np.linspace(-8, 9, 26_001)
    usual = norm.pdf(grid, 0.0, std)
    mixed = (1 - rate) * usual + rate * norm.pdf(grid, 1.0, std)
    kinds = [losses(mixed, usual, grid, width), losses(usual, mixed, grid, width)]
    reach = max(abs(lowest) + len(masses) for lowest, masses in kinds)
    total = np.arange(-reach * num_steps, reach * num_steps + 1) * width
    value = -np.expm1(np.minimum(epsilon - total, 0))  # of ending with this loss
    for _ in range(num_steps):
        padded = np.pad(value, reach, mode="edge")
        before = []
        for lowest, masses in kinds:
            start = reach + lowest + len(masses) - 1
            before.append(fftconvolve(padded, masses[::-1])[start : start + len(value)])
        value = np.maximum(*before)
    return float(value[reach * num_steps])


def test_steps_cost_what_is_booked_and_more_than_as_many_poisson_samples():
    rate, std, num_steps, delta = 0.2, 1.0, 4, 1e-2

    def booked(mechanism: str) -> float:
        return epsilon_of([Release("answers", std, rate, num_steps, mechanism)], delta)

    assert 0.8 * delta < adaptive_delta(rate, std, num_steps, booked(CHOSEN_SHARD)) <= delta
    assert adaptive_delta(rate, std, num_steps, booked("gaussian")) > 1.02 * delta


def test_one_shard_is_an_ordinary_gaussian():
    one = epsilon_of([Release("answers", 2.0, 1.0, 4, CHOSEN_SHARD)], 1e-5)
    assert one == pytest.approx(epsilon_of([Release("sum", 2.0, 1.0, 4)], 1e-5), rel=1e-3)


def test_both_relations_cost_the_same():
    """A record that is exchanged stays in its shard."""
    plan = [Release("answers", 0.8, 0.02, 200, CHOSEN_SHARD)]
    assert epsilon_of(plan, 1e-5) == epsilon_of(plan, 1e-5, relation=REPLACE_ONE)


def test_the_booked_epsilon_is_below_that_of_renyi_accounting():
    """Shards are sampled without replacement, and one is replaced: Wang et al. 2019 bound that too, less tightly."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    orders = [1 + x / 10 for x in range(1, 100)] + [*range(12, 64)]
    renyi = RdpAccountant(orders, dp_accounting.NeighboringRelation.REPLACE_ONE)
    event = dp_accounting.SampledWithoutReplacementDpEvent(50, 1, dp_accounting.GaussianDpEvent(1.0))
    renyi.compose(event, 100)
    booked = epsilon_of([Release("answers", 1.0, 0.02, 100, CHOSEN_SHARD)], 1e-5)
    assert 0.5 * renyi.get_epsilon(1e-5) < booked < renyi.get_epsilon(1e-5)


def test_the_privacy_loss_of_a_step_is_a_distribution():
    loss = step_loss(0.05, 0.7, 1e-3)
    for epsilon in (0.0, 0.1, 0.5, 1.0):
        assert loss.get_delta_for_epsilon(epsilon) == pytest.approx(
            float(step_curve(0.05, 0.7, np.array(epsilon))), rel=1e-3
        )
    assert loss.get_delta_for_epsilon(-20.0) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "noise_multiplier"), [(1, 0.998), (10, 0.478)])
def test_the_published_setting(epsilon, noise_multiplier):
    def plan(z: float) -> list[Release]:
        return [Release("answers", z, 1 / 1000, 20_000, CHOSEN_SHARD)]

    assert calibrate(plan, epsilon, 1.66575e-6, "pld") == pytest.approx(noise_multiplier, rel=2e-3)


def test_other_accountants_refuse():
    plan = [Release("answers", 1.0, 0.1, 3, CHOSEN_SHARD)]
    for accountant in ("rdp", "prv"):
        with pytest.raises(UserError, match=f"privacy.accountant={accountant} .*'answers'.*use pld"):
            epsilon_of(plan, 1e-5, accountant)
    assert available_epsilons(plan, 1e-5, "add_or_remove_one")["rdp"] is None


# ------------------------------------------------------------------------------------------ answers


class Fixed:
    """Critics that answer the same to everybody; they note what is asked of them."""

    def __init__(self, gradient: float = 0.0) -> None:
        self.gradient, self.asked, self.kept_up = gradient, [], []

    def warm_up(self, shards, part):
        self.part = part

    def keep_up(self, shards, part, step):
        self.kept_up.append(step)

    def image_gradient(self, shards, shard, step, images, labels):
        self.asked.append(shard)
        return torch.full_like(images, self.gradient)


NAME, SHARDS = "sanitised gradients", 5
IMAGES, LABELS = torch.zeros(9, 1, 60, 60), torch.zeros(9, dtype=torch.int64)


@pytest.fixture
def door(make_private):
    def make(critics, epsilon=math.inf, steps=1, bound=0.5, plan=None, **options) -> SanitisedGradients:
        private = make_private(plan or [sanitised_release(NAME, SHARDS, steps)], epsilon, **options)
        return SanitisedGradients(NAME, private, critics, SHARDS, bound)

    return make


def test_noise_is_the_multiplier_times_twice_the_bound_times_the_root_of_the_batch(door):
    found = door(Fixed(), epsilon=1)
    multiplier = found._private.ledger.planned(NAME).noise_multiplier
    answer = found.answer(IMAGES, LABELS)
    assert answer.std().item() == pytest.approx(multiplier * 2 * 0.5 * 3, rel=0.02)
    assert answer.shape == IMAGES.shape and multiplier > 0.3


@pytest.mark.parametrize("gradient", [1e-6, 1.0, 1e30])
def test_the_gradient_of_every_image_is_clipped(gradient, door):
    answer = door(Fixed(gradient)).answer(IMAGES, LABELS)
    norms = answer.flatten(1).norm(dim=1)
    expected = min(0.5, gradient * 60)
    torch.testing.assert_close(norms, torch.full((9,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_gradients_that_are_not_finite_count_as_zero(gradient, door):
    assert not door(Fixed(gradient)).answer(IMAGES, LABELS).any()


def test_two_critics_are_never_further_apart_than_the_noise_is_made_for(door):
    one, other = (door(Fixed(gradient)).answer(IMAGES, LABELS) for gradient in (1.0, -1.0))
    assert (one - other).norm().item() == pytest.approx(2 * 0.5 * 3, rel=1e-4)


def test_every_step_queries_one_random_shard(door):
    critics = Fixed()
    found = door(critics, steps=1000)
    for _ in range(1000):
        found.answer(IMAGES[:1, :, :2, :2], LABELS[:1])
    counts = np.bincount(critics.asked, minlength=SHARDS)
    assert abs(counts - 200).max() < 70
    assert critics.kept_up == list(range(1000))
    changes = np.mean(np.diff(critics.asked) != 0)
    assert changes == pytest.approx(0.8, abs=0.06)  # independent of the step before


def test_the_queried_shard_is_secret():
    one, other = ([NoiseSource().choice(1000, NAME, step) for step in range(4)] for _ in range(2))
    assert one != other
    assert NoiseSource(3).choice(1000, NAME, 1) == NoiseSource(3).choice(1000, NAME, 1)


@pytest.mark.parametrize("plan", [Release(NAME, None, 0.2, 1), Release(NAME, None, 0.1, 1, CHOSEN_SHARD)])
def test_another_plan_is_refused(plan, door):
    with pytest.raises(UnplannedRelease, match=NAME):
        door(Fixed(), plan=[plan])


def test_a_critic_failure_ends_the_run_without_a_result_and_is_booked(door):
    class Broken(Fixed):
        def image_gradient(self, *_):
            raise ZeroDivisionError

    found = door(Broken(), epsilon=1)
    with pytest.raises(ZeroDivisionError):
        found.answer(IMAGES, LABELS)
    assert found._private.ledger.executed(NAME) == 1


# ------------------------------------------------------------------------------------------ shards


def numbered(count: int) -> Samples:
    """Images that say which they are."""
    images = np.zeros((count, 1, 8, 8), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return Samples(images, np.arange(count, dtype=np.int64) % 3)


def members(make_private, records: Samples, count: int, seed=0) -> list[set[int]]:
    """Which records the batches of each shard hold."""
    private = make_private([sanitised_release(NAME, count, 1)], noise_seed=seed, records=records)
    shards = Shards(private, NAME, count)
    images, labels, filled = shards.batch(range(count), 400, shards.draws(range(count), "look"))
    assert images.shape == (count, 400, 1, 8, 8) and labels.shape == (count, 400)
    numbers = ((images[:, :, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(numbers[filled] % 3, labels[filled])
    return [set(row.tolist()) if full else set() for row, full in zip(numbers, filled, strict=True)]


def test_every_record_is_in_one_shard(make_private):
    found = members(make_private, numbered(60), 6)
    assert sum(map(len, found)) == 60 and set.union(*found) == set(range(60))
    assert all(2 <= len(shard) <= 20 for shard in found)


def test_an_added_record_changes_one_shard(make_private):
    before, after = (members(make_private, numbered(count), 6) for count in (60, 61))
    changed = [shard for shard in range(6) if before[shard] != after[shard]]
    assert len(changed) == 1 and after[changed[0]] - before[changed[0]] == {60}


def test_the_dealing_is_secret(make_private):
    assert members(make_private, numbered(60), 6, None) != members(make_private, numbered(60), 6, None)


def test_empty_shards_have_batches_that_mean_nothing(make_private):
    found = members(make_private, numbered(3), 20)
    assert sum(map(len, found)) == 3 and sum(not shard for shard in found) >= 17


# ------------------------------------------------------------------------------------------ critics

LOSS = CriticLoss(L_gp=10.0, L_epsilon=1e-3, lr=1e-2)
WARM_UP = WarmUpConfig(iterations=2, critic_iters=2, batch_size=4, at_once=2)
SCHEDULE = CriticSchedule(batch_size=4, critic_iters=2, refresh_iters=1, refresh_every=3)


def critic(width=3) -> ConvCritic:
    torch.manual_seed(0)
    return ConvCritic(8, 1, 3, width)


def generator() -> ResNetGenerator:
    torch.manual_seed(1)
    return ResNetGenerator(8, 1, 3, 4, 2)


def shard_critics(count=SHARDS) -> ShardCritics:
    def latent(rng: Draws, batch: int) -> torch.Tensor:
        return rng.uniform(batch, 4).round()

    return ShardCritics(critic(), generator(), generator, latent, count, LOSS, WARM_UP, SCHEDULE)


@pytest.fixture
def shards(make_private):
    return Shards(make_private([sanitised_release(NAME, SHARDS, 1)], noise_seed=0), NAME, SHARDS)


def weights_of(critics: ShardCritics) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in critics._critics.weights.items()}


def test_a_stack_computes_and_learns_as_its_networks_do_one_by_one():
    torch.manual_seed(2)
    networks = [ConvCritic(8, 1, 3, 3) for _ in range(3)]
    stack = Stack.copies(networks[0], 3)
    for position, network in enumerate(networks):
        stack.put(position, Stack.copies(network, 1))
    real, fake, labels = torch.rand(3, 5, 1, 8, 8), torch.rand(3, 5, 1, 8, 8), torch.randint(0, 3, (3, 5))
    rng = Draws(b"a".ljust(32), 0, 3)
    LOSS(stack, real, fake, labels, torch.ones(3), rng[:]).backward()
    for i, network in enumerate(networks):
        alone = Stack.copies(network, 1)
        part = slice(i, i + 1)
        LOSS(alone, real[part], fake[part], labels[part], torch.ones(1), rng[part]).backward()
        for name, weight in alone.weights.items():
            if weight.requires_grad:
                found = stack.weights[name].grad[part]
                torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)


def test_the_loss_of_a_critic_by_hand():
    network = critic().eval()
    real, fake = torch.rand(2, 6, 1, 8, 8, dtype=torch.float32).unbind()
    labels, rng = torch.tensor([0, 1, 2, 0, 1, 2]), Draws(b"b".ljust(32), 0, 1)
    mix = rng[:].uniform(6, 1, 1, 1)[0]
    between = (real + mix * (fake - real)).requires_grad_()
    slope = torch.autograd.grad(network(between, labels).sum(), between)[0].flatten(1).norm(dim=1)
    scores = network(real, labels)
    expected = network(fake, labels) - scores + 10 * (slope - 1) ** 2 + 1e-3 * scores**2
    batches = (real[None], fake[None], labels[None], torch.ones(1), rng[:])
    found = LOSS(Stack.copies(network, 1), *batches)
    torch.testing.assert_close(found, expected.mean(), rtol=1e-4, atol=1e-5)


def test_warming_up_makes_critics_of_their_own(shards):
    critics = shard_critics()
    before = weights_of(critics)
    critics.warm_up(shards, range(SHARDS))
    after = weights_of(critics)
    weight = "convolutions.1.weight"
    assert (after[weight] - before[weight]).flatten(1).norm(dim=1).min() > 1e-3
    assert (after[weight][0] - after[weight][1:]).flatten(1).norm(dim=1).min() > 1e-3


def test_how_many_critics_are_trained_at_once_does_not_matter(shards, monkeypatch):
    found = []
    for at_once in (2, 5):
        critics = shard_critics()
        monkeypatch.setattr(critics, "_warm_up", WarmUpConfig(2, 2, 4, at_once))
        critics.warm_up(shards, range(SHARDS))
        found.append(weights_of(critics))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4)


def test_a_record_changes_the_critic_of_its_shard_alone(make_private):
    found = []
    for count in (60, 61):
        private = make_private([sanitised_release(NAME, SHARDS, 1)], noise_seed=0, records=numbered(count))
        critics, dealt = shard_critics(), Shards(private, NAME, SHARDS)
        critics.warm_up(dealt, range(SHARDS))
        critics.keep_up(dealt, range(SHARDS), 0)
        found.append(weights_of(critics)["convolutions.0.weight"])
    changed = (found[0] - found[1]).flatten(1).abs().sum(1) > 0
    assert changed.sum() == 1


def test_a_chosen_critic_stays_as_it_is(shards):
    """Else later answers would tell whose turn it has been, and the choice would save nothing."""
    critics = shard_critics()
    critics.warm_up(shards, range(SHARDS))
    before = weights_of(critics)
    images = torch.rand(4, 1, 8, 8)
    gradient = critics.image_gradient(shards, 2, 0, images, torch.tensor([0, 1, 2, 0]))
    assert gradient.shape == images.shape and gradient.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in weights_of(critics).items())
    other = critics.image_gradient(shards, 3, 0, images, torch.tensor([0, 1, 2, 0]))
    assert not torch.equal(gradient, other)


def test_all_critics_are_kept_up_alike_on_a_fixed_schedule(shards):
    critics = shard_critics()
    for step, learns in ((0, True), (1, False), (2, False), (3, True)):
        before = weights_of(critics)["convolutions.0.weight"]
        critics.keep_up(shards, range(SHARDS), step)
        moved = (weights_of(critics)["convolutions.0.weight"] - before).flatten(1).norm(dim=1) > 0
        assert moved.all() if learns else not moved.any()


def test_the_gradient_raises_the_score():
    """It is that of the generator's loss, the negative score."""
    network = critic().eval()
    critics = shard_critics()
    critics._schedule = CriticSchedule(4, 0, 1, 3)
    critics._critics.network.eval()
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    gradient = critics.image_gradient(None, 0, 0, images, labels)
    assert (network(images - 0.01 * gradient, labels) > network(images, labels)).all()


# ------------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize(
    ("size", "channels", "classes", "generator_size", "critic_size"),
    [
        (28, 1, 10, 3_826_177, 1.07e6),
        (32, 3, 10, 3_830_787, 1.07e6),
        (32, 3, 2, 3_798_019, 1.04e6),
        (32, 3, 100, 4_199_427, 1.44e6),
        (64, 3, 2, 3_957_763, 1.08e6),
        (128, 3, 2, 4_596_739, 1.23e6),
    ],
)
def test_the_networks_have_the_published_sizes(size, channels, classes, generator_size, critic_size):
    with torch.device("meta"):
        networks = ResNetGenerator(size, channels, classes, 10, 64), ConvCritic(size, channels, classes, 64)
    generator_found, critic_found = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert generator_found == generator_size
    assert critic_found == pytest.approx(critic_size, abs=0.006e6)


@pytest.mark.parametrize(("size", "base"), [(8, 4), (12, 3), (16, 4), (28, 4), (32, 4), (64, 8)])
def test_small_images_start_from_a_grid_too(size, base):
    """From a single pixel no place differs from another."""
    with torch.device("meta"):
        assert ResNetGenerator(size, 1, 2, 4, 2).base == base


@pytest.mark.parametrize("size", [8, 12, 28, 32])
def test_images_have_the_size_of_the_private_ones(size):
    images = ResNetGenerator(size, 3, 2, 4, 2)(torch.rand(5, 4), torch.tensor([0, 1, 1, 0, 1]))
    assert images.shape == (5, 3, size, size)
    assert images.min() >= 0 and images.max() <= 1


def test_weights_are_divided_by_their_largest_singular_value():
    network = critic()
    for _ in range(200):
        network(torch.rand(1, 1, 8, 8), torch.tensor([0]))
    for layer in (*network.convolutions, network.score, network.embedding):
        assert torch.linalg.matrix_norm(layer.normalised_weight().flatten(1), 2).item() == pytest.approx(
            1, rel=0.02
        )


def test_no_critic_is_in_the_state(make_trial, samples):
    """Without noise on anything else: what the state holds of critics is what they were before any private record."""
    trial = make_trial("GS-WGAN", epsilon=math.inf)
    start = {name: value.clone() for name, value in trial.synthesizer.first_critic.state_dict().items()}
    trial.run()
    state = trial.synthesizer.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in state["first_critic"].items())
    assert set(state) == {
        "stage",
        "step",
        "generator",
        "first_critic",
        "critic_moments",
        "ema",
        "optimizer",
        "central",
    }
    kept = [value for value in vars(trial.synthesizer).values() if isinstance(value, (ShardCritics, Stack))]
    assert not kept


def test_the_generator_learns_from_the_query_results_alone(make_trial, samples, monkeypatch):
    def same_for_all(self, images, labels):
        self._private.ledger.book(self._name)
        return torch.ones_like(images)

    monkeypatch.setattr(sanitize.SanitisedGradients, "answer", same_for_all)
    found = []
    for records in (samples, samples.take(np.arange(30))):
        trial = make_trial("GS-WGAN", epsilon=math.inf, records=records)
        start = trial.synthesizer.generate(6)
        trial.run()
        found.append(trial.synthesizer.generate(6).images)
        assert not np.array_equal(start.images, found[-1])
    assert np.array_equal(*found)


def test_the_generator_has_a_learning_rate_of_its_own(make_trial, monkeypatch):
    trial = make_trial("GS-WGAN", "train.lr=0.5", "train.g_lr=0.25", epsilon=math.inf)
    rates, optimizer = [], CriticLoss.optimizer
    monkeypatch.setattr(
        CriticLoss, "optimizer", lambda self, rows: rates.append(self.lr) or optimizer(self, rows)
    )
    trial.run()
    assert trial.synthesizer.optimizer.param_groups[0]["lr"] == 0.25 and set(rates) == {0.5}


def test_a_resumed_run_trains_new_critics_and_makes_only_the_remaining_queries(
    make_trial, tmp_path, monkeypatch
):
    warmed, warm_up = [], ShardCritics.warm_up

    def watched(self, shards, part):
        warmed.append(shards._order.tolist())
        return warm_up(self, shards, part)

    monkeypatch.setattr(ShardCritics, "warm_up", watched)
    with monkeypatch.context() as patch:
        kill_at_booking(patch, NAME, 3)
        with pytest.raises(Killed):
            resumed_run(make_trial, tmp_path, "GS-WGAN")
    trial, restored = resumed_run(make_trial, tmp_path, "GS-WGAN")
    assert restored == "train (snapshot)"
    assert len(warmed) == 2
    assert trial.private.ledger.complete and trial.synthesizer.step == 5


@pytest.mark.parametrize("cond", ["true", "false"])
def test_public_pretraining_gives_the_generator_and_the_first_critic_their_start(cond, make_method, public):
    method = make_method("GS-WGAN", "public_data.name=glyphs", f"pretrain.cond={cond}")
    before = [method.generator.output.bias.detach().clone(), method.first_critic.score.weight.clone()]
    method.pretrain(public, None)
    assert not torch.equal(before[0], method.generator.output.bias)
    assert not torch.equal(before[1], method.first_critic.score.weight)
    assert method.first_critic.embedding.num_embeddings == 6
    assert method.generate(5).labels.tolist() == [0, 1, 2, 0, 1]


def test_killed_public_pretraining_resumes(make_method, public):
    """With the moments of the critic's optimiser too, which has seen public images alone."""
    settings = ("public_data.name=glyphs", "pretrain.iterations=4", "pretrain.snapshot_freq=2")
    kept = []
    runtime = Runtime(snapshot=lambda stage: kept.append(copy.deepcopy(whole.state_dict())))
    whole, again = make_method("GS-WGAN", *settings, runtime=runtime), make_method("GS-WGAN", *settings)
    whole.pretrain(public, None)
    assert [state["step"] for state in kept] == [2, 4]
    again.load_state_dict(kept[0])
    again.pretrain(public, None)
    for name in ("generator", "first_critic"):
        expected, found = getattr(whole, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name


@pytest.mark.parametrize(
    "wrong",
    [
        "model.num_discriminators=0",
        "model.latent_type=uniform",
        "train.max_grad_norm=0",
        "train.pretrain.at_once=0",
        "train.refresh_every=0",
        "train.lr=0",
        "pretrain.g_lr=0",
        "pretrain.L_gp=-1",
    ],
)
def test_bad_settings_are_refused(wrong, make_method):
    with pytest.raises(UserError, match=wrong.partition("=")[0]):
        make_method("GS-WGAN", wrong)


def test_the_plan_is_one_shard_of_all_in_every_step(make_method):
    plan = make_method("GS-WGAN").privacy_plan()
    assert plan == [Release(NAME, None, 0.25, 5, CHOSEN_SHARD)]
