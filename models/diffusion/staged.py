"""A diffusion network in stages: its start, the parameters that a stage trains, and the content of a checkpoint.

A run may start from the checkpoint of another run (`model.ckpt`). Its ledger includes the privacy cost of that run.
"""

import abc

import torch
from torch import nn

from models.diffusion.checkpoint import chosen_weights, read_checkpoint, require_fit
from models.fitting.stages import Staged, load_weights
from models.synthesizer import Synthesizer
from opacus_ext.private_data import PrivateData
from utils.timing import Cost


class StagedNetwork(Staged, Synthesizer):
    """Base of the diffusion family. The constructor of a subclass calls `_make_network` when the attributes that its
    seams use are set."""

    def _make_network(self) -> None:
        """A new network, or that of model.ckpt."""
        path = self.config.model.ckpt
        checkpoint, self.inherited = (None, []) if path is None else read_checkpoint(path)
        with self.runtime.seeded("network"):
            network = self._build_network(
                self._label_dim() if checkpoint is None else checkpoint["label_dim"]
            )
        self.network = self.runtime.place(network)
        if checkpoint is not None:
            self._start_from(checkpoint, f"model.ckpt: {path}")
        self._start_stage("start")
        self._steps_before = 0  # of the pretraining that this run continues
        if checkpoint is not None and self._continues(checkpoint):
            self._steps_before = checkpoint["step"]
            self._restore(checkpoint)

    # Seams

    @property
    @abc.abstractmethod
    def network_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""

    @abc.abstractmethod
    def _label_dim(self) -> int:
        """Rows of a new network's label table, without that of no label."""

    @abc.abstractmethod
    def _build_network(self, label_dim: int) -> nn.Module:
        """A new network. Called once, with seeded global generators."""

    @abc.abstractmethod
    def _stages(self) -> dict[str, object]:
        """Stage -> its section of the configuration, with `optim`; in order, "train" last."""

    @abc.abstractmethod
    def _continues(self, checkpoint: dict) -> bool:
        """This run's pretraining is a continuation of the checkpoint's."""

    def _require_labels(self, checkpoint: dict, source: str) -> None:
        """Raise UserError if a stage would use labels that the checkpoint's network does not know."""

    def _trained_parameters(self) -> set[str]:
        """Names of the network's parameters that the private stage trains; it freezes all others."""
        return {name for name, _ in self.network.named_parameters()}

    def _has_private_labels(self) -> bool:
        """The network was trained with private classes as labels, not with those of a public set."""
        return self.stage not in ("start", "pretrain")

    # The start

    def _start_from(self, checkpoint: dict, source: str) -> None:
        """Load the chosen weights. UserError if they were made for other inputs, labels or layers."""
        require_fit(checkpoint, source, self.network_shape, self.spec.num_classes)
        self._require_labels(checkpoint, source)
        load_weights(self.network, chosen_weights(checkpoint, self.config.model.ckpt_weights), source)

    def _book_inherited(self, private: PrivateData | None) -> None:
        """Book the private queries of the checkpoint's run, because this run's samples reveal their results too."""
        for release in self.inherited:
            left = release.num_steps - private.ledger.executed(release.name)
            private.ledger.book(release.name, left)

    # Stages

    def _is_completed(self, stage: str) -> bool:
        """A later stage has started, so a resumed run skips this one."""
        order = ["start", *self._stages()]
        return order.index(self.stage) > order.index(stage)

    def _steps_taken(self) -> int:
        return self.step - (self._steps_before if self.stage == "pretrain" else 0)

    def remaining_share(self, cost: Cost) -> float:
        done = cost.stage in self._stages() and self._is_completed(cost.stage)
        return 0.0 if done else super().remaining_share(cost)

    def _start_stage(self, stage: str) -> None:
        """Train all parameters, or in the private stage those that the method chooses.

        The average holds the frozen parameters too, whose average is their value: its weights are a whole network,
        from which another method or stage can start without knowing which parameters were trained.
        """
        trained = self._trained_parameters() if stage == "train" else None
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(trained is None or name in trained)
        super()._start_stage(stage)

    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        section = self._stages().get(stage)
        if section is None:
            return {}
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return {"optimizer": section.optim.make(trained)}

    # Checkpoints

    def _networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def state_dict(self) -> dict:
        """Raw weights ("network") and their average ("ema"), by name. A later stage starts from the average."""
        return {
            **super().state_dict(),
            "label_dim": self.network.null_label,
            "private_labels": self._has_private_labels(),
            "shape": list(self.network_shape),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def _restore(self, state: dict) -> None:
        moments = None if state["optimizer"] is None else state["optimizer"]["state"]
        super()._restore({**state, "optimizer": moments})
