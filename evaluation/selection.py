"""Which epoch of a classifier is reported, and what it says about the test images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data.spec import Samples
from evaluation.errors import Unavailable
from utils.seeding import numpy_rng

if TYPE_CHECKING:
    import torch

    from evaluation.classifiers.training import TrainedClassifier

LAST_EPOCH, NOISY_VAL, SYN_VAL, BEST_TEST = "last_epoch", "noisy_val", "syn_val", "best_test"
SELECTION_OF_MODE = {"val": NOISY_VAL, "syn": SYN_VAL, "sen": BEST_TEST}


class NoisySelection(Protocol):
    """Asks private validation records, through a booked mechanism, which candidate they prefer."""

    def choose(self, name: str, correct: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]") -> int:
        """The index of the noisy best candidate. Called once per classifier, as "selection/<classifier>".

        `correct(images (B, C, H, W) float32 in [-1, 1], labels (B,)) -> (B, candidates)` of 0 and 1: the votes of each
        record, computed from that record alone. B may be 0, which tells the number of candidates.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """A chosen epoch, counted from 1, and its logits on the test images: (N, K) float32."""

    epoch: int
    logits: np.ndarray


@dataclass(frozen=True)
class JudgedClassifier:
    """One trained classifier: what each selection chose, or why it could not choose."""

    name: str
    num_train: int
    num_epochs: int
    choices: dict[str, Choice | Unavailable]


def selections(mode: str) -> tuple[str, str]:
    """The selections reported in a mode: its own, and the last epoch, which is free."""
    return SELECTION_OF_MODE[mode], LAST_EPOCH


def split_samples(num_samples: int, num_val: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for synthetic validation; the same split for every mode, seed and classifier.

    At most a tenth is held out.
    """
    order = numpy_rng(0, "synthetic validation").permutation(num_samples)
    num_train = num_samples - min(num_val, num_samples // 10)
    return order[:num_train], order[num_train:]


def judge(
    trained: "TrainedClassifier", mode: str, *, test: Samples, held_out: Samples, noisy: NoisySelection | None
) -> JudgedClassifier:
    """Select epochs of `trained` and compute their logits on `test`.

    Modes val and syn touch `test` only after the choice; sen chooses on it, and its number is marked non-private.
    """
    choices: dict[str, Choice | Unavailable] = {}
    for selection in selections(mode):
        try:
            chosen = _choose(selection, trained, test=test, held_out=held_out, noisy=noisy)
        except Unavailable as reason:
            choices[selection] = reason
            continue
        choices[selection] = Choice(trained.epochs[chosen], trained.logits(chosen, test.images))
    return JudgedClassifier(trained.name, trained.num_train, trained.num_epochs, choices)


def _choose(
    selection: str,
    trained: "TrainedClassifier",
    *,
    test: Samples,
    held_out: Samples,
    noisy: NoisySelection | None,
) -> int:
    """The index of the selected candidate."""
    if selection == LAST_EPOCH:
        return len(trained.states) - 1
    if selection == BEST_TEST:
        return _best(trained, test)
    if selection == SYN_VAL:
        if len(held_out) == 0:
            raise Unavailable(
                "no synthetic image is left for validation; give at least 10 and eval.num_val > 0"
            )
        return _best(trained, held_out)
    if noisy is None:
        raise Unavailable("eval.mode=val needs private validation records of a run; use eval.mode=syn")
    chosen = noisy.choose(f"selection/{trained.name}", trained.correct)
    assert 0 <= chosen < len(trained.states), (chosen, len(trained.states))
    return chosen


def _best(trained: "TrainedClassifier", samples: Samples) -> int:
    """The candidate with most right answers; the latest of equals."""
    right = [
        (trained.logits(candidate, samples.images).argmax(axis=1) == samples.labels).sum()
        for candidate in range(len(trained.states))
    ]
    return len(right) - 1 - int(np.argmax(right[::-1]))
