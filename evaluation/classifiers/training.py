"""Train a classifier on samples and keep its averaged weights after a few epochs: the candidates for selection.

Legend: B batch, C channels, H W pixels, K classes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.spec import DataSpec, Samples
from evaluation.classifiers.recipe import Recipe
from evaluation.registry import CLASSIFIERS
from utils.errors import Unavailable
from utils.images import to_float
from utils.progress import progress
from utils.seeding import numpy_rng, seeded

# Weights of at most this many epochs are kept: 10 x 36 million parameters are 1.5 GB.
MAX_CANDIDATES = 10
# Smaller images are one pixel in the last layers, and batch normalisation of one value per channel fails.
SIZE_FOR_ONE_IMAGE = 8
STEPS_TO_COMPILE_FOR = 5000
TRITON_NEEDS = (7, 0)  # the lowest compute capability that torch.compile supports


@dataclass(frozen=True)
class TrainedClassifier:
    """A network and its candidate weights: `states[j]` are the weights after epoch `epochs[j]`, the last included.

    A state holds the moving average of the parameters and the batch normalisation statistics of training.
    """

    name: str
    network: nn.Module
    epochs: list[int]
    states: list[dict[str, torch.Tensor]]
    num_epochs: int
    num_train: int
    device: str
    batch_size: int

    def logits(self, candidate: int, images: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) -> float32 (N, K)."""
        self.network.load_state_dict(self.states[candidate])
        chunks = (np.arange(start, min(start + self.batch_size, len(images)))
                  for start in range(0, len(images), self.batch_size))  # fmt: skip
        return np.concatenate([self._forward(to_float(images[chunk], self.device)) for chunk in chunks])

    def correct(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Is candidate j correct about image i? (B, C, H, W) float32 in [-1, 1], (B,) -> (B, candidates) of 0 and 1.

        A row depends on its own image and label only; B may be 0. The result is on the device of `images`.
        """
        columns = []
        for state in self.states:
            self.network.load_state_dict(state)
            columns.append(self._forward(images.to(self.device)).argmax(axis=1) == labels.cpu().numpy())
        return torch.as_tensor(np.stack(columns, axis=1), dtype=torch.float32, device=images.device)

    @torch.no_grad()
    def _forward(self, images: torch.Tensor) -> np.ndarray:
        self.network.eval()
        return self.network(images).float().cpu().numpy()


def train_classifier(
    name: str, samples: Samples, chosen: np.ndarray, *, spec: DataSpec, recipe: Recipe, device: str, seed: int,
    batch_size: int,
) -> TrainedClassifier:  # fmt: skip
    """Train classifier `name` on the images `chosen` (indices) of `samples`.

    Equal arguments give equal weights on the same machine. `batch_size` applies to testing. Raises Unavailable if
    the weights become non-finite, and for a single image of less than SIZE_FOR_ONE_IMAGE pixels.
    """
    if len(chosen) == 1 and spec.resolution < SIZE_FOR_ONE_IMAGE:
        raise Unavailable(f"needs at least 2 training images of {spec.resolution} pixels, there is 1")
    with seeded(seed, f"classifier/{name}", device):
        network = CLASSIFIERS.resolve(name)(spec).to(device, memory_format=torch.channels_last)
        averaged = copy.deepcopy(network)
        optimizer = _optimizer(network, recipe)
        steps_per_epoch = num_batches(len(chosen), recipe.batch_size)
        scheduler = _scheduler(optimizer, recipe, steps_per_epoch)
        kept = candidate_epochs(recipe.num_epochs)
        states = []
        batches = _batches(chosen, recipe, numpy_rng(seed, f"classifier batches/{name}"))
        total = steps_per_epoch * recipe.num_epochs
        forward = accelerated(network, device, total)
        for step, indices in enumerate(progress(batches, f"train {name}", total=total), start=1):
            network.train()
            _step(forward, optimizer, samples, indices, recipe, device)
            scheduler.step()
            _average(averaged, network, step)
            epoch, rest = divmod(step, steps_per_epoch)
            if rest == 0 and epoch in kept:
                states.append(_candidate(averaged, network, name, epoch))
    return TrainedClassifier(
        name, network, kept, states, recipe.num_epochs, len(chosen), device, batch_size
    )  # fmt: skip


def candidate_epochs(num_epochs: int) -> list[int]:
    """At most MAX_CANDIDATES evenly spaced epochs, counted from 1, the last included."""
    count = min(num_epochs, MAX_CANDIDATES)
    return [math.ceil(num_epochs * position / count) for position in range(1, count + 1)]


def num_batches(num_images: int, batch_size: int) -> int:
    """Batches per epoch. A single remaining image joins the previous batch."""
    whole, rest = divmod(num_images, batch_size)
    return max(1, whole + (rest > 1))


def _batches(chosen: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Index arrays of all batches of all epochs; every epoch has a new order. The last batch of an epoch may be
    smaller, or larger by one image."""
    ends = recipe.batch_size * np.arange(1, num_batches(len(chosen), recipe.batch_size))
    for _ in range(recipe.num_epochs):
        yield from np.split(rng.permutation(chosen), ends)


def accelerated(network: nn.Module, device: str, num_steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward pass of training, (B, C, H, W) -> float32 logits (B, K).

    On a GPU it runs in bfloat16 if the GPU supports it, and is compiled if there are enough steps to make up for the
    minute of compilation. Weights and optimizer stay float32. Testing never uses it.
    """
    if torch.device(device).type != "cuda":
        return network
    pays = num_steps >= STEPS_TO_COMPILE_FOR and torch.cuda.get_device_capability(device) >= TRITON_NEEDS
    compiled = torch.compile(network) if pays else network
    in_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=in_bfloat16):
            return compiled(images).float()

    return forward


def with_noise(images: torch.Tensor, max_std: float) -> torch.Tensor:
    """Images (B, C, H, W) plus Gaussian noise of standard deviation max_std * u^2, u uniform in [0, 1) per image: half
    of the images get less than a quarter of `max_std`. Draws from PyTorch's global generator."""
    deviation = max_std * torch.rand(len(images), 1, 1, 1, device=images.device).square()
    return images + deviation * torch.randn_like(images)


def _step(forward, optimizer, samples: Samples, indices: np.ndarray, recipe: Recipe, device: str) -> None:
    optimizer.zero_grad(set_to_none=True)
    for part in np.array_split(indices, min(recipe.num_splits, len(indices))):
        images = to_float(samples.images[part], device)
        if recipe.input_noise:
            images = with_noise(images, recipe.input_noise)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.as_tensor(samples.labels[part], device=device)
        loss = nn.functional.cross_entropy(forward(images), labels, reduction="sum") / len(indices)
        loss.backward()
    optimizer.step()


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=0.9, **settings)
    return torch.optim.Adam(network.parameters(), **settings)


def _scheduler(optimizer, recipe: Recipe, steps_per_epoch: int):
    """A schedule with one step per batch."""
    if recipe.decay_every is None:
        total = recipe.num_epochs * steps_per_epoch
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total + 1)
    return torch.optim.lr_scheduler.StepLR(optimizer, recipe.decay_every * steps_per_epoch, gamma=0.2)


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, step: int) -> None:
    """Move the averaged parameters; the decay warms up so that the initial weights fade quickly."""
    decay = min(0.9999, (1 + step) / (10 + step))
    for mean, parameter in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def _candidate(averaged: nn.Module, network: nn.Module, name: str, epoch: int) -> dict[str, torch.Tensor]:
    """Averaged parameters with the batch normalisation statistics of the trained network, on the CPU."""
    state = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
    state |= {key: value.detach().cpu().clone() for key, value in averaged.named_parameters()}
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise Unavailable(f"training of {name} diverged: its weights are not finite after epoch {epoch}")
    return state
