"""Denoiser, loss and samplers against the formulas, and against a distribution whose denoiser is known."""

import math

import pytest
import torch

from models.diffusion.denoiser import SIGMA_DATA, denoise, guided
from models.diffusion.loss import EDMLoss, LossConfig
from models.diffusion.samplers import SamplerConfig, network_calls, noise_levels, sample
from models.nn.unet import UNet
from utils.draws import Draws
from utils.errors import UserError
from utils.runtime import Runtime


class Spy:
    """A network that returns `answer`, and remembers what it was asked."""

    null_label = 9

    def __init__(self, answer=0.0):
        self.answer, self.calls = answer, []

    def __call__(self, images, condition, labels):
        self.calls.append((images, condition, labels))
        return torch.full_like(images, self.answer)


def sampler(**changes) -> SamplerConfig:
    values = {
        "type": "ddim", "num_steps": 20, "tmin": 0.002, "tmax": 80.0, "rho": 7.0, "guid_scale": 0.0,
        "s_churn": 0.0, "s_min": 0.0, "s_max": 50.0,
    }  # fmt: skip
    return SamplerConfig(**{**values, **changes})


# ------------------------------------------------------------------------------------------ denoiser


def test_preconditioning():
    network, x = Spy(2.0), torch.full((3, 1, 2, 2), 0.7)
    sigma = torch.tensor([0.01, 0.5, 30.0])
    found = denoise(network, x, sigma, torch.zeros(3))
    variance = 1 / 3
    for i, s in enumerate(sigma.tolist()):
        total = s**2 + variance
        assert found[i, 0, 0, 0].item() == pytest.approx(
            variance / total * 0.7 + s * math.sqrt(variance) / math.sqrt(total) * 2.0, rel=1e-5
        )
        images, condition, _ = network.calls[0]
        assert images[i, 0, 0, 0].item() == pytest.approx(0.7 / math.sqrt(total), rel=1e-5)
        assert condition[i].item() == pytest.approx(math.log(s) / 4, rel=1e-5)


def test_guidance_moves_away_from_the_unlabelled_estimate():
    class ByLabel(Spy):
        def __call__(self, images, condition, labels):
            super().__call__(images, condition, labels)
            return labels.float()[:, None, None, None].expand_as(images)

    x, sigma, labels = torch.zeros(2, 1, 2, 2), torch.ones(2), torch.tensor([1, 3])
    network = ByLabel()
    plain = guided(network, 0.0)(x, sigma, labels)
    assert len(network.calls) == 1
    c_out = SIGMA_DATA / math.sqrt(1 + SIGMA_DATA**2)
    torch.testing.assert_close(plain[:, 0, 0, 0], c_out * torch.tensor([1.0, 3.0]))
    pushed = guided(network, 0.5)(x, sigma, labels)[:, 0, 0, 0]
    torch.testing.assert_close(pushed, c_out * (1.5 * torch.tensor([1.0, 3.0]) - 0.5 * 9))


# ------------------------------------------------------------------------------------------ loss


def loss_of(draws=1, dropout=0.0, p_std=1.2, **options) -> EDMLoss:
    return EDMLoss(LossConfig(-1.2, p_std, draws, dropout), **options)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dealt(num_examples: int) -> Draws:
    return Draws(bytes(32), 0, num_examples)


def test_loss_of_a_network_that_predicts_zero():
    """With F = 0 and one noise level the expected loss is known: weight * c_skip^2 (sigma^2 + ...)."""
    sigma = math.exp(-1.2)
    images = torch.full((2, 1, 50, 50), 0.4)
    found = loss_of(draws=20, p_std=0.0)(Spy(), images, torch.tensor([0, 1]), dealt(2))
    total = sigma**2 + SIGMA_DATA**2
    c_skip, weight = SIGMA_DATA**2 / total, total / (sigma * SIGMA_DATA) ** 2
    expected = weight * ((c_skip - 1) ** 2 * 0.4**2 + c_skip**2 * sigma**2)
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([expected] * 2, rel=0.05)


def test_noise_levels_of_the_loss_are_log_normal():
    network = Spy()
    loss_of(draws=4)(network, torch.zeros(5000, 1, 1, 1), torch.zeros(5000, dtype=torch.int64), dealt(5000))
    log_sigma = network.calls[0][1] * 4
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.05)


def test_draws_are_averaged_per_example_and_lie_side_by_side():
    network = Spy()
    images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
    found = loss_of(draws=5, p_std=0.0)(network, images, torch.tensor([4, 5, 6]), dealt(3))
    assert found.shape == (3,)
    seen, _, labels = network.calls[0]
    assert len(network.calls) == 1 and len(seen) == 15
    assert labels.tolist() == [4] * 5 + [5] * 5 + [6] * 5
    assert seen[:5].mean() < seen[5:10].mean() < seen[10:].mean()


def test_label_dropout_is_drawn_once_per_example():
    network, labels = Spy(), torch.arange(4000) % 3
    loss_of(draws=2, dropout=0.25)(network, torch.zeros(4000, 1, 1, 1), labels, dealt(4000))
    seen = network.calls[0][2].view(4000, 2)
    assert torch.equal(seen[:, 0], seen[:, 1])
    dropped = seen[:, 0] == network.null_label
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[~dropped, 0], labels[~dropped])


def test_unconditional_training_shows_the_null_label_alone():
    network = Spy()
    unconditional = loss_of(dropout=0.1, unconditional=True)
    unconditional(network, torch.zeros(50, 1, 1, 1), torch.zeros(50).long(), dealt(50))
    assert (network.calls[0][2] == network.null_label).all()


def test_training_and_guidance_share_one_null_label():
    """The row after the last label, of the real network's table; no label is ever shown as another one."""
    network = UNet(
        image_size=8, channels=1, label_dim=3, nf=8, ch_mult=[1], attn_resolutions=[], num_res_blocks=1
    )
    shown = []
    network.label_embedding.register_forward_hook(lambda _, given, __: shown.append(given[0].clone()))
    images, labels = torch.zeros(64, 1, 8, 8), torch.arange(64) % 3
    loss_of(dropout=0.5)(network, images, labels, dealt(64))
    guided(network, 1.0)(images, torch.ones(64), labels)
    in_training, with_label, without_label = shown
    assert ((in_training == labels) | (in_training == 3)).all() and (in_training == 3).any()
    assert torch.equal(with_label, labels) and (without_label == 3).all()


def test_one_example_does_not_enter_the_loss_of_another():
    class Copy(Spy):
        def __call__(self, images, condition, labels):
            return images

    images, labels = torch.randn(4, 1, 3, 3, generator=rng(1)), torch.arange(4)
    changed = images.clone()
    changed[2] += 1
    one, other = (loss_of(draws=3)(Copy(), batch, labels, dealt(4)) for batch in (images, changed))
    assert (one != other).tolist() == [False, False, True, False]


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"dropout": -0.1}, {"dropout": 1.5}])
def test_loss_refuses_nonsense(wrong):
    with pytest.raises(UserError):
        loss_of(**wrong)


def test_half_precision_moves_the_loss_a_little():
    """The network computes in bfloat16; weights, targets and losses stay float32."""
    torch.manual_seed(0)
    network = UNet(image_size=8, channels=1, label_dim=3, nf=8, ch_mult=[1], attn_resolutions=[])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, labels = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0])
    exact = loss_of(draws=2)(network, images, labels, dealt(4))
    found = loss_of(draws=2, autocast=Runtime(precision="bf16").autocast)(network, images, labels, dealt(4))
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    same = loss_of(draws=2, autocast=Runtime().autocast)(network, images, labels, dealt(4))
    assert torch.equal(same, exact)


# ------------------------------------------------------------------------------------------ samplers


def test_noise_levels_follow_equation_5():
    levels = noise_levels(sampler(num_steps=5))
    assert levels[0] == pytest.approx(80.0) and levels[-1] == pytest.approx(0.002)
    assert levels[2] == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize(("kind", "calls"), [("ddim", 7), ("edm", 13), ("dpmpp", 7)])
def test_number_of_network_calls(kind, calls):
    counted = []

    def denoiser(x, sigma, labels):
        counted.append(sigma[0].item())
        return torch.zeros_like(x)

    sample(denoiser, sampler(type=kind, num_steps=7), (1, 2, 2), torch.zeros(3).long(), rng())
    assert len(counted) == calls == network_calls(sampler(type=kind, num_steps=7))
    assert counted[0] == pytest.approx(80.0) and min(counted) == pytest.approx(0.002)


def gaussian_denoiser(mean: float, std: float):
    """The exact posterior mean where every pixel is N(mean, std^2)."""

    def denoiser(x, sigma, labels):
        variance = sigma[:, None, None, None] ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoiser


@pytest.mark.parametrize(
    "config",
    [
        sampler(num_steps=200),
        sampler(type="edm", num_steps=40),
        sampler(type="edm", num_steps=100, s_churn=10.0, s_min=0.025),
        sampler(type="dpmpp", num_steps=40),
    ],
    ids=["ddim", "edm", "edm with churn", "dpmpp"],
)
def test_samplers_recover_a_gaussian(config):
    images = sample(gaussian_denoiser(0.3, 0.2), config, (1, 20, 20), torch.zeros(50).long(), rng())
    assert images.shape == (50, 1, 20, 20)
    assert images.mean().item() == pytest.approx(0.3, abs=0.01)
    # DDIM ends with one denoising at tmin, which shrinks nothing that shows.
    assert images.std().item() == pytest.approx(0.2, rel=0.03)


def error(kind: str, num_steps: int) -> float:
    """The largest distance from where the equation dx/dt = (x - D) / t leads, for the Gaussian's exact D."""
    mean, std, config = 0.3, 0.2, sampler(type=kind, num_steps=num_steps)
    found = sample(gaussian_denoiser(mean, std), config, (1, 8, 8), torch.zeros(20).long(), rng())
    start = torch.randn((20, 1, 8, 8), generator=rng()) * config.tmax
    shrunk = math.sqrt((std**2 + config.tmin**2) / (std**2 + config.tmax**2))
    moved = mean + (start - mean) * shrunk
    exact = gaussian_denoiser(mean, std)(moved, torch.full((20,), config.tmin), None)
    return (found - exact).abs().max().item()


def test_orders_of_the_samplers():
    """Twice the steps: half the error of a first-order method, a quarter of a second-order one's."""
    ratios = {kind: error(kind, 40) / error(kind, 80) for kind in ("ddim", "edm", "dpmpp")}
    assert ratios["ddim"] == pytest.approx(2, rel=0.1)
    assert ratios["edm"] > 3.5 and ratios["dpmpp"] > 3.5


def test_dpmpp_needs_fewer_network_calls():
    """40 calls do what 79 do for Heun's method, and more than 160 do for Euler's."""
    assert error("dpmpp", 40) < 1.2 * error("edm", 40)
    assert error("dpmpp", 40) < error("ddim", 160)


def test_guidance_costs_a_second_call():
    assert network_calls(sampler(guid_scale=1.5)) == 40


def test_churn_adds_the_noise_of_algorithm_2():
    """The first step from t_0 = 80 goes up by gamma = S_churn / n, at most sqrt(2) - 1, with matching noise."""
    seen = []

    def denoiser(x, sigma, labels):
        seen.append((sigma[0].item(), x.std().item()))
        return torch.zeros_like(x)

    labels, shape = torch.zeros(4).long(), (1, 50, 50)
    for churn, gamma in ((4.0, 0.4), (100.0, math.sqrt(2) - 1)):
        seen.clear()
        config = sampler(type="edm", num_steps=10, s_churn=churn, s_max=100.0)
        sample(denoiser, config, shape, labels, rng())
        level, std = seen[0]
        assert level == pytest.approx(80 * (1 + gamma)) and std == pytest.approx(level, rel=0.03)


def test_labels_reach_the_denoiser():
    def denoiser(x, sigma, labels):
        return labels.float()[:, None, None, None].expand_as(x)

    images = sample(denoiser, sampler(), (1, 2, 2), torch.tensor([0, 5, 2]), rng())
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([0.0, 5.0, 2.0]), rtol=1e-3, atol=1e-3)


def test_sampling_repeats_with_its_generator_and_churn_adds_randomness():
    def run(seed, **changes):
        start = sampler(type="edm", num_steps=8, **changes)
        return sample(gaussian_denoiser(0.0, 1.0), start, (1, 4, 4), torch.zeros(2).long(), rng(seed))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(1, s_churn=5.0))
    assert torch.equal(run(1), run(1, s_churn=5.0, s_min=90.0, s_max=100.0))  # churn only between its bounds


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "euler"},
        {"num_steps": 1},
        {"tmin": 0.0},
        {"tmin": 90.0},
        {"rho": 0.0},
        {"guid_scale": -1.0},
        {"s_churn": -1.0},
    ],
)
def test_sampler_refuses_nonsense(wrong):
    with pytest.raises(UserError):
        sampler(**wrong)
