"""Training in stages: position, averaged weights, optimizers, snapshots, and the checkpoint that holds all of them."""

import abc
from typing import ClassVar

import torch
from torch import nn

from data.spec import Samples
from models.nn.ema import EMA
from utils.errors import UserError
from utils.runtime import Runtime
from utils.stopping import raise_swallowed
from utils.timing import Cost


class Staged(abc.ABC):
    """Networks that are trained in stages, of which the first network is averaged and draws the samples.

    A stage starts from the averaged weights of the previous stage, with a new average and new optimizers. "start" is
    the stage of untrained networks. A subclass creates `runtime` and its networks, then calls `_start_stage("start")`.
    """

    runtime: Runtime
    keeps_average: ClassVar[bool] = True

    # Provided by the subclass

    @abc.abstractmethod
    def _networks(self) -> dict[str, nn.Module]:
        """Name in the checkpoint -> network. The first network is averaged."""

    @abc.abstractmethod
    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        """Name in the checkpoint -> a new optimizer for the stage."""

    @abc.abstractmethod
    def _preview(self) -> Samples | None:
        """A few images that show the progress of training; None if the networks make no images."""

    def _ema_rate(self) -> float:
        """Decay of the average."""
        return self.config.model.ema_rate

    def _prepare_network(self, stage: str) -> None:
        """Change the averaged network before a stage starts or is restored, for example by adding adapters."""

    # Stages and steps

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of a model with only one; None in a stage without training."""
        return self.optimizers.get("optimizer")

    def _averaged_network(self) -> nn.Module:
        return next(iter(self._networks().values()))

    def _enter_stage(self, stage: str) -> int:
        """Start a stage, unless a restored run is already in it. Returns the number of steps already taken."""
        if self.stage != stage:
            if self.keeps_average:
                self.ema.copy_to(self._averaged_network())
            self._prepare_network(stage)
            self._start_stage(stage)
        return self.step

    def _start_stage(self, stage: str) -> None:
        self.stage, self.step = stage, 0
        if self.keeps_average:
            self.ema = EMA(self._averaged_network(), self._ema_rate())
        self.optimizers = self._make_optimizers(stage)

    def _finish_step(self, snapshot_freq: int | None) -> None:
        """Count a finished step. After every `snapshot_freq` steps (None: never), write a snapshot and a preview."""
        self.step += 1
        raise_swallowed()
        if snapshot_freq is not None and self.step % snapshot_freq == 0:
            # The snapshot comes first: a preview must not outlive the booking of its steps.
            self.runtime.snapshot("train" if self.stage == "train" else "pretrain")
            preview = self._preview()
            if preview is not None:
                self.runtime.preview(self.stage, self.step, preview.images, preview.labels)

    def _steps_taken(self) -> int:
        """The steps of the current stage that count for this run."""
        return self.step

    def remaining_share(self, cost: Cost) -> float:
        """Synthesizer.remaining_share."""
        if cost.stage == self.stage and cost.steps:
            return max(0.0, 1 - self._steps_taken() / cost.steps)
        return 1.0

    # Checkpoints

    def state_dict(self) -> dict:
        state = {"stage": self.stage, "step": self.step}
        state |= {name: network.state_dict() for name, network in self._networks().items()}
        if self.keeps_average:
            state["ema"] = self.ema.state_dict()
        return state | {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        if state["stage"] != self.stage:
            self._prepare_network(state["stage"])
        self._restore(state)

    def _restore(self, state: dict) -> None:
        """Take over weights, average, optimizer moments and position."""
        for name, network in self._networks().items():
            load_weights(network, state[name], "checkpoint")
        self._start_stage(state["stage"])
        self.step = state["step"]
        if self.keeps_average:
            self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            restore_moments(optimizer, state[name])


def restore_moments(optimizer: torch.optim.Optimizer, moments: dict) -> None:
    """Load the moments and step counts, which are optimizer.state_dict()["state"] of a checkpoint.

    Learning rate, decay and betas stay those of the configuration, so that a run may continue with other values.
    """
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights into a network. UserError with `source` and the first difference if the architectures differ."""
    own = network.state_dict()
    for name in [*own, *weights]:
        have, want = weights.get(name), own.get(name)
        if have is None or want is None or have.shape != want.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (have, want)]
            raise UserError(
                f"{source} has another architecture: '{name}' is {shapes[0]}, the network's {shapes[1]}; set the keys "
                f"below model to the values of its run (see its config.yaml)"
            )
    network.load_state_dict(weights)
