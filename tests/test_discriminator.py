"""Discriminators: published parameter counts, formulas, and no influence of one example on another."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.nn.discriminator import Discriminator, ProjectionHead
from models.nn.wide_resnet import WSConv2d
from opacus_ext.gradients.per_example import per_example_gradients
from scripts.benchmarks.dpsgd.wide_resnet import WideResNetCritic


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


CRITICS = {
    "dpgan-8": (lambda: Discriminator(8, 1, 4, d_conv_dim=4), (1, 8, 8)),
    "dpgan-28": (lambda: Discriminator(28, 1, 4, d_conv_dim=4), (1, 28, 28)),
    "dpgan-32": (lambda: Discriminator(32, 3, 4, d_conv_dim=4), (3, 32, 32)),
    "dpgan-64": (lambda: Discriminator(64, 3, 4, d_conv_dim=4), (3, 64, 64)),
    "wrn-10-1": (lambda: WideResNetCritic(3, 4, depth=10, widen=1), (3, 32, 32)),
}


@pytest.mark.parametrize(
    ("size", "channels", "num_classes", "published"),
    [
        (28, 1, 10, 1_184_163),
        (32, 3, 10, 1_649_127),
        (32, 3, 1000, 1_807_527),
        (64, 3, 2, 1_700_007),
        (128, 3, 2, 1_700_007),
    ],
)
def test_the_discriminator_has_the_published_number_of_parameters(size, channels, num_classes, published):
    with torch.device("meta"):
        assert count(Discriminator(size, channels, num_classes)) == published


def test_wrn_16_4_has_its_published_size():
    """2.75 million weights (De et al. 2022, with a head of 10 logits), and a gain and a bias per convolved channel."""
    with torch.device("meta"):
        network = WideResNetCritic(3, 10)
    convolutions = [layer for layer in network.modules() if isinstance(layer, WSConv2d)]
    assert len(convolutions) == 1 + 6 * 2 + 3
    assert count(network) - count(network.head) == pytest.approx(2.75e6, rel=0.005)
    assert count(network.head) == 256 + 1 + 10 * 256


@pytest.fixture(params=CRITICS)
def critic(request):
    torch.manual_seed(0)
    build, shape = CRITICS[request.param]
    network = build()
    return network, torch.randn(5, *shape), torch.arange(5) % 4


def test_a_score_per_image_that_depends_on_image_and_label(critic):
    network, images, labels = critic
    scores = network(images, labels)
    assert scores.shape == (5,)
    assert (scores - network(images.flip(3), labels)).abs().min() > 1e-6
    assert (scores - network(images, (labels + 1) % 4)).abs().min() > 1e-6


def test_no_example_influences_another(critic):
    network, images, labels = critic
    together = network(images, labels)
    alone = torch.cat([network(images[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_used(critic):
    network, images, labels = critic
    network(images, labels).sum().backward()
    silent = [name for name, p in network.named_parameters() if not p.grad.abs().any()]
    assert not silent


def test_the_engine_gives_the_gradient_of_every_example(critic):
    network, images, labels = critic
    network, images = (
        network.double(),
        images.double(),
    )  # a bias before a norm has gradient zero up to rounding

    def squares(network, images, labels, rng):
        return network(images, labels).square()

    found = per_example_gradients(network, squares, images, labels, None)
    for i in range(5):
        loss = squares(network, images[i : i + 1], labels[i : i + 1], None).sum()
        expected = torch.autograd.grad(loss, list(network.parameters()))
        tolerance = 1e-9 * max(gradient.abs().max().item() for gradient in expected)
        for (name, _), gradient in zip(network.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-7, atol=tolerance)


@pytest.mark.parametrize(("size", "side"), [(28, 7), (32, 8), (64, 4), (128, 8)])
def test_blocks_halve_the_image_as_published(size, side):
    with torch.device("meta"):
        network = Discriminator(size, 3, 2, d_conv_dim=4)
        h = network.first(torch.empty(1, 3, size, size))
        for block in network.blocks:
            h = block(h)
    assert h.shape == (1, 8, side, side)


def test_the_head_is_a_projection():
    head, features, labels = ProjectionHead(6, 3), torch.randn(4, 6), torch.tensor([0, 2, 2, 1])
    expected = (
        features @ head.score.weight[0] + head.score.bias + (head.embedding.weight[labels] * features).sum(1)
    )
    torch.testing.assert_close(head(features, labels), expected)


# ------------------------------------------------------------------------------------------ weight standardisation


def test_standardised_weights_have_mean_zero_and_variance_one_over_fan_in():
    torch.manual_seed(0)
    layer = WSConv2d(6, 4, 3, groups=2)
    nn.init.normal_(layer.weight, mean=3.0, std=7.0)
    filters = layer.standardised_weight().flatten(1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters.var(1, correction=0), torch.full((4,), 1 / (3 * 9)))
    nn.init.constant_(layer.gain, 2.0)
    torch.testing.assert_close(layer.standardised_weight().flatten(1), 2 * filters)


def test_the_convolution_uses_the_standardised_weight():
    layer, x = WSConv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)
    nn.init.normal_(layer.gain)
    expected = F.conv2d(x, layer.standardised_weight(), layer.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1))


def test_standardisation_is_differentiated_through():
    torch.manual_seed(0)
    layer = WSConv2d(3, 4, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "gain"]
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    # the output does not change with the mean or the scale of a filter: its gradient is orthogonal to both
    gradient, weight = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1)
    scale = gradient.abs().sum(1)
    assert (gradient.sum(1).abs() < 1e-4 * scale).all()
    assert ((gradient * weight).sum(1).abs() < 1e-4 * scale).all()
    assert layer.gain.grad.shape == (4,) and layer.gain.grad.abs().min() > 0


def test_a_constant_filter_stays_finite():
    layer = WSConv2d(3, 4, 3)
    nn.init.constant_(layer.weight, 0.5)
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
