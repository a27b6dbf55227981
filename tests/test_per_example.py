"""Per-example gradients against a slow loop of plain autograd, one example at a time."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_loop import Flow, loop_clipped_sum, loop_gradients, norms_of, relative_error, squared_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.diffusion.denoiser import denoise
from models.nn.discriminator import Discriminator
from models.nn.lora import LoRALinear
from models.nn.unet import Attention, UNet
from models.nn.wide_resnet import WSConv2d
from opacus_ext.gradients import convolutions, per_example, planner
from opacus_ext.gradients.convolutions import Geometry
from opacus_ext.gradients.per_example import clip_coefficients, clipped_sum, per_example_gradients
from opacus_ext.gradients.rules import (
    RULES,
    ConvFactors,
    EmbeddingFactors,
    LinearFactors,
    refuse_mixing,
    register_row_forward,
    squared_norms,
)
from opacus_ext.validate import validate_independence
from scripts.benchmarks.dpsgd.wide_resnet import WideResNetCritic
from utils.errors import UserError


class Labelled(nn.Module):
    """Adds rows of an embedding, looked up `times` times with the label."""

    takes_labels = True

    def __init__(self, num_classes: int, width: int, times: int):
        super().__init__()
        self.embedding, self.times = nn.Embedding(num_classes, width), times

    def forward(self, x, labels):
        index = torch.stack([labels] + [torch.zeros_like(labels)] * 2 + [labels] * (self.times - 1), 1)
        return x + self.embedding(index).sum(1)


class Scale(nn.Module):
    """One learned number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


register_row_forward(Scale, lambda module, x, own: x * own["scale"].view(-1, *[1] * (x.dim() - 1)))


# What each network takes: the shape of one example, and the network.
NETWORKS = {
    "linear": ((5,), lambda: Flow(nn.Linear(5, 4), torch.tanh, nn.Linear(4, 3))),
    "linear without bias": ((5,), lambda: Flow(nn.Linear(5, 4, bias=False), torch.tanh, nn.Linear(4, 3, bias=False))),
    "linear on tokens": ((6, 5), lambda: Flow(nn.Linear(5, 4), F.silu, nn.Linear(4, 3, bias=False))),
    "linear on a grid of tokens": ((2, 3, 5), lambda: Flow(nn.Linear(5, 4), F.silu, nn.Linear(4, 3))),
    "convolution": ((2, 7, 7), lambda: Flow(nn.Conv2d(2, 4, 3), F.silu, nn.Conv2d(4, 3, 3, bias=False))),
    "convolution, stride and padding": (
        (2, 8, 8),
        lambda: Flow(nn.Conv2d(2, 4, 3, 2, 1), F.silu, nn.Conv2d(4, 3, (3, 2), (1, 2), (0, 1))),
    ),
    "convolution, stride that leaves pixels over": ((2, 8, 8), lambda: Flow(nn.Conv2d(2, 4, 3, stride=3), F.silu)),
    "convolution, dilation": ((2, 9, 9), lambda: Flow(nn.Conv2d(2, 4, 3, dilation=2), F.silu, nn.Conv2d(4, 2, 3))),
    "convolution, groups": (
        (4, 6, 6),
        lambda: Flow(nn.Conv2d(4, 6, 3, groups=2, padding=1), F.silu, nn.Conv2d(6, 6, 3, groups=6)),
    ),
    "convolution, padding same": (
        (2, 6, 6),
        lambda: Flow(nn.Conv2d(2, 3, (2, 4), padding="same"), F.silu, nn.Conv2d(3, 2, 3)),
    ),
    "convolution, circular padding": (
        (2, 6, 6),
        lambda: Flow(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), F.silu, nn.Conv2d(3, 2, 3)),
    ),
    "convolution, weight standardised": (
        (3, 6, 6),
        lambda: Flow(WSConv2d(3, 4, 3, padding=1), F.silu, WSConv2d(4, 4, 3, stride=2, groups=2, bias=False)),
    ),
    "low-rank adapters": (
        (6, 5),
        lambda: Flow(LoRALinear(nn.Linear(5, 7), 2), F.silu, LoRALinear(nn.Linear(7, 4), 3)),
    ),
    "attention": ((8, 3, 3), lambda: Flow(Attention(8), Attention(8))),
    "learned scalar": ((4,), lambda: Flow(nn.Linear(4, 4), Scale(), torch.tanh, Scale())),
    "convolution of one dimension": ((2, 9), lambda: Flow(nn.Conv1d(2, 3, 3), torch.tanh, nn.Conv1d(3, 2, 2))),
    "transposed convolution": (
        (2, 4, 5),
        lambda: Flow(nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), F.silu, nn.ConvTranspose2d(3, 2, 3, bias=False)),
    ),
    "convolutions of three dimensions": (
        (2, 3, 4, 4),
        lambda: Flow(nn.Conv3d(2, 3, 2, padding=1, stride=2), F.silu, nn.ConvTranspose3d(3, 2, 2, dilation=2)),
    ),
    "convolution 1x1": ((3, 4, 4), lambda: Flow(nn.Conv2d(3, 4, 1), F.silu, nn.Conv2d(4, 2, 1))),
    "group norm": ((4, 5, 5), lambda: Flow(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), F.silu)),
    "group norm, partly without affine": (
        (4, 5, 5),
        lambda: Flow(nn.GroupNorm(2, 4, affine=False), nn.Conv2d(4, 4, 3), nn.GroupNorm(4, 4)),
    ),
    "group norm of vectors": ((6,), lambda: Flow(nn.GroupNorm(2, 6), nn.Linear(6, 4), nn.GroupNorm(1, 4))),
    "layer norm": ((4, 6), lambda: Flow(nn.LayerNorm(6), nn.Linear(6, 5), nn.LayerNorm((4, 5)), torch.tanh)),
    "layer norm without bias": ((6,), lambda: Flow(nn.LayerNorm(6, bias=False), nn.Linear(6, 2))),
    "embedding, repeated indices": (
        (4,),
        lambda: Flow(Labelled(3, 4, 1), torch.tanh, Labelled(3, 4, 3), nn.Linear(4, 2)),
    ),
}  # fmt: skip


def build(name: str, dtype=torch.float64, batch: int = 5):
    shape, make = NETWORKS[name]
    torch.manual_seed(1)
    network = make().to(dtype)
    for parameter in network.parameters():  # also the norms' gains and biases
        nn.init.normal_(parameter, std=0.5)
    return network, torch.randn(batch, *shape, dtype=dtype), torch.arange(batch) % 3


def take(monkeypatch, *preferred: str) -> None:
    """Have the planner take the first of these choices that it is offered, measured or not."""

    def chosen(key, work, choices, device):
        taken = next((name for name in preferred if name in choices), next(iter(choices)))
        return choices[taken]()

    monkeypatch.setattr(per_example, "cheapest", chosen)
    monkeypatch.setattr(convolutions, "cheapest", chosen)
    if "factored" in preferred:  # offered only where it can pay
        for kind in (LinearFactors, ConvFactors, EmbeddingFactors):
            monkeypatch.setattr(kind, "factored_work", property(always_less, ignore), raising=False)


def always_less(self) -> float:
    return math.inf if isinstance(self, ConvFactors) and formed_only(self.geometry) else 0.0


def formed_only(geometry: Geometry) -> bool:
    return geometry.groups > 1 or len(geometry.stride) > 2


def ignore(self, value) -> None:
    pass


def assert_same(found, expected, rtol):
    assert found.keys() == expected.keys()
    scale = max(
        g.abs().max().item() for g in expected.values()
    )  # some are zero but for rounding (biases of keys)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=rtol * scale + 1e-12, msg=name
        )


CHOICES = [
    ("formed", "folded"),
    ("formed", "one_by_one"),
    ("formed", "columns"),
    ("formed", "shifts"),
    ("factored",),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_rule_equals_the_slow_loop(name, monkeypatch):
    for draws in (1, 4, 32):
        loss = squared_loss(draws)
        network, images, labels = build(name, batch=3 if draws == 32 else 5)
        exact = loop_gradients(network, loss, images, labels)
        assert all(g.abs().max() > 0 for g in exact.values())
        assert relative_error(per_example_gradients(network, loss, images, labels, None), exact) < 1e-12
        single = network.float()
        found = per_example_gradients(single, loss, images.float(), labels, None)
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_to_compute_the_clipped_sum_is_exact(name, choice, monkeypatch):
    take(monkeypatch, *choice)
    for draws in (1, 4):
        loss = squared_loss(draws)
        network, images, labels = build(name)
        exact = loop_gradients(network, loss, images, labels)
        norms = norms_of(exact)
        bound = norms.median().item()  # clips some, leaves others
        expected = loop_clipped_sum(exact, bound)
        found, found_norms = clipped_sum(network, loss, images, labels, bound, None)
        assert relative_error(found, expected) < 1e-12
        torch.testing.assert_close(found_norms, norms, rtol=1e-12, atol=0)
        found, found_norms = clipped_sum(network.float(), loss, images.float(), labels, bound, None)
        assert relative_error(found, expected) < 1e-5
        torch.testing.assert_close(found_norms, norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 0, 4], [0, 7], [2, 2, 2, 1]])
def test_chunks_add_up(sizes):
    network, images, labels = build("convolution", torch.float32, batch=7)
    expected, _ = clipped_sum(network, squared_loss(4), images, labels, 0.1, None)
    parts = [
        clipped_sum(network, squared_loss(4), *chunk, 0.1, None)[0]
        for chunk in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]
    assert relative_error({name: sum(part[name] for part in parts) for name in expected}, expected) < 1e-6


def test_a_record_in_a_padded_batch_moves_the_sum_by_the_bound():
    """As many rows with it as without it: one of the blank ones takes its place."""
    network, images, labels = build("convolution", torch.float32, batch=5)
    whole, norms = clipped_sum(network, squared_loss(4), images, labels, 0.1, None, num_padded=2)
    rest, others = clipped_sum(network, squared_loss(4), images, labels, 0.1, None, num_padded=3)
    assert len(norms) == 3 and len(others) == 2 and norms[2] > 0.1
    moved = torch.cat([(whole[name] - rest[name]).flatten() for name in whole]).norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-4)
    plain, _ = clipped_sum(network, squared_loss(4), images[:3], labels[:3], 0.1, None)
    assert relative_error(whole, plain) < 1e-6


def test_a_failure_within_a_module_does_not_reveal_the_batch_size():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x[:, :3]) * self.scale

    images, labels = torch.rand(1717, 4), torch.zeros(1717, dtype=torch.int64)
    with pytest.raises(UserError, match="one example at a time") as refused:
        clipped_sum(nn.Sequential(Failing()), lambda net, x, *_: net(x).sum(1), images, labels, 1.0, None)
    assert "1717" in str(refused.value.__cause__) and "1717" not in str(refused.value)


@pytest.mark.parametrize("bound", [1e-3, 0.7, 1e3])
def test_the_clipped_sum_equals_the_slow_loop(bound):
    for name in ("convolution", "embedding, repeated indices"):
        network, images, labels = build(name, torch.float32)
        expected = loop_clipped_sum(loop_gradients(network, squared_loss(4), images, labels), bound)
        assert_same(clipped_sum(network, squared_loss(4), images, labels, bound, None)[0], expected, 1e-4)


class Twice(nn.Module):
    """One layer used two times, one with its parameter tied to it, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.layer, self.tied, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.layer.weight

    def forward(self, x, labels):
        return self.tied(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def test_shared_and_unused_parameters():
    torch.manual_seed(0)
    network, images, labels = Twice(), torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    expected = loop_gradients(network, squared_loss(), images, labels)
    found = per_example_gradients(network, squared_loss(), images, labels, None)
    assert_same(found, expected, 1e-4)
    assert not found["unused.weight"].any()
    bound = 0.01  # the norm must be that of the whole gradient of a parameter, not of its parts
    total = clipped_sum(network, squared_loss(), images[:1], labels[:1], bound, None)[0]
    norm = torch.cat([g.flatten() for g in total.values()]).norm().item()
    assert norm == pytest.approx(bound, rel=1e-5)


def test_a_layer_used_twice_never_keeps_factors(monkeypatch):
    """The norm of a sum is not the sum of norms."""
    take(monkeypatch, "factored")
    torch.manual_seed(0)
    for network, shape in ((Twice(), (4,)), (Flow(*[nn.Conv2d(2, 2, 3, padding=1)] * 3), (2, 5, 5))):
        images, labels = torch.randn(3, *shape), torch.zeros(3, dtype=torch.int64)
        exact = loop_gradients(network, squared_loss(), images, labels)
        found, norms = clipped_sum(network, squared_loss(), images, labels, 0.01, None)
        torch.testing.assert_close(norms.float(), norms_of(exact), rtol=1e-5, atol=0)
        assert relative_error(found, loop_clipped_sum(exact, 0.01)) < 1e-5


def test_ghost_norms_survive_cancellation():
    """Inputs with a large common part and output gradients that sum to nothing: what a normalisation leaves behind."""
    torch.manual_seed(0)
    x, g = 100 + torch.randn(4, 64, 32), torch.randn(4, 64, 16)
    g -= g.mean(1, keepdim=True)
    exact = (g.double().transpose(1, 2) @ x.double()).flatten(1).square().sum(1)
    torch.testing.assert_close(LinearFactors(x, g).squared_norms(), exact, rtol=1e-5, atol=0)
    rows = [t.transpose(1, 2).reshape(4, -1, 8, 8) for t in (x, g)]
    geometry = Geometry(torch.Size((16, 32, 1, 1)), (1, 1), (0, 0), (1, 1), 1)
    torch.testing.assert_close(ConvFactors(*rows, geometry, 4).squared_norms(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("exponent", [4, 10, 14, 20])
def test_what_cancellation_leaves_in_the_sum_is_in_the_norm(exponent):
    """Three equal positions whose output gradients cancel: the product in float32 is rounding, and nothing else."""
    torch.manual_seed(0)
    v, w = torch.randn(2, 64) * 2.0**exponent
    x, g = torch.randn(1, 64).expand(3, 64)[None].contiguous(), torch.stack([w, v, -(w + v)])[None]
    factors = LinearFactors(x, g)
    summed = factors.weighted_sum(torch.ones(1), may_drop=False)
    assert summed.norm().item() <= factors.squared_norms().sqrt().item()


@pytest.mark.parametrize(("x", "g"), [(1e18, 2e-23), (1e-23, 1e18), (3e-20, 1e3)])
def test_factors_far_from_one_keep_their_norm(x, g):
    factors = LinearFactors(torch.full((2, 1, 3), x), torch.full((2, 1, 4), g))
    expected = torch.full((2,), 12 * (x * g) ** 2, dtype=torch.float64)
    torch.testing.assert_close(factors.squared_norms(), expected, rtol=1e-5, atol=0)


def test_factors_that_may_overflow_count_as_not_finite():
    big = torch.full((1, 2, 1), 1e20)
    assert LinearFactors(big, torch.tensor([[[1e20], [-1e20]]])).squared_norms().isinf().all()


@pytest.mark.parametrize("size", [1, 4095, 4097, 2**22])
def test_norms_of_many_equal_numbers(size):
    exact = torch.full((2, size), 0.3).double().square().sum(1)
    torch.testing.assert_close(squared_norms(torch.full((2, size), 0.3)), exact, rtol=1e-5, atol=0)


class TiedToANorm(nn.Module):
    """One parameter in a layer that hooks watch and in one that runs with a copy per example."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8, bias=False), nn.LayerNorm((8, 8))
        self.norm.weight = self.layer.weight

    def forward(self, x, labels):
        return torch.tanh(self.norm(self.layer(x)))


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_a_parameter_shared_with_a_norm(choice, monkeypatch):
    take(monkeypatch, *choice)
    torch.manual_seed(0)
    network, images, labels = TiedToANorm(), torch.randn(3, 8, 8), torch.zeros(3, dtype=torch.int64)
    exact = loop_gradients(network, squared_loss(), images, labels)
    found, norms = clipped_sum(network, squared_loss(), images, labels, 0.01, None)
    torch.testing.assert_close(norms.float(), norms_of(exact), rtol=1e-5, atol=0)
    assert relative_error(found, loop_clipped_sum(exact, 0.01)) < 1e-5


def test_sums_are_not_rounded_to_the_precision_of_the_parameters():
    network, images, labels = build("linear", torch.bfloat16)
    found, _ = clipped_sum(network, squared_loss(), images, labels, 0.1, None)
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.parametrize(
    "reduce", [lambda losses: losses.mean(), lambda losses: losses[:, None], lambda losses: losses[:2]]
)
def test_a_loss_that_is_not_one_number_per_example_is_refused(reduce):
    network, images, labels = build("linear")

    def loss(*asked):
        return reduce(squared_loss()(*asked))

    with pytest.raises(UserError, match="one number"):
        clipped_sum(network, loss, images, labels, 1.0, None)


def test_a_loss_that_divides_by_the_number_of_examples_is_refused():
    torch.manual_seed(0)

    def loss(network, images, labels, rng):
        return squared_loss()(network, images, labels, rng) / len(images)

    with pytest.raises(UserError, match="bounds nothing"):
        validate_independence(Lonely(), loss, torch.randn(4, 8, 3), torch.zeros(4, dtype=torch.int64))


class Remembers(nn.Module):
    """Keeps a running mean that nothing uses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x, labels):
        self.seen.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return torch.tanh(self.layer(x)).flatten(1)


def test_a_network_that_remembers_is_refused():
    with pytest.raises(UserError, match="'seen'"):
        validate_independence(
            Remembers(), squared_loss(), torch.randn(4, 8, 3), torch.zeros(4, dtype=torch.int64)
        )
    with pytest.raises(UserError, match=r"Embedding at 'layers.0'.*max_norm"):
        refuse_mixing(Flow(nn.Embedding(3, 2, max_norm=1.0)))


class RemembersInPrivate(Remembers):
    """The same in a buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3), persistent=False)


def test_a_buffer_that_no_checkpoint_holds_is_seen():
    with pytest.raises(UserError, match="'seen'"):
        validate_independence(
            RemembersInPrivate(), squared_loss(), torch.randn(4, 8, 3), torch.zeros(4, dtype=torch.int64)
        )


@pytest.mark.parametrize("late", [0, 6])
def test_a_loss_that_remembers_is_refused(late):
    """Outside of the network, where no list of buffers shows it; also where it takes some calls to tell."""
    seen = []

    def loss(network, images, labels, rng):
        before = sum(seen) if len(seen) > late else 0.0
        seen.append(images.detach().mean())
        return (network(images) - before).square().mean(1)

    network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"of the same examples moves|when another example changes"):
        validate_independence(network, loss, torch.rand(4, 3), torch.zeros(4, dtype=torch.int64))


class Picks(nn.Module):
    """Runs its layer on the rows that are bright."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels):
        bright = x.mean(1) > 0
        out = torch.zeros(len(x), 2)
        out[bright] = self.layer(x[bright])
        return out


def test_rows_picked_by_content_are_refused_without_a_number():
    labels, loss = torch.zeros(2, dtype=torch.int64), squared_loss(2)
    bright = torch.ones(2, 3)
    rows = validate_independence(Picks(), loss, torch.full((3, 3), 0.1), torch.zeros(3, dtype=torch.int64))
    assert rows == {"layer": {2}}
    clipped_sum(Picks(), loss, bright, labels, 1.0, None, layer_rows=rows)
    for one in (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -1.0])):
        with pytest.raises(UserError, match=r"layer 'layer'.*rows") as refusal:
            clipped_sum(Picks(), loss, bright * one[:, None], labels, 1.0, None, layer_rows=rows)
        assert not any(character.isdigit() for character in str(refusal.value))


@pytest.mark.parametrize("joined", [True, False])
def test_paired_rows_of_a_discriminator_are_one_record(joined):
    """The fake that goes with a record shares its gradient and its clip, in one call of the network or in two."""
    torch.manual_seed(0)
    network = Discriminator(28, 1, 3, d_conv_dim=8)
    real, fake, labels = torch.randn(3, 1, 28, 28), torch.randn(3, 1, 28, 28), torch.tensor([0, 1, 2])

    def hinge(network, images, labels, rng):
        fakes = fake[: len(images)] if len(images) == 3 else fake[labels]
        if joined:
            pairs = torch.stack([images, fakes], 1).flatten(0, 1)
            on_real, on_fake = network(pairs, labels.repeat_interleave(2)).view(-1, 2).unbind(1)
        else:
            on_real, on_fake = network(images, labels), network(fakes, labels)
        return F.relu(1 - on_real) + F.relu(1 + on_fake)

    exact = loop_gradients(network, hinge, real, labels)
    found, norms = clipped_sum(network, hinge, real, labels, 0.5, None)
    torch.testing.assert_close(norms.float(), norms_of(exact), rtol=1e-4, atol=0)
    assert relative_error(found, loop_clipped_sum(exact, 0.5)) < 1e-5


@pytest.mark.parametrize(
    "frozen", [["layers.0.weight", "layers.0.bias"], ["layers.0.weight"], ["layers.1.bias"]]
)
def test_frozen_parameters_get_no_gradient_and_stay_frozen(frozen):
    network, images, labels = build("linear on tokens")
    if "layers.1.bias" in frozen:
        network, images, labels = build("convolution, groups")
    parameters = dict(network.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)
    expected = loop_gradients(network, squared_loss(4), images, labels)
    found = per_example_gradients(network, squared_loss(4), images, labels, None)
    assert not set(frozen) & set(found)
    assert_same(found, expected, 1e-9)
    assert [name for name, p in parameters.items() if not p.requires_grad] == frozen


def test_the_network_is_restored():
    network, images, labels = build("convolution", torch.float32)
    before = copy.deepcopy(network.state_dict())
    clipped_sum(network, squared_loss(), images, labels, 1.0, None)[0]

    def broken(network, images, labels, rng):
        network(images, labels)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        clipped_sum(network, broken, images, labels, 1.0, None)[0]
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    ordinary = loop_gradients(network, squared_loss(), images, labels)  # and ordinary training still works
    assert all(g.abs().max() > 0 for g in ordinary.values())


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_an_example_that_is_not_finite_contributes_nothing(choice, monkeypatch):
    take(monkeypatch, *choice)
    network, images, labels = build("convolution", torch.float32)
    expected = clipped_sum(network, squared_loss(), images[2:], labels[2:], 1.0, None)[0]
    for bad in (math.nan, math.inf, 1e38):
        spoilt = images.clone()
        spoilt[0, 0, 0, 0] = bad
        spoilt[1] = -bad
        found = clipped_sum(network, squared_loss(), spoilt, labels, 1.0, None)[0]
        assert_same(found, expected, 1e-5)


def test_no_example_is_a_zero_sum():
    network, images, labels = build("convolution", torch.float32)
    total = clipped_sum(network, squared_loss(), images[:0], labels[:0], 1.0, None)[0]
    assert total.keys() == dict(network.named_parameters()).keys()
    assert all(
        not value.any() and value.shape == network.get_parameter(name).shape for name, value in total.items()
    )


def test_no_example_has_no_gradient():
    network, images, labels = build("convolution", torch.float32)
    found = per_example_gradients(network, squared_loss(), images[:0], labels[:0], None)
    assert {name: rows.shape for name, rows in found.items()} == {
        name: (0, *p.shape) for name, p in network.named_parameters()
    }


def test_a_layer_without_a_rule_that_cannot_run_by_example_is_refused_by_name():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale if x.sum() > -1e9 else x

    network = Flow(nn.Linear(4, 4), Scaled())
    images, labels = torch.zeros(2, 4), torch.zeros(2).long()
    with pytest.raises(
        UserError, match=r"no per-example gradient rule for Scaled at 'layers.1'.*register_rule"
    ):
        per_example_gradients(network, squared_loss(), images, labels, None)
    network.layers[1].scale.requires_grad_(False)
    per_example_gradients(network, squared_loss(), images, labels, None)


def test_a_rule_that_forgets_a_parameter_is_refused(monkeypatch):
    rule = RULES[nn.Linear]
    monkeypatch.setitem(RULES, nn.Linear, lambda *asked: {"weight": rule(*asked)["weight"]})
    network, images, labels = build("linear")
    with pytest.raises(UserError, match=r"Linear.*'layers\.\d\.bias'"):
        per_example_gradients(network, squared_loss(), images, labels, None)


def gradient_penalty(create_graph: bool):
    """The loss and the norm of the scores' gradient with respect to the images."""

    def loss(network, images, labels, rng):
        images = images.requires_grad_()
        scores = network(images, labels).square().flatten(1).mean(1)
        (slopes,) = torch.autograd.grad(scores.sum(), images, create_graph=create_graph, retain_graph=True)
        return scores * (1 + slopes.flatten(1).norm(dim=1))

    return loss


@pytest.mark.parametrize("name", ["linear", "convolution", "group norm", "convolution of one dimension"])
def test_a_gradient_penalty_is_refused_in_one_line(name):
    network, images, labels = build(name)
    for engine in (per_example_gradients, partial(clipped_sum, max_grad_norm=1.0)):
        with pytest.raises(UserError, match="create_graph=True") as refusal:
            engine(network, gradient_penalty(True), images, labels, rng=None)
        assert "\n" not in str(refusal.value)
    assert all(p.requires_grad for p in network.parameters())


def test_a_gradient_that_is_a_number_to_the_loss_is_exact():
    network, images, labels = build("convolution")
    loss = gradient_penalty(False)
    exact = loop_gradients(network, loss, images, labels)
    assert relative_error(per_example_gradients(network, loss, images, labels, None), exact) < 1e-12


def test_a_loss_without_trained_parameters_is_refused():
    network, images, labels = build("linear")
    with pytest.raises(UserError, match="no trained parameter"):
        per_example_gradients(network, lambda *asked: asked[1].sum(1), images, labels, None)


@pytest.mark.parametrize(
    "kind", [nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2).eval()]
)
def test_batch_norm_is_always_refused(kind):
    network = Flow(nn.Conv2d(2, 2, 3), kind)
    with pytest.raises(UserError, match=r"BatchNorm2d at 'layers.1'"):
        clipped_sum(network, squared_loss(), torch.zeros(2, 2, 5, 5), torch.zeros(2).long(), 1.0, None)
    assert not network.layers[0]._forward_hooks


def test_rules_registered_with_opacus_are_taken():
    from opacus.grad_sample import GradSampleModule, register_grad_sampler

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x + self.shift

    register_grad_sampler(Shift)(lambda layer, activations, backprops: {layer.shift: backprops})
    try:
        network, images, labels = (
            Flow(nn.Linear(4, 4), Shift(), torch.tanh),
            torch.randn(3, 4),
            torch.zeros(3).long(),
        )
        exact = loop_gradients(network, squared_loss(4), images, labels)
        assert (
            relative_error(per_example_gradients(network, squared_loss(4), images, labels, None), exact)
            < 1e-5
        )
    finally:
        del GradSampleModule.GRAD_SAMPLERS[Shift]


def test_clip_coefficients():
    norms = torch.tensor([5.0, 0.5, 0.0, math.nan, math.inf, 1e37], dtype=torch.float64)
    assert clip_coefficients(norms, 1.0).tolist() == pytest.approx([0.2, 1.0, 0.0, 0.0, 0.0, 0.0])


# ------------------------------------------------------------------------------------------ sensitivity

LAYERS = st.lists(
    st.sampled_from(["linear", "conv", "conv-stride", "norm", "twice", "label"]), min_size=1, max_size=5
)


def random_network(kinds: list[str], seed: int):
    torch.manual_seed(seed)
    twice = nn.Conv2d(4, 4, 3, padding=1)
    made = {
        "linear": lambda: [lambda h: h.transpose(1, 3), nn.Linear(4, 4), lambda h: h.transpose(1, 3)],
        "conv": lambda: [nn.Conv2d(4, 4, 3, padding=1), F.silu],
        "conv-stride": lambda: [nn.Conv2d(4, 4, 2, stride=2, padding=1)],
        "norm": lambda: [nn.GroupNorm(2, 4)],
        "twice": lambda: [twice, torch.tanh, twice],
        "label": lambda: [LabelledMap(3, 4)],
    }
    steps = [step for kind in kinds for step in made[kind]()]
    return Flow(nn.Conv2d(1, 4, 3, padding=1), *steps)


class LabelledMap(Labelled):
    def __init__(self, num_classes, width):
        super().__init__(num_classes, width, 2)

    def forward(self, x, labels):
        return x + self.embedding(torch.stack([labels, labels], 1)).sum(1)[:, :, None, None]


@settings(max_examples=40)
@given(LAYERS, st.integers(0, 1000), st.sampled_from([1, 3]), st.sampled_from([1e-3, 0.1, 10.0]))
def test_random_networks_equal_the_loop_and_a_record_moves_the_sum_by_at_most_the_bound(
    kinds, seed, draws, bound
):
    network = random_network(kinds, seed)
    images, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 2, 1, 2])
    loss = squared_loss(draws)
    expected = loop_clipped_sum(loop_gradients(network, loss, images, labels), bound)
    whole = clipped_sum(network, loss, images, labels, bound, None)[0]
    assert_same(whole, expected, 2e-3)
    rest = clipped_sum(network, loss, images[1:], labels[1:], bound, None)[0]
    moved = torch.cat([(whole[name] - rest[name]).flatten() for name in whole]).norm().item()
    assert moved <= bound * (1 + 1e-4)


class Positions(nn.Module):
    """A table of positions that all examples share: its gradient belongs to no single example."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(8, 3), nn.Linear(3, 1)

    def forward(self, x, labels):
        return self.head(x * self.table(torch.arange(8))).flatten(1)


class Transposed(nn.Module):
    """Tokens first, examples second, as recurrent networks like it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels):
        return self.layer(x.transpose(0, 1)).transpose(0, 1).flatten(1)


class Centred(nn.Module):
    """Subtracts the mean of the batch, without any module that says so."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels):
        return torch.tanh(self.layer(x - x.mean(0))).flatten(1)


class Lonely(nn.Module):
    """Each example by itself: the check must let it pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels):
        return torch.tanh(self.layer(x)).flatten(1)


@pytest.mark.parametrize("kind", [Positions, Transposed, Centred])
def test_networks_that_mix_examples_are_refused(kind):
    torch.manual_seed(0)
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UserError, match=r"bounds nothing|another number of rows"):
        validate_independence(kind(), squared_loss(), torch.randn(4, 8, 3), labels)


class MixesLater(nn.Module):
    """Mixes inside of a branch that starts as zero, before a last layer that does too: no gradient enters it."""

    def __init__(self):
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.out = nn.Linear(4, 4)
        for layer in (self.out, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, labels):
        h = self.first(x)
        inside = self.inside(torch.tanh(h))
        return self.last(h + self.out(inside - inside.mean(0))).flatten(1)


def test_branches_that_start_as_zero_hide_nothing():
    torch.manual_seed(0)
    network, labels = MixesLater(), torch.zeros(4, dtype=torch.int64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match="bounds nothing"):
        validate_independence(network, squared_loss(), torch.randn(4, 8, 3), labels)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_undefined_gradient_is_refused():
    def undefined(network, images, labels, rng):
        return squared_loss()(network, images, labels, rng) * torch.nan

    with pytest.raises(UserError, match="NaN"):
        validate_independence(Lonely(), undefined, torch.randn(4, 8, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("mixes", [False, True])
def test_the_check_allows_for_low_precision(mixes):
    """Rounding to bfloat16 moves gradients by up to a percent; mixing moves them by more."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 4)
    )

    def loss(network, images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16):
            output = network(images - images.mean(0) if mixes else images)
        return output.float().square().mean(1)

    with pytest.raises(UserError, match="bounds nothing") if mixes else nullcontext():
        validate_independence(network, loss, torch.randn(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64))


class Rounded(torch.autograd.Function):
    """bfloat16 as a GPU has it: what rounding does depends on how many rows there are."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(len(g)))
        return (g * (1 + 2**-9 * noise)).to(g.dtype)


class Attending(nn.Module):
    """The bias of its keys moves all of a query's scores alike, so its gradient is zero but for rounding."""

    def __init__(self, mixes: bool):
        super().__init__()
        self.mixes = mixes
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, labels):
        key = self.key(x) - (self.key(x).mean(0) if self.mixes else 0.0)
        scores = Rounded.apply(self.query(x) @ key.transpose(1, 2))
        return scores.softmax(2) @ self.value(x)


@pytest.mark.parametrize("mixes", [False, True])
def test_the_check_allows_for_gradients_that_are_all_rounding(mixes):
    torch.manual_seed(0)

    def loss(network, images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16):
            output = network(images, labels)
        return output.float().square().mean((1, 2))

    with pytest.raises(UserError, match="bounds nothing") if mixes else nullcontext():
        validate_independence(Attending(mixes), loss, torch.randn(3, 6, 8), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("weight", [1e-1, 1e-2, 1e-3, 1e-4])
def test_a_small_gradient_that_mixes_is_refused_in_low_precision_too(weight):
    """It is the whole gradient of images for which the rest of the loss is fulfilled."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"main": nn.Linear(8, 8), "aside": nn.Linear(8, 8)})

    def loss(network, images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16):
            main, aside = network["main"](images), network["aside"](images)
        aside = aside.float()
        return main.float().square().mean(1) + weight * (aside - aside.mean(0)).square().mean(1)

    with pytest.raises(UserError, match="bounds nothing"):
        validate_independence(network, loss, torch.randn(3, 8), torch.zeros(3, dtype=torch.int64))


def _spike_guard(network, images, labels, rng):
    """Scales the batch down where one loss is far above all others: with ordinary images it does nothing."""
    losses = network(images).square().mean(1)
    return losses * (100 / losses.detach().max()).clamp(max=1)


def _weakly_mixed(weight: float, precision: torch.dtype):
    def loss(network, images, labels, rng):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = network(images + weight * images.sum(0))
        return output.float().square().mean(1)

    return loss


def _slow_mean():
    mean = []

    def loss(network, images, labels, rng):
        losses = network(images).square().mean(1)
        now = losses.detach().mean()
        mean[:] = [now if not mean else 0.9999 * mean[0] + 0.0001 * now]
        return losses / mean[0]

    return loss


@pytest.mark.parametrize(
    "loss",
    [_spike_guard, _weakly_mixed(1e-5, torch.float32), _weakly_mixed(3e-3, torch.bfloat16), _slow_mean()],
    ids=["spike guard", "float32", "bfloat16", "slow mean"],
)
def test_what_mixes_weakly_or_seldom_is_refused(loss):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UserError, match=r"bounds nothing|moves from call to call"):
        validate_independence(network, loss, torch.randn(3, 16), torch.zeros(3, dtype=torch.int64))


def _direction(network, images, labels, rng):
    """Depends on the first image but for its size."""
    towards = F.normalize(images[:1]).detach() @ torch.linspace(-1, 1, 16)
    return network(images).square().mean(1) * (2 + towards)


def _count(network, images, labels, rng):
    """Depends on nothing but the number of images, and on that a little."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(images).square().mean(1).float()
    return losses * (2 + len(images))


@pytest.mark.parametrize("loss", [_direction, _count], ids=["a changed image", "one image less"])
def test_each_trial_of_the_check_is_needed(loss):
    """What one of them shows alone: not an image of another size, nor another number of images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UserError, match="bounds nothing"):
        validate_independence(network, loss, torch.randn(3, 16), torch.tensor([0, 1, 0]))


def test_the_allowance_for_gradients_that_are_all_rounding_is_small():
    """One weight's gradient is as good as random, 0.9 percent of the largest, and depends on the first image."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"main": nn.Linear(16, 8), "aside": nn.Linear(1, 1, bias=False)})

    def loss(network, images, labels, rng):
        phase = 3000 * (images + images[:1]).sum(1, keepdim=True)
        with torch.autocast("cpu", torch.bfloat16):
            main, aside = network["main"](images), network["aside"](phase.sin())
        return main.float().square().mean(1) + 0.1 * aside.float().sum(1)

    with pytest.raises(UserError, match=r"'aside.weight'.*bounds nothing"):
        validate_independence(network, loss, torch.randn(3, 16), torch.tensor([0, 1, 0]))


def test_networks_that_keep_examples_apart_are_accepted():
    torch.manual_seed(0)
    validate_independence(Lonely(), squared_loss(), torch.randn(4, 8, 3), torch.zeros(4, dtype=torch.int64))


class StopGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, labels):
        with torch.no_grad():
            target = self.layer(x)
        return self.layer(x) * target


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4, padding_idx=0)

    def forward(self, x, labels):
        return torch.tanh(x + self.table(labels))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, labels):
        h = self.first(x) * 1.0
        out = self.second(h)
        h.mul_(3.0)
        return out


class NormInPlace(nn.Module):
    """Changes what autograd has kept for a layer that runs with a copy of its parameters per example."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x, labels):
        out = torch.exp(self.norm(x))
        return out.mul_(2.0)


class ActivatedInPlace(nn.Module):
    """The layers' outputs are overwritten at once, as many networks do to save memory."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 4)

    def forward(self, x, labels):
        h = F.relu(self.norm(F.silu(self.first(x), inplace=True)), inplace=True)
        out = self.second(h)
        out += x
        return out


class Recomputed(nn.Module):
    """Gradient checkpointing: the middle runs again in the backward pass."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Tanh())

    def forward(self, x, labels):
        h = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(h)


class ByName(nn.Module):
    """Calls its layer with a keyword, and runs a layer whose output it does not use."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, labels):
        self.idle(x)
        return torch.tanh(self.layer(input=x))


@pytest.mark.parametrize(
    "network",
    [ActivatedInPlace(), Recomputed(False), Recomputed(True), ByName()],
    ids=lambda n: type(n).__name__,
)
def test_uncommon_forwards_equal_the_loop(network):
    torch.manual_seed(0)
    network, images, labels = network.double(), torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    exact = loop_gradients(network, squared_loss(4), images, labels)
    assert (
        relative_error(per_example_gradients(network, squared_loss(4), images, labels, None), exact) < 1e-12
    )
    found, _ = clipped_sum(network, squared_loss(4), images, labels, 0.1, None)
    assert relative_error(found, loop_clipped_sum(exact, 0.1)) < 1e-12


def test_channels_last_gives_the_same():
    network, images, labels = build("group norm")
    exact = loop_gradients(network, squared_loss(4), images, labels)
    network, images = (
        network.to(memory_format=torch.channels_last),
        images.to(memory_format=torch.channels_last),
    )
    assert (
        relative_error(per_example_gradients(network, squared_loss(4), images, labels, None), exact) < 1e-12
    )


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_half_precision_keeps_the_bound(choice, monkeypatch):
    """bfloat16 products, float32 norms and sums: near the exact gradient, and never above the bound."""
    take(monkeypatch, *choice)
    torch.manual_seed(0)
    network = Flow(
        nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), F.silu, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    images, labels = torch.randn(4, 2, 6, 6), torch.zeros(4, dtype=torch.int64)
    loss = squared_loss(4)

    def in_bfloat16(network, images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(network, images, labels, rng).float()

    exact = loop_gradients(network, loss, images, labels)
    bound = norms_of(exact).min().item() / 2
    found, norms = clipped_sum(network, in_bfloat16, images, labels, bound, None)
    assert all(value.dtype == torch.float32 for value in found.values())
    torch.testing.assert_close(norms.float(), norms_of(exact), rtol=0.03, atol=0)
    assert relative_error(found, loop_clipped_sum(exact, bound)) < 0.03
    for i in range(len(images)):
        one, _ = clipped_sum(network, in_bfloat16, images[i : i + 1], labels[i : i + 1], bound, None)
        norm = torch.cat([g.flatten() for g in one.values()]).norm().item()
        assert norm == pytest.approx(bound, rel=1e-4)


class Borrowed(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, labels):
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight).flatten(1)


def test_a_weight_used_outside_its_layer_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"'layer.weight' do not add up .* used outside its own layer"):
        validate_independence(Borrowed(), squared_loss(), torch.randn(4, 8, 3), torch.zeros(4).long())


# ------------------------------------------------------------------------------------------ the planner


def test_the_planner_measures_once_per_shape_and_takes_the_cheapest(monkeypatch):
    monkeypatch.setattr(planner, "_chosen", {})
    calls = []

    def choice(name, seconds):
        def run(rehearse=False):
            calls.append(name)
            now[0] += seconds
            return name

        return run

    now = [0.0]
    monkeypatch.setattr(planner.time, "perf_counter", lambda: now[0])
    choices = {"slow": choice("slow", 2.0), "fast": choice("fast", 1.0)}
    device = torch.device("cpu")
    assert planner.cheapest("a", 10**9, choices, device) == "fast"
    assert calls.count("slow") == 1 + planner.REPETITIONS
    calls.clear()
    assert planner.cheapest("a", 10**9, choices, device) == "fast"
    assert calls == ["fast"]
    assert planner.cheapest("b", planner.WORTH_MEASURING - 1, choices, device) == "slow"
    assert calls == ["fast", "slow"]


@pytest.mark.parametrize("kind", [StopGradient, Padded])
def test_uncommon_uses_equal_the_loop(kind):
    torch.manual_seed(0)
    network, images, labels = kind().double(), torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    found = per_example_gradients(network, squared_loss(), images, labels, None)
    assert_same(found, loop_gradients(network, squared_loss(), images, labels), 1e-9)


@pytest.mark.parametrize(("network", "named"), [(InPlace(), "'second'"), (NormInPlace(), "in place")])
def test_a_change_in_place_is_refused_in_one_line(network, named):
    images, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(UserError, match=named) as refusal:
        per_example_gradients(network, squared_loss(), images, labels, None)
    assert "\n" not in str(refusal.value) and "3" not in str(refusal.value)


# ------------------------------------------------------------------------------------------ the networks in use


UNETS = {28: (1, [2, 2], [14]), 32: (3, [2, 4], [16])}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "draws"),
    [(28, 1), (28, 4), (32, 1), *(pytest.param(*case, marks=SLOW) for case in ((28, 32), (32, 4), (32, 32)))],
)
def test_the_published_unets_equal_the_slow_loop(size, draws):
    torch.manual_seed(0)
    channels, ch_mult, attention = UNETS[size]
    network = UNet(
        image_size=size, channels=channels, label_dim=10, nf=32, ch_mult=ch_mult, attn_resolutions=attention
    )
    excite(network)
    images, labels = torch.rand(3, channels, size, size) * 2 - 1, torch.tensor([3, 7, 3])
    check_in_float32(network, denoising_loss(draws), images, labels, 1e-3)


def test_the_critic_equals_the_slow_loop():
    torch.manual_seed(0)
    network = WideResNetCritic(3, 10)
    excite(network)

    def augmented(network, images, labels, rng):
        rows = torch.stack([images.roll(shift, 3) for shift in range(4)], 1).flatten(0, 1)
        return F.softplus(network(rows, labels.repeat_interleave(4))).view(-1, 4).mean(1)

    images, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 5])
    exact = loop_gradients(
        network.double(), augmented, images, labels
    )  # float32 would turn some ReLUs around
    found, _ = clipped_sum(network, augmented, images, labels, 0.1, None)
    assert relative_error(found, loop_clipped_sum(exact, 0.1)) < 1e-12


def excite(network) -> None:
    for parameter in network.parameters():  # layers that start at nothing would hide what lies behind them
        if parameter.abs().max() < 1e-4:
            nn.init.normal_(parameter, std=0.05)


def check_in_float32(network, loss, images, labels, bound) -> None:
    """Clipped sum and norms of the float32 engine against a float64 loop."""
    found, norms = clipped_sum(network, loss, images, labels, bound, None)
    exact = loop_gradients(network.double(), loss, images.double(), labels)
    torch.testing.assert_close(norms, norms_of(exact), rtol=1e-5, atol=0)
    assert relative_error(found, loop_clipped_sum(exact, bound)) < 1e-5


def denoising_loss(draws: int):
    """An EDM loss in which an example's draws depend on the example, not on its place in the batch."""

    def loss(network, images, labels, rng):
        generators = [torch.Generator().manual_seed(int(label)) for label in labels]
        shape = (draws, *images.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(
            images.dtype
        )
        sigma = torch.cat([torch.rand(draws, generator=generator) + 0.1 for generator in generators])
        clean = images.repeat_interleave(draws, 0)
        noisy = clean + noise * sigma[:, None, None, None]
        error = denoise(network, noisy, sigma, labels.repeat_interleave(draws)) - clean
        return error.square().flatten(1).mean(1).view(len(images), draws).mean(1)

    return loss
