"""Training of the autoencoder: its terms, the patch discriminator, the weight between them, and resuming."""

import copy
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn

from models.diffusion.autoencoder_training import AutoencoderConfig, AutoencoderTraining
from models.nn.autoencoder import Autoencoder
from models.nn.patch_discriminator import PatchDiscriminator, generator_loss, hinge_loss
from models.nn.perceptual import SMALLEST, PerceptualDistance
from utils.draws import Draws
from utils.errors import Unavailable, UserError
from utils.runtime import Runtime

CONFIG = {
    "ch": 4,
    "ch_mult": [1, 2],
    "attn_resolutions": [],
    "latent_channels": 2,
    "batch_size": 6,
    "n_epochs": 1,
    "snapshot_freq": 10,
    "lr": 1e-2,
    "kl_weight": 0.0,
    "perceptual_weight": 0.0,
    "adversarial_weight": 0.0,
    "adversarial_start": 0,
}


class Lightness(nn.Module):
    """Stands for LPIPS: how far apart the mean colours are, which lie in [0, 255]."""

    def __init__(self, name):
        super().__init__()

    def forward(self, images, others):
        assert images.shape[1] == others.shape[1] == 3 and images.dtype == torch.float32
        return (images.mean((1, 2, 3)) - others.mean((1, 2, 3))).abs()


@pytest.fixture
def lightness(monkeypatch):
    monkeypatch.setattr("torch_fidelity.sample_similarity_lpips.SampleSimilarityLPIPS", Lightness)


def training(**changes) -> AutoencoderTraining:
    torch.manual_seed(0)
    network = Autoencoder(
        image_size=8, channels=1, latent_channels=2, ch=4, ch_mult=[1, 2], attn_resolutions=[]
    )
    return AutoencoderTraining(network, AutoencoderConfig(**{**CONFIG, **changes}), (1, 8, 8), Runtime())


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draws(count: int = 6) -> Draws:
    return Draws(bytes(32), 0, count)


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


# ------------------------------------------------------------------------------------------ discriminator


def test_the_published_size_of_the_patch_discriminator():
    """3 halvings, 64 to 512 channels; norms have as many weights as the published ones."""
    network = PatchDiscriminator(32, 3)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2)
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("size", [6, 8, 14, 28, 32, 64])
def test_the_discriminator_scores_images_of_every_size_independently(size):
    network = PatchDiscriminator(size, 1)
    x = torch.rand(3, 1, size, size)
    together = network(x)
    assert together.shape[:2] == (3, 1) and min(together.shape[2:]) >= 1
    torch.testing.assert_close(network(x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


def test_losses_of_both_sides():
    real, fake = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[-2.0, 1.0]]]])
    assert hinge_loss(real, fake).tolist() == [0.5 * ((0 + 1) + (0 + 2)) / 2]
    assert generator_loss(fake).tolist() == [0.5]


def test_the_discriminator_learns_to_distinguish_and_the_autoencoder_to_fool():
    trained = training(adversarial_weight=0.5)

    def verdicts():
        rebuilt, _ = trained.losses(images(), draws())
        with torch.no_grad():
            return hinge_loss(trained.discriminator(images()), trained.discriminator(rebuilt)).mean().item()

    before = verdicts()
    trained.optimizer.param_groups[0]["lr"] = 0.0
    for step in range(5):
        trained.step(step, images(), draws(), 6)
    assert verdicts() < before
    rebuilt, _ = trained.losses(images(), draws())
    mistaken = generator_loss(trained.discriminator(rebuilt)).mean().item()
    trained.optimizer.param_groups[0]["lr"], trained.discriminator_optimizer.param_groups[0]["lr"] = 1e-2, 0.0
    trained.config = AutoencoderConfig(**{**CONFIG, "adversarial_weight": 100.0})  # against the other terms
    for step in range(5):
        trained.step(step, images(), draws(), 6)
    rebuilt, _ = trained.losses(images(), draws())
    assert generator_loss(trained.discriminator(rebuilt)).mean().item() < mistaken


def test_the_weight_makes_the_gradients_of_the_last_layer_comparable():
    trained = training(adversarial_weight=0.5)
    rebuilt, losses = trained.losses(images(), draws())
    loss = losses.sum() / 6
    term = trained._adversarial_term(loss, rebuilt, 6)
    last = trained.autoencoder.decoder[-1].weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm().item() for part in (loss, term)]
    assert norms[1] == pytest.approx(0.5 * norms[0], rel=0.02)


def test_before_its_start_there_is_no_discriminator():
    late, never = training(adversarial_weight=0.5, adversarial_start=2), training()
    judged = weights(late.discriminator)
    for step in range(2):
        for trained in (late, never):
            trained.step(step, images(), draws(), 6)
    assert torch.equal(weights(late.autoencoder), weights(never.autoencoder))
    assert torch.equal(weights(late.discriminator), judged)
    for trained in (late, never):
        trained.step(2, images(), draws(), 6)
    assert not torch.equal(weights(late.autoencoder), weights(never.autoencoder))
    assert not torch.equal(weights(late.discriminator), judged)


# ------------------------------------------------------------------------------------------ terms


def test_terms_per_image(lightness):
    plain, both = training(), training(perceptual_weight=2.0, kl_weight=0.1)
    rebuilt, errors = plain.losses(images(), draws())
    torch.testing.assert_close(errors, (rebuilt - images()).abs().mean((1, 2, 3)))
    posterior = both.autoencoder.encode(images())
    distance = 127.5 * (rebuilt.mean((1, 2, 3)) - images().mean((1, 2, 3))).abs()
    expected = errors + 0.1 / 64 * posterior.divergence() + 2.0 * distance
    torch.testing.assert_close(both.losses(images(), draws())[1], expected, rtol=1e-4, atol=1e-4)


def test_the_perceptual_distance_teaches(lightness):
    trained = training(perceptual_weight=1.0)
    distance = trained.perceptual
    before = distance(images(), trained.losses(images(), draws())[0]).mean().item()
    for step in range(20):
        trained.step(step, images(), draws(), 6)
    assert distance(images(), trained.losses(images(), draws())[0]).mean().item() < 0.5 * before


def test_a_process_without_a_share_takes_part():
    trained = training(adversarial_weight=0.5)
    before = weights(trained.autoencoder)
    trained.step(0, images(0), draws(0), 6)
    assert torch.isfinite(weights(trained.autoencoder)).all()
    assert torch.equal(weights(trained.autoencoder), before)


def test_interrupted_autoencoder_training_resumes():
    whole = training(adversarial_weight=0.5)
    for step in range(2):
        whole.step(step, images(), draws(), 6)
    kept = copy.deepcopy((whole.autoencoder.state_dict(), whole.state_dict()))
    whole.step(2, images(), draws(), 6)
    resumed = training(adversarial_weight=0.5)
    resumed.autoencoder.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    resumed.step(2, images(), draws(), 6)
    assert torch.equal(weights(resumed.autoencoder), weights(whole.autoencoder))
    assert torch.equal(weights(resumed.discriminator), weights(whole.discriminator))


# ------------------------------------------------------------------------------------------ what can be missing


def test_missing_weights_are_refused_in_one_line_before_any_training(make_trial, monkeypatch):
    def unreachable(name):
        raise URLError("no route to host")

    monkeypatch.setattr("torch_fidelity.sample_similarity_lpips.SampleSimilarityLPIPS", unreachable)
    with pytest.raises(Unavailable, match=r"(?s)vgg16-397923af\.pth.*perceptual_weight=0$") as caught:
        PerceptualDistance()
    assert "no route to host" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr("models.diffusion.latent_space.SMALLEST", 8)
    trial = make_trial("DP-LDM", "pretrain.autoencoder.perceptual_weight=1.0")
    with pytest.raises(UserError, match="perceptual_weight"):
        trial.synthesizer.pretrain(trial.public, trial.private)
    assert trial.synthesizer.latents.step == 0


def test_images_too_small_for_the_perceptual_distance_are_refused(make_method):
    with pytest.raises(UserError, match=r"perceptual_weight: 1\.0 .* 0 for images of 8 px"):
        make_method("DP-LDM", "pretrain.autoencoder.perceptual_weight=1.0")
    make_method("DP-LDM", "pretrain.autoencoder.perceptual_weight=1.0", "pretrain.autoencoder.n_epochs=0")


def test_the_real_distance_is_zero_for_equals_and_teaches_at_its_smallest_size(monkeypatch):
    """torch-fidelity's LPIPS around a VGG16 with random weights: what we hand it, and that gradients come back."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    module = "torch_fidelity.sample_similarity_lpips"
    lines = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    vgg = SimpleNamespace(features=make_layers(cfgs["D"]))
    monkeypatch.setattr(f"{module}.load_state_dict_from_url", lambda *args, **options: lines)
    monkeypatch.setattr(f"{module}.torchvision_load_pretrained_vgg16", lambda: vgg)
    distance = PerceptualDistance()
    x = torch.rand(2, 1, SMALLEST, SMALLEST) * 2 - 1
    y = (torch.rand(2, 1, SMALLEST, SMALLEST) * 2 - 1).requires_grad_()
    assert distance(x, x).tolist() == [0, 0]
    found = distance(x, y)
    assert found.shape == (2,) and (found > 0).all()
    found.sum().backward()
    assert y.grad.abs().amax((1, 2, 3)).gt(0).all()
    assert not any(p.requires_grad for p in distance.parameters())
