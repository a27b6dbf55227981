"""The autoencoder and the UNet of latent diffusion: published sizes, gradients, independence of examples."""

import pytest
import torch
from torch import nn

from models.nn.autoencoder import Autoencoder, Posterior
from models.nn.latent_unet import LatentUNet
from opacus_ext.gradients.per_example import per_example_gradients
from opacus_ext.gradients.rules import refuse_mixing


def number(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def autoencoder(image_size=8, channels=1, ch=8, ch_mult=(1, 2), attn=()) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        image_size=image_size,
        channels=channels,
        latent_channels=3,
        ch=ch,
        ch_mult=list(ch_mult),
        attn_resolutions=list(attn),
    )


def unet(size=4, nf=8, ch_mult=(1, 2), attn=(4, 2), label_dim=5, blocks=1, head=4, context=6) -> LatentUNet:
    torch.manual_seed(0)
    return LatentUNet(
        latent_size=size,
        channels=3,
        label_dim=label_dim,
        nf=nf,
        ch_mult=list(ch_mult),
        attn_resolutions=list(attn),
        num_res_blocks=blocks,
        head_width=head,
        context_dim=context,
    )


def awake(network: nn.Module) -> nn.Module:
    """Layers that start as zero hide what lies behind them."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


# ------------------------------------------------------------------------------------------ published sizes


@pytest.mark.parametrize(
    "image_size, channels, ch, ch_mult, attn, millions, latent",
    [
        (28, 1, 128, [1, 2], [14], 14.64, 14),
        (32, 3, 128, [1, 2], [16], 14.64, 16),
        (64, 3, 192, [1, 2], [], 29.9, 32),
        (128, 3, 192, [1, 2, 2], [32], 48.8, 32),
    ],
)
def test_published_autoencoders(image_size, channels, ch, ch_mult, attn, millions, latent):
    with torch.device("meta"):
        network = Autoencoder(
            image_size=image_size,
            channels=channels,
            latent_channels=3,
            ch=ch,
            ch_mult=ch_mult,
            attn_resolutions=attn,
        )
    assert number(network) == pytest.approx(millions * 1e6, abs=0.05e6)
    assert network.latent_shape == (3, latent, latent)


@pytest.mark.parametrize(
    "size, nf, ch_mult, attn, parameters, transformers, first, trained",
    [
        (14, 64, [1, 2], [14, 7], 7_107_139, 11, 0, 3_512_640),
        (16, 32, [1, 2, 2], [16, 8, 4], 3_430_115, 16, 8, 905_760),
        (32, 32, [1, 2, 2], [32, 16, 8], 3_430_115, 16, 8, 905_760),
        (32, 32, [1, 2], [32, 16], 2_064_675, 11, 8, 161_760),
    ],
)
def test_published_unets(size, nf, ch_mult, attn, parameters, transformers, first, trained):
    """Without and with the class embedder, whose 1001 rows for ImageNet include the null label."""
    with torch.device("meta"):
        network = unet(size, nf, ch_mult, attn, label_dim=1000, blocks=2, head=8, context=512)
    assert number(network.label_embedding) == 1001 * 512
    assert number(network) - number(network.label_embedding) == parameters
    assert len(network.transformers()) == transformers
    assert number(*network.transformers()[first:]) == trained


# ------------------------------------------------------------------------------------------ autoencoder


@pytest.mark.parametrize("size, channels, ch_mult", [(8, 1, [1, 2]), (7, 3, [1, 2, 2]), (8, 3, [1])])
def test_images_come_back_in_their_own_shape(size, channels, ch_mult):
    network = autoencoder(size, channels, ch_mult=ch_mult, attn=[4])
    images = torch.randn(2, channels, size, size)
    posterior = network.encode(images)
    assert posterior.mean.shape == posterior.log_variance.shape == (2, *network.latent_shape)
    assert network.decode(posterior.mean).shape == images.shape


def test_the_posterior_is_a_diagonal_gaussian():
    mean, log_variance = torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    posterior = Posterior(mean, log_variance)
    torch.testing.assert_close(
        posterior.sample(torch.full((1, 1, 1, 2), 3.0)), torch.tensor([[[[4.0, -2.0 + 3 * 2.718281828]]]])
    )
    normal = torch.distributions.Normal
    closed = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.divergence(), closed.sum().reshape(1))


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_an_image_is_encoded_and_decoded_by_itself(part):
    network = awake(autoencoder(attn=[4]))
    rows = torch.randn(3, 1, 8, 8) if part == "encode" else torch.randn(3, 3, 4, 4)
    changed = rows.clone()
    changed[0] += 1.0

    def run(batch):
        out = getattr(network, part)(batch)
        return out.mean if part == "encode" else out

    with torch.no_grad():
        before, after = run(rows), run(changed)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ UNet


@pytest.mark.parametrize("size, ch_mult, attn", [(4, [1, 2], [4, 2]), (7, [1, 2, 2], [4]), (5, [1], [])])
def test_latents_come_back_in_their_own_shape(size, ch_mult, attn):
    network = unet(size, ch_mult=ch_mult, attn=attn)
    out = network(torch.randn(2, 3, size, size), torch.tensor([0.0, 999.0]), torch.tensor([0, 5]))
    assert out.shape == (2, 3, size, size)
    assert out.abs().max() == 0  # it starts as nothing


def test_the_network_receives_the_class_and_the_timestep():
    network = awake(unet())
    latents = torch.randn(1, 3, 4, 4).expand(3, -1, -1, -1)
    with torch.no_grad():
        out = network(latents, torch.tensor([10.0, 10.0, 500.0]), torch.tensor([1, 2, 1]))
    assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[0], out[2])


def squared_error(network, latents, labels, rng):
    return network(latents, torch.full((len(labels),), 10.0), labels).square().flatten(1).sum(1)


def test_cross_attention_has_something_to_choose():
    """Query and key weights get a gradient from an example with a class, and none where class and null are the same."""
    network = awake(unet())
    labels = torch.tensor([1, network.null_label])
    found = per_example_gradients(network, squared_error, torch.randn(2, 3, 4, 4), labels, None)
    for part in ("query", "key"):
        names = [name for name in found if name.endswith(f"cross_attention.{part}.weight")]
        assert len(names) == len(network.transformers())
        for name in names:
            with_class, without = found[name].flatten(1).norm(dim=1).tolist()
            assert with_class > 1e-6 and without < 1e-3 * with_class, name


def test_per_example_gradients_are_those_of_single_examples():
    network = awake(unet())
    refuse_mixing(network)
    latents, labels = torch.randn(3, 3, 4, 4), torch.tensor([0, 5, 0])
    found = per_example_gradients(network, squared_error, latents, labels, None)
    assert found.keys() == dict(network.named_parameters()).keys()
    for i in range(3):
        loss = squared_error(network, latents[i : i + 1], labels[i : i + 1], None).sum()
        single = torch.autograd.grad(loss, list(network.parameters()))
        for name, gradient in zip(found, single, strict=True):
            scale = gradient.abs().max().item() + 1e-3
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
