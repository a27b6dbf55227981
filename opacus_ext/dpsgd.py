"""DP-SGD as an iterator: the method owns the training loop (EMA, logs, snapshots), this module owns privacy."""

import math
from collections.abc import Callable, Iterator
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
from opacus_ext.private_data import PrivateData, records_of
from opacus_ext.records import RecordAccess
from opacus_ext.sampling import PhysicalBatchConfig, PhysicalBatches
from opacus_ext.validate import validate_independence
from utils import distributed
from utils.draws import Draws
from utils.sections import check

SAMPLINGS = ("poisson", "truncated_poisson")

# (images, labels, draws, number of padded examples) -> name -> clipped gradient sum of these examples
ClippedGradients = Callable[[torch.Tensor, torch.Tensor, Draws, int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class DPSGDConfig(PhysicalBatchConfig):
    """The section train.dp: what DP-SGD needs in addition to the calibrated release.

    - Privacy (fields below): the clipping bound, to which the noise is proportional, and how a batch is sampled, which
      is part of the plan.
    - Speed and memory (inherited from PhysicalBatchConfig): n_split, max_physical_batch_size.
    """

    max_grad_norm: float
    sampling: str  # poisson; truncated_poisson: at most max_batch_size, for steps compiled for one size
    max_batch_size: int | None  # None with poisson

    def __post_init__(self) -> None:
        super().__post_init__()
        known = f"one of {', '.join(SAMPLINGS)}"
        check(self.sampling in SAMPLINGS, "train.dp.sampling", self.sampling, known)
        size, plain = self.max_batch_size, self.sampling == "poisson"
        allowed = "null if train.dp.sampling=poisson" if plain else "at least 1 if it is truncated_poisson"
        fits = size is None if plain else size is not None and size > 0
        check(fits, "train.dp.max_batch_size", size, allowed)
        check(self.max_grad_norm > 0, "train.dp.max_grad_norm", self.max_grad_norm, "greater than 0")


@dataclass(frozen=True)
class Step:
    """One finished optimizer step: `index` counts from 0; `total` steps are planned."""

    index: int
    total: int


def dpsgd_release(
    name: str, num_train: int, batch_size: int | None, n_epochs: float, max_batch_size: int | None = None
) -> Release:
    """The plan of E epochs of nominal batch size B over N records.

    With L = ceil(N / B): sample_rate q = 1 / L, and T = E L steps, rounded up. The expected batch size is therefore
    N / L, not B; the published tables of noise multipliers use this rule. batch_size None: all records in every step.
    max_batch_size: a larger sample is replaced by a random subset of this size.
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
    """Take the planned steps of release `name` that are not yet booked, and yield after each one.

    Each step: book; draw a Poisson sample; sum the clipped per-example gradients; add N(0, (noise_multiplier *
    max_grad_norm)^2) once; divide by the public expected batch size; step the optimizer.

    Guarantees:
    - Number of steps, sample_rate and noise_multiplier come from the calibrated release, never from an argument.
    - A step is booked before a record is read, so resuming continues at the booked step.
    - One record changes the sum of a step by at most max_grad_norm in L2, over all trainable parameters together.
    - With several processes there is one sample, cut into shares, and noise is added once.
    - Parameters that are not trainable, and buffers, do not change.

    Assumes:
    - Neither network nor loss mixes or remembers examples. Known mixing layers are refused, and random images are used
      to test for others before the first step (validate.py).
    - The loss takes randomness from its `rng` only. Those draws are secret, like the noise: NoiseSource.loss_draws.

    | case | result |
    |---|---|
    | empty sample | a step of noise alone |
    | example whose gradient is not finite | counts as zero |
    | optimizer does not hold exactly the trainable parameters | ValueError, nothing booked |
    | network or loss mixes examples | UserError, nothing booked |
    | the release has another mechanism | UnplannedRelease, nothing booked |
    | part of a batch does not fit in memory | computed again in smaller parts, with the same draws |
    """
    refuse_mixing(network)
    records = records_of(private)
    layer_rows = _test_independence(private, network, per_example_loss)
    trainable = {parameter_name: p for parameter_name, p in network.named_parameters() if p.requires_grad}
    _require_same_parameters(optimizer, trainable)
    planned = private.ledger.planned(name)
    if planned.mechanism != "gaussian":
        raise UnplannedRelease(f"'{name}' is planned as {planned.mechanism}, not as gaussian")
    n_split = dp.n_split and math.ceil(dp.n_split / distributed.world_size())
    gradients = partial(_padded_clipped_sum, network, per_example_loss, dp.max_grad_norm, layer_rows)
    parts = PhysicalBatches(dp.max_physical_batch_size, n_split, private.device)
    with ThreadPoolExecutor(1) as ahead:
        while private.ledger.executed(name) < planned.num_steps:
            release = private.ledger.book(name)
            index = private.ledger.executed(name) - 1
            std = release.noise_multiplier * dp.max_grad_norm
            # Drawn by a CPU thread while the gradients are computed; once, by the process that adds it.
            draw = partial(records.gradient_noise, name, _size(trainable), std, index)
            noise = ahead.submit(draw) if distributed.is_main() else None
            share = _clipped_sum_of_share(release, records, trainable, gradients, parts, index)
            released = distributed.sum_on_main(share, lambda total, noise=noise: noise.result().add_to(total))
            expected_batch = private.spec.num_train * release.sample_rate
            _set_gradients(trainable, released / expected_batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield Step(index, planned.num_steps)


def _require_same_parameters(optimizer: torch.optim.Optimizer, trainable: dict[str, nn.Parameter]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in trainable.values()}:
        raise ValueError("the optimizer must hold exactly the trainable parameters")


def _test_independence(
    private: PrivateData, network: nn.Module, per_example_loss: PerExampleLoss
) -> dict[str, set[int]]:
    """Run validate_independence on random images, never on private ones; returns the rows of each layer."""
    rng = torch.Generator(device=private.device).manual_seed(0)
    shape = (3, *records_of(private).image_shape())
    images = torch.rand(shape, generator=rng, device=private.device) * 2 - 1
    # Two examples of one class, because a loss may compare the examples of a class.
    labels = torch.arange(3, device=private.device) % min(2, private.spec.num_classes)
    return validate_independence(network, per_example_loss, images, labels)


def _padded_clipped_sum(
    network: nn.Module,
    per_example_loss: PerExampleLoss,
    max_grad_norm: float,
    layer_rows: dict[str, set[int]],
    images: torch.Tensor,
    labels: torch.Tensor,
    draws: Draws,
    num_padded: int,
) -> dict[str, torch.Tensor]:
    """The clipped gradient sum of a batch, computed with `num_padded` blank examples more, which contribute nothing."""
    images, labels = (F.pad(part, (0, 0) * (part.dim() - 1) + (0, num_padded)) for part in (images, labels))
    sums, _ = clipped_sum(
        network,
        per_example_loss,
        images,
        labels,
        max_grad_norm,
        draws,
        layer_rows=layer_rows,
        num_padded=num_padded,
    )
    return sums


def _clipped_sum_of_share(
    release: Release,
    records: RecordAccess,
    trainable: dict[str, nn.Parameter],
    gradients: ClippedGradients,
    parts: PhysicalBatches,
    index: int,
) -> torch.Tensor:
    """(P,) float64: the clipped sum over this process's share, possibly empty, of the sample that all processes draw.

    Float64, because one record more changes the rounding of all later parts. In float32 these changes would add up to
    a fraction of the bound that is not negligible.
    """
    indices = records.sampled_indices(release, index)
    own = distributed.share(len(indices))
    draws = records.loss_draws(release.name, index, len(indices))[own]
    indices = indices[own]

    def clipped(positions: slice, size: int) -> torch.Tensor:
        images, labels = records.take(indices[positions])
        return _flat(
            trainable, gradients(images, labels, draws[positions].stretched(size), size - len(labels))
        )

    total = torch.zeros(_size(trainable), dtype=torch.float64, device=records.device)
    return parts.add_up(len(indices), clipped, total)


def _size(trainable: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in trainable.values())


def _flat(trainable: dict[str, nn.Parameter], sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """All sums as one vector, so that one draw of noise covers all parameters."""
    return torch.cat([sums[name].flatten() for name in trainable])


def _set_gradients(trainable: dict[str, nn.Parameter], flat: torch.Tensor) -> None:
    parts = flat.split([parameter.numel() for parameter in trainable.values()])
    for parameter, part in zip(trainable.values(), parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
