"""DP-SGD as an iterator: the method owns the loop (EMA, logs, snapshots), the engine owns privacy."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from opacus_ext.accounting import Release
from opacus_ext.errors import UnplannedRelease
from opacus_ext.gradients.per_example import PerExampleLoss, clipped_sum
from opacus_ext.gradients.rules import refuse_mixing
from opacus_ext.private_data import PrivateData
from opacus_ext.sampling import PhysicalBatches
from opacus_ext.validate import validate_independence
from utils import distributed
from utils.sections import check

SAMPLINGS = ("poisson", "truncated_poisson")


@dataclass(frozen=True)
class DPSGDConfig:
    """What DP-SGD needs beyond the calibrated release. Noise scales with `max_grad_norm`; how a batch is sampled is
    part of the plan; `n_split` and `max_physical_batch_size` trade memory for speed and bear on nothing else."""

    max_grad_norm: float
    sampling: str  # poisson; truncated_poisson: at most max_batch_size, for steps compiled for one size
    max_batch_size: int | None  # None with poisson
    n_split: int | None  # parts per logical batch; None: as many as max_physical_batch_size demands
    max_physical_batch_size: int | None  # records at a time; None: chosen for the device

    def __post_init__(self) -> None:
        check(
            self.sampling in SAMPLINGS, "train.dp.sampling", self.sampling, f"one of {', '.join(SAMPLINGS)}"
        )
        size, plain = self.max_batch_size, self.sampling == "poisson"
        allowed = (
            "null where train.dp.sampling=poisson" if plain else "at least 1 where it is truncated_poisson"
        )
        fits = size is None if plain else size is not None and size > 0
        check(fits, "train.dp.max_batch_size", size, allowed)
        check(self.max_grad_norm > 0, "train.dp.max_grad_norm", self.max_grad_norm, "greater than 0")
        check(
            self.n_split is None or self.n_split > 0, "train.dp.n_split", self.n_split, "null or at least 1"
        )
        size = self.max_physical_batch_size
        check(size is None or size > 0, "train.dp.max_physical_batch_size", size, "null or at least 1")


@dataclass(frozen=True)
class Step:
    """One finished optimiser step: `index` counts from 0, `total` as planned."""

    index: int
    total: int


def dpsgd_release(
    name: str, num_train: int, batch_size: int | None, n_epochs: float, max_batch_size: int | None = None
) -> Release:
    """The plan of E epochs of nominal batch B over N records: q = 1/L and T = E L, rounded up, with L = ceil(N / B).

    So the expected batch is N / L, not B; the published sigma tables rest on this rule. batch_size None: all records
    in every step. `max_batch_size`: of larger samples a random subset of this size is taken.
    """
    batch_size = num_train if batch_size is None else batch_size
    allowed = f"from 1 to {num_train}, the number of private images, or null for all of them"
    check(0 < batch_size <= num_train, "train.batch_size", batch_size, allowed)
    check(n_epochs >= 0, "train.n_epochs", n_epochs, "0 or more")
    steps_per_epoch = math.ceil(num_train / batch_size)
    return Release(
        name,
        None,
        sample_rate=1.0 / steps_per_epoch,
        num_steps=math.ceil(n_epochs * steps_per_epoch),
        max_batch_size=max_batch_size,
        num_records=num_train if max_batch_size else None,
    )


def dpsgd_steps(
    name: str,
    private: PrivateData,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    per_example_loss: PerExampleLoss,
    dp: DPSGDConfig,
) -> Iterator[Step]:
    """Take the planned steps of release `name` that are not yet booked, yielding after each one.

    Steps, sampling rate and noise come from the calibrated release. Each step: book; draw a Poisson sample; sum the
    clipped per-example gradients over its chunks; add N(0, (noise_multiplier * max_grad_norm)^2) once; divide by the
    public expected batch size; step the optimiser.
    The loss's randomness is secret, like the noise: see NoiseSource.loss_draws.
    """
    refuse_mixing(network)
    layer_rows = _probe(private, network, per_example_loss)
    trainable = {parameter_name: p for parameter_name, p in network.named_parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in trainable.values()}:
        raise ValueError("the optimiser must hold exactly the trainable parameters")
    planned = private.ledger.planned(name)
    if planned.mechanism != "gaussian":
        raise UnplannedRelease(f"'{name}' is planned as {planned.mechanism}, not as gaussian")
    n_split = dp.n_split and math.ceil(dp.n_split / distributed.world_size())
    gradients = partial(_clipped, network, per_example_loss, dp.max_grad_norm, layer_rows)
    parts = PhysicalBatches(dp.max_physical_batch_size, n_split, private.device)
    with ThreadPoolExecutor(1) as ahead:
        while private.ledger.executed(name) < planned.num_steps:
            release = private.ledger.book(name)
            index = private.ledger.executed(name) - 1
            std = release.noise_multiplier * dp.max_grad_norm
            # Drawn by a CPU thread while the gradients are computed; once, by the process that adds it.
            draw = partial(private._gradient_noise, name, _size(trainable), std, index)
            noise = ahead.submit(draw) if distributed.is_main() else None
            share = _clipped_sum_of_share(release, private, trainable, gradients, parts, index)
            released = distributed.sum_on_main(share, lambda total, noise=noise: noise.result().add_to(total))
            expected_batch = private.spec.num_train * release.sample_rate
            _set_gradients(trainable, released / expected_batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield Step(index, planned.num_steps)


def _probe(private: PrivateData, network: nn.Module, per_example_loss: PerExampleLoss) -> dict[str, set[int]]:
    """Run the independence check on random images, never on private ones; returns the rows of each layer."""
    rng = torch.Generator(device=private.device).manual_seed(0)
    shape = (3, *private._image_shape())
    images = torch.rand(shape, generator=rng, device=private.device) * 2 - 1
    # Two of one class, for a loss may compare those alone.
    labels = torch.arange(3, device=private.device) % min(2, private.spec.num_classes)
    return validate_independence(network, per_example_loss, images, labels)


def _clipped(
    network, per_example_loss, max_grad_norm, layer_rows, images, labels, rng, num_padded
) -> dict[str, torch.Tensor]:
    images, labels = (F.pad(part, (0, 0) * (part.dim() - 1) + (0, num_padded)) for part in (images, labels))
    sums, _ = clipped_sum(
        network,
        per_example_loss,
        images,
        labels,
        max_grad_norm,
        rng,
        layer_rows=layer_rows,
        num_padded=num_padded,
    )
    return sums


def _clipped_sum_of_share(
    release, private, trainable, gradients, parts: PhysicalBatches, index
) -> torch.Tensor:
    """Over this process's share of the one Poisson sample that all processes draw; the share may be empty.

    (P,) in float64: one record more moves the rounding of all later parts, and in float32 that would add up to a
    part of the bound that is no longer negligible.
    """
    indices = private._sampled_indices(release, index)
    own = distributed.share(len(indices))
    draws = private._loss_draws(release.name, index, len(indices))[own]
    indices = indices[own]

    def clipped(positions: slice, size: int) -> torch.Tensor:
        images, labels = private._take(indices[positions])
        return _flat(
            trainable, gradients(images, labels, draws[positions].stretched(size), size - len(labels))
        )

    total = torch.zeros(_size(trainable), dtype=torch.float64, device=private.device)
    return parts.add_up(len(indices), clipped, total)


def _size(trainable: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in trainable.values())


def _flat(trainable: dict[str, nn.Parameter], sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """All sums as one vector, so that one draw of noise serves all parameters."""
    return torch.cat([sums[name].flatten() for name in trainable])


def _set_gradients(trainable: dict[str, nn.Parameter], flat: torch.Tensor) -> None:
    parts = flat.split([parameter.numel() for parameter in trainable.values()])
    for parameter, part in zip(trainable.values(), parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
