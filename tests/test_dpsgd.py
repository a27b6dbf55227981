"""The DP-SGD engine: what is summed, how often noise comes, what is booked."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from opacus_ext import dpsgd
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import DPSGDConfig, dpsgd_release, dpsgd_steps
from opacus_ext.errors import BudgetExceeded, UnplannedRelease
from opacus_ext.gradients import per_example
from opacus_ext.gradients.rules import refuse_mixing
from opacus_ext.records import RecordAccess
from opacus_ext.sampling import PhysicalBatches
from utils.errors import UserError

ALPHA = 1e-6
BOUND = 0.01
NAME = "dp-sgd"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.SiLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3))


def loss(model, images, labels, rng):
    return F.cross_entropy(model(images), labels, reduction="none")


def no_gradient(model, images, labels, rng):
    return model(images).sum(1) * 0


def config(n_split=None, max_physical_batch_size=64, max_grad_norm=BOUND) -> DPSGDConfig:
    return DPSGDConfig(n_split, max_physical_batch_size, max_grad_norm, "poisson", max_batch_size=None)


def steps(private, model, dp=None, per_example_loss=loss, optimizer=None):
    """The engine with plain SGD of rate 1: every step moves the weights by minus the noisy mean gradient."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    return dpsgd_steps(NAME, private, model, optimizer, per_example_loss, dp or config())


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def update(private, dp=None, per_example_loss=loss, model=None) -> torch.Tensor:
    """Minus the total movement of the weights over all steps."""
    model = model or network()
    before = flat(model)
    for _ in steps(private, model, dp, per_example_loss):
        pass
    return before - flat(model)


def sampled(private) -> list[torch.Tensor]:
    """Collects the indices that the engine reads, chunk by chunk."""
    seen, take = [], private._records.take
    private._records.take = lambda which: (seen.append(which), take(which))[1]
    return seen


# ------------------------------------------------------------------------------------------ the clean step


def test_without_noise_and_sampling_a_step_is_the_mean_of_clipped_gradients(make_private, samples):
    private = make_private([Release(NAME, None)])
    model, expected = network(), 0
    images = torch.from_numpy(samples.images).float() / 127.5 - 1
    for image, label in zip(images, torch.from_numpy(samples.labels), strict=True):
        model.zero_grad()
        loss(model, image[None], label[None], None).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert gradient.norm() > BOUND
        expected = expected + gradient * (BOUND / gradient.norm())
    torch.testing.assert_close(update(private), expected / 60, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dp", [config(n_split=7), config(n_split=100), config(max_physical_batch_size=8)])
def test_chunks_change_nothing(make_private, dp):
    def moved(dp):
        return update(make_private([Release(NAME, None, 0.5, 3)], noise_seed=1), dp)

    torch.testing.assert_close(moved(dp), moved(config()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dp", [config(n_split=7), config(max_physical_batch_size=8)])
def test_chunks_do_not_change_what_the_loss_draws(make_private, dp):
    def moved(dp):
        private = make_private([Release(NAME, None, 0.5, 3)], noise_seed=1)
        return update(private, dp, lambda *asked: loss(*asked) * asked[-1].normal(2)[:, 1])

    torch.testing.assert_close(moved(dp), moved(config()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "max_size", "n_split", "sizes"),
    [
        (10, 4, None, [4, 4, 2]),
        (10, 100, None, [10]),
        (10, 1, 2, [5, 5]),
        (10, 4, 12, [1] * 10),
        (0, 4, None, []),
        (20, None, None, [8, 8, 4]),
    ],
)
def test_every_position_is_taken_once(count, max_size, n_split, sizes):
    taken = []

    def part(positions, size):
        taken.append(list(range(count))[positions])
        assert size == len(taken[-1])
        return torch.ones(1) * size

    parts = PhysicalBatches(max_size, n_split, torch.device("cpu"))
    assert parts.add_up(count, part, torch.zeros(1)) == count
    assert [position for positions in taken for position in positions] == list(range(count))
    assert [len(positions) for positions in taken] == sizes


def test_on_a_gpu_samples_of_many_sizes_are_computed_at_few():
    """Within the largest size allowed, and never above one that has not fitted."""

    def sizes(count, max_size=None, n_split=None, room=10**6):
        found = []

        def part(positions, size):
            if size > room:
                raise torch.OutOfMemoryError("full")
            found.append(size)
            assert 0 <= size - (positions.stop - positions.start) <= size / 16
            return torch.ones(1) * (positions.stop - positions.start)

        parts = PhysicalBatches(max_size, n_split, torch.device("cuda"))
        assert parts.add_up(count, part, torch.zeros(1)) == count
        return found

    assert {size for count in range(3900, 4100) for size in sizes(count)} == {3968, 4096, 4352}
    assert sizes(4000, max_size=1000) == [1000] * 4 and sizes(4001, max_size=4001) == [4001]
    assert sizes(4000, n_split=3) == [1344, 1344, 1344]
    assert sizes(4000, room=1500) == [1000] * 4
    assert sizes(5) == [5] and sizes(0) == []


@pytest.mark.parametrize("on_grey", [1.0, torch.nan])
def test_padding_contributes_nothing(on_grey, make_private, monkeypatch):
    """Neither where the gradient of what is padded with is a number, nor where it is none."""

    def breaks_on_grey(model, images, labels, rng):
        seen = torch.where(images.flatten(1).any(1), 1.0, on_grey)
        return loss(model, images, labels, rng) * rng.normal(2)[:, 1] * seen

    def moved():
        return update(make_private([Release(NAME, None, 0.5, 3)], noise_seed=1), config(), breaks_on_grey)

    plain = moved()
    seen = []
    monkeypatch.setattr(PhysicalBatches, "_padded_size", lambda self, count: seen.append(count) or count + 3)
    torch.testing.assert_close(moved(), plain, rtol=1e-4, atol=1e-7)
    assert len(seen) >= 3


@pytest.mark.parametrize("dp", [config(n_split=2), config(max_physical_batch_size=64)])
def test_out_of_memory_halves_the_parts_and_changes_nothing(make_private, dp):
    sizes = []

    def hungry(model, images, labels, rng):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("full")
        return loss(model, images, labels, rng) * rng.normal(2)[:, 1]

    def roomy(model, images, labels, rng):
        return loss(model, images, labels, rng) * rng.normal(2)[:, 1]

    def moved(per_example_loss, dp):
        return update(make_private([Release(NAME, None, 0.5, 3)], noise_seed=1), dp, per_example_loss)

    torch.testing.assert_close(moved(hungry, dp), moved(roomy, config()), rtol=1e-3, atol=1e-6)
    first_fit = next(i for i, size in enumerate(sizes) if 3 < size <= 5)
    assert max(sizes[first_fit:]) <= 5  # the size stays small in later steps


@pytest.mark.parametrize("fails_from", [1, 4, 8])
def test_out_of_memory_in_a_later_part_counts_no_record_twice(fails_from):
    """Memory runs out in a part behind `fails_from` positions, when others have been added already."""

    def part(positions, size):
        if positions.start >= fails_from and size > 2:
            raise torch.OutOfMemoryError("full")
        return torch.zeros(12).index_fill_(0, torch.arange(12)[positions], 1.0)

    for parts in (
        PhysicalBatches(4, None, torch.device("cpu")),
        PhysicalBatches(None, 3, torch.device("cpu")),
    ):
        assert parts.add_up(12, part, torch.zeros(12)).tolist() == [1.0] * 12


def test_running_out_of_memory_is_not_logged(caplog, capfd):
    """That a sample was large is private, and what is printed stays in the run's folder."""

    def hungry(positions, size):
        if positions.stop - positions.start > 2:
            raise torch.OutOfMemoryError("full")
        return torch.ones(1)

    with caplog.at_level("DEBUG"):
        PhysicalBatches(8, None, torch.device("cpu")).add_up(8, hungry, torch.zeros(1))
    assert not caplog.records and not any(capfd.readouterr())


def test_two_trainings_of_one_release_share_no_step(make_private):
    """Each step takes the sample of its own booking."""
    private = make_private([Release(NAME, None, 0.5, 3)])
    one, other = steps(private, network()), steps(private, network())
    assert [next(run).index for run in (one, other, one)] == [0, 1, 2]


def test_a_single_image_that_exceeds_memory_is_reported():
    def full(positions, size):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match="out of memory for a single training image"):
        PhysicalBatches(4, None, torch.device("cpu")).add_up(4, full, torch.zeros(1))


def record_moves_the_sum_by(make_private, samples, dp=None) -> float:
    """The largest movement of the released sum, over several records left out, in units of the bound."""

    def released_sum(records):
        return update(make_private([Release(NAME, None)], records=records), dp) * 60

    whole = released_sum(samples)
    rests = [samples.take([i for i in range(60) if i != left_out]) for left_out in (0, 31, 59)]
    return max((whole - released_sum(rest)).norm().item() for rest in rests) / BOUND


def test_a_record_moves_the_released_sum_by_at_most_the_bound(make_private, samples):
    """Also the divisor: it comes from the public number of records, which leaving one out does not change."""
    for dp in (None, config(n_split=5)):
        assert 0.5 < record_moves_the_sum_by(make_private, samples, dp) <= 1 + 1e-3


def test_chunks_are_added_up_without_rounding(make_private, monkeypatch):
    """A float32 total would stay at 1, whatever the later records say."""
    seen = []

    def tiny(network, per_example_loss, images, labels, bound, rng, **options):
        seen.append(len(labels))
        part = 1.0 if len(seen) == 1 else 2.0**-25
        return {key: torch.full_like(p, part) for key, p in network.named_parameters()}, None

    monkeypatch.setattr(dpsgd, "clipped_sum", tiny)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    moved = update(make_private([Release(NAME, None)]), config(n_split=60), no_gradient, model).double() * 60
    torch.testing.assert_close(moved, torch.full_like(moved, 1 + 59 * 2.0**-25), rtol=3e-7, atol=0)


def test_the_expected_batch_is_the_public_number_times_the_rate(make_private, samples):
    """With one record left, the same divisor: 60 * 0.5."""
    private = make_private([Release(NAME, None, 0.5, 1)], records=samples.take([0]), noise_seed=1)
    read = sampled(private)
    moved = update(private).norm().item()
    assert [len(indices) for indices in read] == [1]  # this seed includes the record
    assert moved == pytest.approx(BOUND / 30, rel=1e-3)


def test_randomness_of_the_loss_is_secret(make_private):
    """Draws that nobody can repeat are part of the mechanism: they couple, record by record, between neighbours."""

    def random_loss(model, images, labels, rng):
        return loss(model, images, labels, rng) * rng.uniform()

    release = [Release(NAME, None)]
    dp = config(max_grad_norm=1e6)
    assert not torch.equal(
        update(make_private(release), dp, random_loss), update(make_private(release), dp, random_loss)
    )


# ------------------------------------------------------------------------------------------ noise


def noise_ratio(make_private, dp=None) -> float:
    """Measured over stated variance of 40 steps of pure noise, without a gradient."""
    multiplier, rate, num_steps = 3.0, 0.5, 40
    private = make_private([Release(NAME, multiplier, rate, num_steps)], epsilon=1000.0, noise_seed=2)
    model, moves = network(), []
    before = flat(model)
    for _ in steps(private, model, dp, no_gradient):
        moves.append(before - flat(model))
        before = flat(model)
    stated = multiplier * BOUND / (60 * rate)
    return torch.stack(moves).double().square().mean().item() / stated**2


def in_bounds(ratio: float) -> bool:
    count = 40 * flat(network()).numel()
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], count) / count
    return low < ratio < high


@pytest.mark.parametrize("dp", [config(), config(n_split=9), config(max_physical_batch_size=4)])
def test_noise_comes_once_per_step_whatever_the_chunks(make_private, dp):
    assert in_bounds(noise_ratio(make_private, dp))


def test_steps_share_no_noise(make_private):
    private = make_private([Release(NAME, 3.0, 1.0, 10)], epsilon=1000.0)
    model, moves = network(), []
    before = flat(model)
    for _ in steps(private, model, None, no_gradient):
        moves.append(before - flat(model))
        before = flat(model)
    correlation = torch.corrcoef(torch.stack(moves))[~torch.eye(10, dtype=bool)]
    assert correlation.abs().max() < 6 / math.sqrt(len(before))


def test_an_empty_batch_still_takes_a_noisy_step(make_private):
    private = make_private([Release(NAME, 3.0, 1e-9, 3)], epsilon=1000.0)
    read = sampled(private)
    moved = update(private)
    assert read == []
    assert (moved != 0).all()
    assert private.ledger.complete


def test_poisson_inclusion_through_the_engine(make_private):
    rate, num_steps = 0.2, 400
    private = make_private([Release(NAME, None, rate, num_steps)], noise_seed=3)
    read = sampled(private)
    update(private, config(n_split=2), no_gradient, nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    assert len(read) == 2 * num_steps
    for one, other in zip(read[::2], read[1::2], strict=True):
        assert len(set(one.tolist()) & set(other.tolist())) == 0
    counts = torch.bincount(torch.cat(read), minlength=60).double()
    statistic = ((counts - rate * num_steps) ** 2 / (num_steps * rate * (1 - rate))).sum().item()
    assert stats.chi2.ppf(ALPHA, 60) < statistic < stats.chi2.ppf(1 - ALPHA, 60)


# ------------------------------------------------------------------------------------------ booking


def test_every_step_is_booked_before_it_reads(make_private):
    private = make_private([Release(NAME, None, num_steps=4)])
    log, take, book = [], private._records.take, private.ledger.book
    private._records.take = lambda which: (log.append("read"), take(which))[1]
    private.ledger.book = lambda name: (log.append("book"), book(name))[1]
    found = [(step.index, step.total) for step in steps(private, network())]
    assert found == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert log == ["book", "read"] * 4
    assert list(steps(private, network())) == []  # nothing is left to take
    with pytest.raises(BudgetExceeded):
        private.ledger.book(NAME)


def test_a_loop_that_stops_early_is_not_complete(make_private):
    private = make_private([Release(NAME, None, num_steps=4)])
    next(steps(private, network()))
    with pytest.raises(UnplannedRelease, match="1 of 4"):
        private.ledger.require_complete()


def test_a_failed_step_stays_booked(make_private):
    private = make_private([Release(NAME, None, num_steps=2)])
    model = network()
    before = flat(model)

    def fail(called, images, *rest):
        if len(images) > 3:  # up to 3: the check on random images, before anything is asked
            raise RuntimeError("out of memory")
        return loss(called, images, *rest)

    with pytest.raises(RuntimeError, match="out of memory"):
        next(steps(private, model, None, fail))
    assert private.ledger.executed(NAME) == 1
    assert torch.equal(before, flat(model)) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("taken", [1, 3])
def test_resuming_continues_at_the_booked_step(make_private, taken):
    plan = [Release(NAME, None, num_steps=5)]
    whole = network()
    for _ in steps(make_private(plan, 10.0, noise_seed=4), whole):
        pass
    first, part = make_private(plan, 10.0, noise_seed=4), network()
    running = steps(first, part)
    for _ in range(taken):
        next(running)
    second = make_private(plan, 10.0, noise_seed=4)
    second.ledger.load_state_dict(first.ledger.state_dict())
    assert [step.index for step in steps(second, part)] == list(range(taken, 5))
    assert torch.equal(flat(part), flat(whole))
    assert second.ledger.complete


def test_gradients_do_not_outlive_a_step(make_private):
    private = make_private([Release(NAME, None, num_steps=2)])
    model = network()
    for _ in steps(private, model):
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------ refusals


def test_the_optimizer_must_hold_exactly_what_is_trained(make_private):
    private = make_private([Release(NAME, None)])
    model = network()
    some = torch.optim.SGD(model[0].parameters(), lr=1.0)
    with pytest.raises(ValueError, match="trainable"):
        next(steps(private, model, optimizer=some))
    everything = torch.optim.SGD(model.parameters(), lr=1.0)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        next(steps(private, model, optimizer=everything))
    assert private.ledger.executed(NAME) == 0


def test_frozen_parameters_stay(make_private):
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    private = make_private([Release(NAME, None)], 10.0)
    for _ in steps(private, model, optimizer=torch.optim.SGD(trained, lr=1.0)):
        pass
    assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize(
    "mixer",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False).eval(),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_networks_that_mix_examples_are_refused_before_anything_is_read(make_private, mixer):
    private = make_private([Release(NAME, None)])
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(mixer), nn.Flatten(), nn.Linear(144, 3))
    model[1].training = False  # the part's own mode is what counts
    with pytest.raises(
        UserError, match=rf"{type(mixer).__name__} at '1.0' mixes the examples .* use GroupNorm"
    ):
        next(steps(private, model))
    assert private.ledger.executed(NAME) == 0


def test_a_loss_that_is_balanced_by_the_classes_of_the_batch_is_refused(make_private):
    """The weight of an example then depends on how many of its class were sampled."""

    def balanced(model, images, labels, rng):
        return loss(model, images, labels, rng) / torch.bincount(labels, minlength=3)[labels]

    private = make_private([Release(NAME, None)])
    with pytest.raises(UserError, match="bounds nothing"):
        next(steps(private, network(), per_example_loss=balanced))
    assert private.ledger.executed(NAME) == 0


def test_a_loss_that_compares_examples_of_different_classes_is_refused(make_private):
    def contrasted(model, images, labels, rng):
        others = (labels[:, None] != labels).sum(1)
        return loss(model, images, labels, rng) / (1 + others)

    private = make_private([Release(NAME, None)])
    with pytest.raises(UserError, match="bounds nothing"):
        next(steps(private, network(), per_example_loss=contrasted))
    assert private.ledger.executed(NAME) == 0


class SkipsBlanks(nn.Module):
    """Leaves out the rows of constant images, which the random images of the check never are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, images):
        rows = images.flatten(1).repeat_interleave(2, 0)
        kept = rows.std(1) > 0
        scores = torch.zeros(len(rows), 3)
        scores[kept] = self.layer(rows[kept])
        return scores.view(-1, 2, 3).mean(1)


def test_training_is_held_to_the_rows_that_the_check_saw(make_private, samples):
    """Half of the rows, which could pass for one row per example."""
    records = samples.take([0, 1])
    records.images[1] = 7
    private = make_private([Release(NAME, None)], records=records)
    with pytest.raises(UserError, match="layer 'layer' is called with another number of rows"):
        next(steps(private, SkipsBlanks()))


def test_networks_that_mix_nothing_pass():
    refuse_mixing(network())
    refuse_mixing(nn.Sequential(nn.InstanceNorm2d(4), nn.LayerNorm(3)))


def test_unplanned_training_is_refused(make_private):
    with pytest.raises(UnplannedRelease):
        next(steps(make_private([Release("query", 1.0)]), network()))


def test_the_plan_of_epochs_and_batches():
    """q = 1/L and T = E L with L = ceil(N / B): the rule behind the published noise multipliers."""
    assert dpsgd_release(NAME, 55_000, 4096, 150) == Release(NAME, None, 1 / 14, 2100)
    assert dpsgd_release(NAME, 269_538, 4096, 50) == Release(NAME, None, 1 / 66, 3300)
    assert dpsgd_release(NAME, 60, 60, 3) == Release(NAME, None, 1.0, 3)
    for wrong in ((60, 0, 1), (60, 10, -1), (60, 1000, 3)):
        with pytest.raises(UserError):
            dpsgd_release(NAME, *wrong)


def test_a_truncated_plan_knows_its_bound_and_the_number_of_records():
    planned = dpsgd_release(NAME, 60, 20, 3, max_batch_size=25)
    assert planned == Release(NAME, None, 1 / 3, 9, max_batch_size=25, num_records=60)
    assert Release(NAME, None, 1 / 3, 9) == dpsgd_release(NAME, 60, 20, 3, None)


@pytest.mark.parametrize(("rate", "bound"), [(0.5, 22), (1.0, 10)])
def test_no_step_reads_more_than_the_bound(make_private, rate, bound):
    plan = Release(NAME, None, rate, 60, max_batch_size=bound, num_records=60)
    private = make_private([plan], noise_seed=1)
    read = sampled(private)
    update(private, None, no_gradient, nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    sizes = [len(indices) for indices in read]
    assert len(sizes) == 60 and max(sizes) == bound


@pytest.mark.parametrize(
    ("sampling", "bound"),
    [("shuffle", None), ("poisson", 5), ("truncated_poisson", None), ("truncated_poisson", 0)],
)
def test_ways_of_sampling_without_an_account_are_refused(sampling, bound):
    with pytest.raises(UserError, match=r"train\.dp\.(sampling|max_batch_size)"):
        DPSGDConfig(None, 64, BOUND, sampling, bound)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.0}, {"n_split": 0}, {"max_physical_batch_size": 0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        config(**options)


# ------------------------------------------------------------------------------------------ the checks catch mutants


def test_missing_clipping_is_caught(make_private, samples, monkeypatch):
    monkeypatch.setattr(per_example, "clip_coefficients", lambda norms, bound: torch.ones_like(norms))
    assert record_moves_the_sum_by(make_private, samples) > 1.1


def test_clipping_by_chunk_instead_of_by_example_is_caught(make_private, samples, monkeypatch):
    per_record = per_example.clip_coefficients

    def by_chunk(norms, bound):
        return per_record(norms.square().sum(0, keepdim=True).sqrt(), bound).expand(len(norms))

    whole = update(make_private([Release(NAME, None)]), config(n_split=5))
    monkeypatch.setattr(per_example, "clip_coefficients", by_chunk)
    assert not torch.allclose(
        whole, update(make_private([Release(NAME, None)]), config(n_split=5)), rtol=1e-2
    )


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1])
def test_noise_of_another_size_is_caught(make_private, monkeypatch, factor):
    stated = RecordAccess.gradient_noise
    monkeypatch.setattr(
        RecordAccess,
        "gradient_noise",
        lambda self, name, size, std, step: stated(self, name, size, std * factor, step),
    )
    assert not in_bounds(noise_ratio(make_private))


def test_noise_per_chunk_is_caught(make_private, monkeypatch):
    per_chunk = dpsgd.clipped_sum

    def noisy(network, per_example_loss, images, labels, bound, rng, **options):
        total, norms = per_chunk(network, per_example_loss, images, labels, bound, rng, **options)
        return {name: value + torch.randn_like(value) * 3.0 * bound for name, value in total.items()}, norms

    monkeypatch.setattr(dpsgd, "clipped_sum", noisy)
    assert not in_bounds(noise_ratio(make_private))
