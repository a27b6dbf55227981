"""Networks: published parameter counts, shapes, and the average of weights."""

import pytest
import torch
from torch import nn

from models.nn.ema import EMA
from models.nn.generator import Generator, GeneratorConfig
from models.nn.resnet import CLASSIFIERS
from models.nn.unet import UNet, sinusoidal_embedding
from utils.errors import UserError


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def unet(size, channels, label_dim, ch_mult, attention, nf=32):
    return UNet(
        image_size=size,
        channels=channels,
        label_dim=label_dim,
        nf=nf,
        ch_mult=ch_mult,
        attn_resolutions=attention,
    )


def generator(size, channels, num_classes, g_conv_dim, attention=True):
    return Generator(GeneratorConfig(60, 128, g_conv_dim, attention, [2]), size, channels, num_classes)


# ------------------------------------------------------------------------------------------ UNet


@pytest.mark.parametrize(
    ("size", "channels", "ch_mult", "attention", "label_dim", "published"),
    [
        (28, 1, [2, 2], [14], 10, 1_485_217),
        (28, 1, [2, 2], [14], 1000, 1_516_897),
        (32, 3, [2, 4], [16], 10, 3_835_619),
        (32, 3, [2, 4], [16], 2, 3_835_363),
        (32, 3, [2, 4], [16], 100, 3_838_499),
        (32, 3, [2, 4], [16], 1000, 3_867_299),
        (64, 3, [1, 2, 4], [32, 16], 2, 4_153_219),
        (64, 3, [1, 2, 4], [32, 16], 1000, 4_185_155),
        (128, 3, [1, 2, 4], [64, 32], 2, 4_153_219),
    ],
)
def test_unet_has_the_published_number_of_parameters(
    size, channels, ch_mult, attention, label_dim, published
):
    with torch.device("meta"):
        assert count(unet(size, channels, label_dim, ch_mult, attention)) == published


@pytest.mark.parametrize(
    ("nf", "ch_mult", "attention", "millions"),
    [
        (64, [1, 2, 3], [16, 8], 11.1),
        (64, [1, 2, 2, 4], [16, 8, 4], 19.6),
        (128, [1, 2, 2, 4], [16, 8, 4], 78.5),
    ],
)
def test_larger_unets_have_the_published_size(nf, ch_mult, attention, millions):
    with torch.device("meta"):
        assert count(unet(32, 3, 10, ch_mult, attention, nf)) / 1e6 == pytest.approx(millions, abs=0.08)


@pytest.mark.parametrize(
    ("size", "channels", "ch_mult"), [(8, 1, [1, 2]), (28, 1, [1, 2, 2]), (7, 3, [1, 2, 2])]
)
def test_unet_returns_images_of_the_shape_it_got(size, channels, ch_mult):
    network = unet(size, channels, 4, ch_mult, [4], nf=8)
    images = torch.randn(3, channels, size, size)
    assert network(images, torch.rand(3), torch.tensor([0, 4, 1])).shape == images.shape


def test_unet_starts_close_to_nothing_and_depends_on_all_its_inputs():
    torch.manual_seed(0)
    network = unet(8, 1, 4, [1, 2], [4], nf=8)
    images, condition, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])
    assert network(images, condition, labels).abs().max() < 1e-3
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        base = network(images, condition, labels)
        changes = [
            (images + 1, condition, labels),
            (images, condition + 1, labels),
            (images, condition, labels + 1),
        ]
        assert all(not torch.allclose(base, network(*changed), rtol=1e-3) for changed in changes)


def test_the_null_label_is_a_row_of_its_own():
    network = unet(8, 1, 4, [1], [], nf=8)
    assert network.null_label == 4 and network.label_embedding.num_embeddings == 5


def test_sinusoidal_embedding():
    values = torch.tensor([0.0, 0.7])
    found = sinusoidal_embedding(values, 6)
    frequencies = torch.tensor([1.0, 10000**-0.5, 1e-4])
    expected = torch.cat([(values[:, None] * frequencies).sin(), (values[:, None] * frequencies).cos()], 1)
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------ generator, classifiers


@pytest.mark.parametrize(
    ("size", "channels", "num_classes", "g_conv_dim", "published"),
    [
        (28, 1, 10, 41, 1_422_506),
        (28, 1, 1000, 41, 1_549_226),
        (32, 3, 10, 60, 3_838_884),
        (32, 3, 1000, 60, 3_965_604),
        (64, 3, 2, 60, 4_022_180),
        (128, 3, 2, 60, 4_759_460),
    ],
)
def test_generator_has_the_published_number_of_parameters(size, channels, num_classes, g_conv_dim, published):
    assert count(generator(size, channels, num_classes, g_conv_dim)) == published


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_generator_returns_images(size, channels):
    network = generator(size, channels, 4, 4)
    noise, labels = torch.randn(5, 60), torch.arange(5) % 4
    images = network(noise, labels)
    assert images.shape == (5, channels, size, size) and images.abs().max() <= 1
    network.eval()
    assert not torch.allclose(network(noise, labels), network(noise, (labels + 1) % 4))
    assert not torch.allclose(network(noise, labels), network(noise + 1, labels))


def test_generator_refuses_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"sensitive_data.resolution: 30"):
        generator(30, 1, 4, 4)
    with pytest.raises(UserError, match="z_dim"):
        Generator(GeneratorConfig(61, 8, 4, False, []), 28, 1, 4)


@pytest.mark.parametrize(("kind", "size"), [("small_cnn", 8), ("resnet50", 32)])
def test_query_classifiers_give_a_logit_per_class(kind, size):
    assert CLASSIFIERS[kind](3, 7).eval()(torch.randn(2, 3, size, size)).shape == (2, 7)


# ------------------------------------------------------------------------------------------ EMA


def test_ema_follows_its_formula():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average, expected = EMA(network, decay=0.3), 0.0
    for n in range(1, 9):
        nn.init.constant_(network.weight, float(n))
        average.update(network)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert network.weight.item() == 8.0
    average.copy_to(network)
    assert network.weight.item() == pytest.approx(expected, rel=1e-6)


def test_ema_state_continues():
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    one, other = EMA(network, 0.9), EMA(nn.Linear(3, 2), 0.9)
    one.update(network)
    other.load_state_dict(one.state_dict())
    nn.init.normal_(network.weight)
    one.update(network)
    other.update(network)
    assert other.num_updates == 2
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
