"""The stage machine: what a stage starts from, when it writes snapshots, and what a checkpoint restores."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from data.spec import Samples
from models.fitting.stages import Staged
from utils.errors import UserError
from utils.runtime import Runtime


class Line(Staged):
    """One linear layer, averaged with decay 0.9."""

    def __init__(self, width: int = 2) -> None:
        self.runtime = Runtime(seed=0)
        self.network = nn.Linear(width, 1)
        self._start_stage("start")

    def _networks(self):
        return {"network": self.network}

    def _make_optimizers(self, stage):
        return {} if stage == "start" else {"optimizer": torch.optim.Adam(self.network.parameters(), lr=0.1)}

    def _ema_rate(self):
        return 0.9

    def _preview(self):
        return Samples(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int64))

    def learn(self, stage: str, num_steps: int, snapshot_freq: int | None = None) -> None:
        for _ in range(self._enter_stage(stage), num_steps):
            self.optimizer.zero_grad()
            self.network(torch.ones(1, self.network.in_features)).sum().backward()
            self.optimizer.step()
            self.ema.update(self.network)
            self._finish_step(snapshot_freq)


def test_a_stage_starts_from_the_average_of_the_previous_one():
    line = Line()
    line.learn("pretrain", 3)
    average = line.ema.weights["weight"].clone()
    assert not torch.equal(average, line.network.weight)
    assert line._enter_stage("train") == 0
    assert torch.equal(line.network.weight, average)
    assert line.ema.num_updates == 0 and not line.optimizer.state


@pytest.mark.parametrize(
    ("stage", "folder"), [("pretrain", "pretrain"), ("warm-up", "pretrain"), ("train", "train")]
)
def test_the_snapshot_precedes_the_preview(stage, folder):
    line, events = Line(), []
    line.runtime.snapshot = lambda name: events.append(("snapshot", name, line.step))
    line.runtime.preview = lambda name, step, images, labels: events.append(("preview", name, step))
    line.learn(stage, 5, snapshot_freq=2)
    expected = [[("snapshot", folder, step), ("preview", stage, step)] for step in (2, 4)]
    assert events == expected[0] + expected[1]


def test_a_restored_model_continues_bit_for_bit():
    whole, resumed = Line(), Line()
    resumed.network.load_state_dict(whole.network.state_dict())
    whole.learn("train", 2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert (resumed.stage, resumed.step) == ("train", 2)
    whole.learn("train", 5)
    resumed.learn("train", 5)
    assert torch.equal(whole.network.weight, resumed.network.weight)
    assert torch.equal(whole.ema.weights["weight"], resumed.ema.weights["weight"])


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(UserError, match="weight"):
        Line(width=3).load_state_dict(Line().state_dict())
