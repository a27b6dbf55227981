"""What is measured: networks, losses and batch sizes of the published methods, with weights as if trained a little.

Legend: B examples, K rows of one example (noise draws, augmented views, or its real and fake image), P trained
parameters, C channels, H W pixels.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.diffusion.loss import EDMLoss, LossConfig
from models.nn.discriminator import Discriminator
from models.nn.lora import add_adapters
from models.nn.unet import UNet
from opacus_ext.gradients.per_example import PerExampleLoss
from scripts.benchmarks.dpsgd.wide_resnet import WideResNetCritic
from utils.draws import Draws

NUM_CLASSES = 10
WEIGHT_JITTER = (
    0.05  # added to every weight: layers that start as zero would hide errors and starve gradients
)
NORM_PROBES = 4  # examples whose gradient norms set the clipping threshold
SUBSET = ("label_embedding", "condition_in", "condition_out", "input_conv")
PROJECTIONS = ("query", "key", "value", "output")
GRADIENTS = ("ordinary", "ours", "hooks", "ghost", "ew", "vmap", "vmap-chunks", "loop")

Build = Callable[[int], tuple[nn.Module, PerExampleLoss, tuple[int, ...]]]  # K -> network, loss, (C, H, W)


@dataclass(frozen=True)
class Case:
    """`goal`: what the ratio of `goal_of` to the ordinary step shall not exceed; None: no goal is set."""

    build: Build
    examples: int
    rows: int
    goal: float | None
    goal_of: str = "ours"
    competitors: tuple[str, ...] = GRADIENTS
    gpu_only: bool = False


@dataclass(frozen=True)
class Problem:
    """A case in memory. All random numbers are drawn beforehand: every competitor sees the same ones."""

    network: nn.Module
    loss: PerExampleLoss
    images: torch.Tensor  # (B, C, H, W) float32 in [-1, 1]
    labels: torch.Tensor  # (B,)
    randomness: tuple[torch.Tensor, ...]  # what the loss draws, in its order; each (B, ...)
    rows: int
    max_grad_norm: float  # some examples are clipped, and some are not
    autocast: torch.dtype | None

    @property
    def batch(self) -> tuple[torch.Tensor, ...]:
        return (self.images, self.labels, *self.randomness)

    def losses(self, network, images, labels, *randomness) -> torch.Tensor:
        """(B,) losses of the examples given; mixed precision, where asked for, is of the forward pass."""
        mixed = self.autocast is not None
        with torch.autocast(images.device.type, self.autocast) if mixed else nullcontext():
            return self.loss(network, images, labels, Recorded(randomness)).float()


class Recorded:
    """Stands in for Draws: deals recorded tensors in the order in which they were drawn."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.tensors = tensors
        self._next = iter(tensors)

    def uniform(self, *shape: int) -> torch.Tensor:
        return next(self._next)

    def normal(self, *shape: int) -> torch.Tensor:
        return next(self._next)


class _Recorder(Draws):
    def __init__(self, num_examples: int, device: torch.device) -> None:
        super().__init__(bytes(32), 0, num_examples, device)
        self.tensors: list[torch.Tensor] = []

    def uniform(self, *shape: int) -> torch.Tensor:
        self.tensors.append(super().uniform(*shape))
        return self.tensors[-1]

    def normal(self, *shape: int) -> torch.Tensor:
        self.tensors.append(super().normal(*shape))
        return self.tensors[-1]


def load(case: Case, device: torch.device, autocast: torch.dtype | None) -> Problem:
    """Build the case's network and batch on `device`; the same numbers on every call."""
    torch.manual_seed(0)
    network, loss, image_shape = case.build(case.rows)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += WEIGHT_JITTER * torch.randn_like(parameter)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    network.to(device, memory_format=layout)
    images = (torch.rand(case.examples, *image_shape) * 2 - 1).to(device, memory_format=layout)
    labels = (torch.arange(case.examples) % NUM_CLASSES).to(device)
    recorder = _Recorder(case.examples, device)
    with torch.no_grad():
        loss(network, images, labels, recorder)
    randomness = tuple(recorder.tensors)
    problem = Problem(network, loss, images, labels, randomness, case.rows, 1.0, autocast)
    return replace(problem, max_grad_norm=_mean_norm(problem))


def _mean_norm(problem: Problem) -> float:
    trained = [p for p in problem.network.parameters() if p.requires_grad]
    norms = []
    for i in range(min(NORM_PROBES, len(problem.labels))):
        loss = problem.losses(problem.network, *(part[i : i + 1] for part in problem.batch))
        gradients = torch.autograd.grad(loss.sum(), trained)
        norms.append(torch.stack([g.float().norm() for g in gradients]).norm())
    return torch.stack(norms).mean().item()


# ------------------------------------------------------------------------------------------ networks and losses


def unet(size: int, channels: int, ch_mult: list[int], attention: list[int], nf: int = 32) -> Build:
    """A published diffusion network with the loss that its methods train it by."""

    def build(draws: int) -> tuple[nn.Module, PerExampleLoss, tuple[int, ...]]:
        network = UNet(
            image_size=size,
            channels=channels,
            label_dim=NUM_CLASSES,
            nf=nf,
            ch_mult=ch_mult,
            attn_resolutions=attention,
        )
        loss = EDMLoss(LossConfig(p_mean=-1.2, p_std=1.2, n_noise_samples=draws, label_dropout=0.1))
        return network, loss, (channels, size, size)

    return build


DIGITS = unet(8, 1, [1, 2], [], nf=8)  # the quickstart's
UNET_28 = unet(28, 1, [2, 2], [14])
UNET_32 = unet(32, 3, [2, 4], [16])
LATENT_4M = unet(8, 4, [1, 2], [8, 4], nf=64)
LATENT_17M = unet(8, 4, [1, 2], [8, 4], nf=128)


def subset(draws: int) -> tuple[nn.Module, PerExampleLoss, tuple[int, ...]]:
    """DP-LDM-SD on the 32-px network: conditioning, input convolution and attention projections train."""
    network, loss, shape = UNET_32(draws)
    for name, parameter in network.named_parameters():
        layer = name.rpartition(".")[0]
        parameter.requires_grad_(layer in SUBSET or layer.rpartition(".")[2] in PROJECTIONS)
    return network, loss, shape


def lora(draws: int) -> tuple[nn.Module, PerExampleLoss, tuple[int, ...]]:
    """Rank 8 on q, k, v and o of every attention of the 32-px network."""
    network, loss, shape = UNET_32(draws)
    add_adapters(network, lambda name: name.rpartition(".")[2] in PROJECTIONS, rank=8)
    return network, loss, shape


def dpgan(size: int, channels: int) -> Build:
    """DPGAN's discriminator and hinge loss: a record's real row and a fake one make its one loss."""

    def build(rows: int) -> tuple[nn.Module, PerExampleLoss, tuple[int, ...]]:
        assert rows == 2, rows
        return Discriminator(size, channels, NUM_CLASSES), _paired_hinge, (channels, size, size)

    return build


def wrn_critic(views: int) -> tuple[nn.Module, PerExampleLoss, tuple[int, ...]]:
    """WRN-16-4 at CIFAR size on K augmented views (De et al. 2022); noise stands in for the augmentations."""

    def loss(network, images, labels, rng) -> torch.Tensor:
        rows = images.repeat_interleave(views, dim=0) + 0.1 * rng.normal(views, *images.shape[1:]).flatten(
            0, 1
        )
        scores = network(rows, labels.repeat_interleave(views))
        return F.softplus(-scores).reshape(-1, views).mean(1)

    return WideResNetCritic(3, NUM_CLASSES), loss, (3, 32, 32)


def _paired_hinge(network, images, labels, rng) -> torch.Tensor:
    fakes = rng.normal(*images.shape[1:]).clamp(-1, 1)
    fake_labels = (rng.uniform() * NUM_CLASSES).long()
    rows = torch.stack([images, fakes], dim=1).flatten(0, 1)
    real, fake = network(rows, torch.stack([labels, fake_labels], dim=1).flatten()).reshape(-1, 2).unbind(1)
    return F.relu(1 - real) + F.relu(1 + fake)


SHAPES = ((16, 1), (32, 1), (8, 4), (2, 32))
# Sizes that keep a GPU busy, without the competitors that take minutes there.
ON_GPU = {"competitors": ("ordinary", "ours", "hooks", "ghost", "vmap"), "gpu_only": True}

CASES: dict[str, Case] = {
    "digits8-32x4": Case(DIGITS, 32, 4, None),
    **{f"unet28-{b}x{k}": Case(UNET_28, b, k, 1.10) for b, k in SHAPES},
    **{f"unet32-{b}x{k}": Case(UNET_32, b, k, 1.15) for b, k in SHAPES},
    **{f"wrn16-4-{b}x16": Case(wrn_critic, b, 16, 1.25) for b in (2, 4)},
    "dpgan28-16x2": Case(dpgan(28, 1), 16, 2, 1.25),
    "dpgan32-16x2": Case(dpgan(32, 3), 16, 2, 1.25),
    "subset32-16x1": Case(subset, 16, 1, 1.10),
    "subset32-8x4": Case(subset, 8, 4, 1.10),
    "lora32-16x1": Case(lora, 16, 1, 1.10),
    "lora32-8x4": Case(lora, 8, 4, 1.10),
    "latent8-4M-32x1": Case(LATENT_4M, 32, 1, None),
    "latent8-17M-32x1": Case(LATENT_17M, 32, 1, None),
    "latent8-17M-8x4": Case(LATENT_17M, 8, 4, None),
    "noise-4M-64x1": Case(UNET_32, 64, 1, 0.05, goal_of="noise", competitors=("ordinary", "ours", "noise")),
    "unet28-2048x1": Case(UNET_28, 2048, 1, 1.10, **ON_GPU),
    "unet28-64x32": Case(UNET_28, 64, 32, 1.10, **ON_GPU),
    "unet32-1024x1": Case(UNET_32, 1024, 1, 1.15, **ON_GPU),
    "unet32-32x32": Case(UNET_32, 32, 32, 1.15, **ON_GPU),
    "latent8-17M-512x1": Case(LATENT_17M, 512, 1, None, **ON_GPU),
    "wrn16-4-64x16": Case(wrn_critic, 64, 16, 1.25, **ON_GPU),
    "dpgan32-1024x2": Case(dpgan(32, 3), 1024, 2, 1.25, **ON_GPU),
    "subset32-1024x1": Case(subset, 1024, 1, 1.10, **ON_GPU),
    "lora32-1024x1": Case(lora, 1024, 1, 1.10, **ON_GPU),
}
