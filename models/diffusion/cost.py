"""What the stages of a diffusion method will take, for --dry_run: extrapolated from single network calls."""

import torch
from torch import nn

from models.diffusion.config import PretrainConfig, TrainConfig
from models.diffusion.samplers import SamplerConfig, network_calls
from models.public.batches import steps_of
from opacus_ext.accounting import Release
from utils.sections import GenConfig
from utils.timing import Cost, batch_rows, seconds_of

CLIPPING = 1.2  # times the ordinary step, for per-example gradients: 1.05 to 1.4 in docs/bench_dpsgd.md


def training_cost(release: Release, num_train: int, config: TrainConfig, seconds: float) -> Cost:
    """Of the private stage; `seconds` per image and noise draw of an ordinary step."""
    images = num_train * release.sample_rate
    if release.max_batch_size is not None:
        images = min(images, release.max_batch_size)
    draws = config.loss.n_noise_samples
    description = f"{release.num_steps} steps x {images:.0f} images x {draws} noise draws"
    return Cost(
        "train", description, release.num_steps * images * draws * seconds * CLIPPING, release.num_steps
    )


def warm_up_cost(stage: str, config: PretrainConfig, num_images: int, seconds: float) -> Cost:
    """Of a stage without noise on `num_images`; `seconds` per image."""
    steps, batch_size = steps_of(num_images, config.batch_size, config.n_epochs)
    return Cost(stage, f"{steps} steps x {batch_size} images", steps * batch_size * seconds, steps)


def generation_cost(gen: GenConfig, sampler: SamplerConfig, seconds: float) -> Cost:
    """Of the delivered images; `seconds` per image and network call."""
    calls = network_calls(sampler)
    return Cost("generate", f"{gen.data_num} images x {calls} network calls", gen.data_num * calls * seconds)


def seconds_per_image(network: nn.Module, shape: tuple[int, int, int], device: str) -> tuple[float, float]:
    """Seconds of one network call, and of one with its gradient, per image of `shape`."""
    rows = batch_rows(shape[-1])
    images = torch.zeros((rows, *shape), device=device)
    condition = torch.zeros(rows, device=device)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)

    def evaluate() -> float:
        with torch.no_grad():
            return network(images, condition, labels).sum().item()

    def differentiate() -> float:
        network(images, condition, labels).sum().backward()
        network.zero_grad(set_to_none=True)
        return float(next(network.parameters()).detach().flatten()[0])

    return seconds_of(evaluate) / rows, seconds_of(differentiate) / rows
