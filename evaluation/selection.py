"""Choose the reported epochs of a classifier, and keep its logits on the test images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data.spec import Samples
from utils.errors import Unavailable
from utils.seeding import numpy_rng

if TYPE_CHECKING:
    import torch

    from evaluation.classifiers.training import TrainedClassifier

LAST_EPOCH, NOISY_VAL, SYN_VAL = "last_epoch", "noisy_val", "syn_val"
BEST_VAL, BEST_TEST = "best_val", "best_test"  # oracles
RELEASED = "released"  # the classifier that a run releases, next to those that are trained on its samples
SELECTIONS_OF_MODE = {
    "val": (NOISY_VAL, SYN_VAL, LAST_EPOCH),
    "syn": (SYN_VAL, LAST_EPOCH),
    "sen": (BEST_TEST, SYN_VAL, LAST_EPOCH),
}
NOT_PRIVATE = {
    BEST_VAL: "the epoch is chosen on private validation images without noise; not a private result",
    BEST_TEST: "the epoch is chosen on the test images without noise; not a private result",
}


class NoisySelection(Protocol):
    """Queries private validation records, through a booked mechanism, for the candidate that they prefer."""

    def choose(self, name: str, correct: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]") -> int:
        """The index of the noisy best candidate. Called once per classifier, as "selection/<classifier>".

        `correct(images (B, C, H, W) float32 in [-1, 1], labels (B,)) -> (B, candidates)` of 0 and 1: the votes of each
        record, computed from that record alone. B may be 0, to learn the number of candidates.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """A chosen epoch, counted from 1, and its logits on the test images: (N, K) float32."""

    epoch: int
    logits: np.ndarray


@dataclass(frozen=True)
class ClassifierResult:
    """One trained classifier: the choice of each selection, or the reason why there is none."""

    name: str
    num_train: int
    num_epochs: int
    choices: dict[str, Choice | Unavailable]


@dataclass(frozen=True)
class References:
    """What the choice of epochs is based on. `validation`: the private validation images, for the oracle; None: not
    given."""

    held_out: Samples
    test: Samples
    noisy: NoisySelection | None
    validation: Samples | None


def selections(mode: str, oracles: bool = False) -> tuple[str, ...]:
    """The selections that a mode reports: its own and the free ones; with `oracles` the non-private ones too."""
    extra = ((BEST_VAL,) if mode == "val" else ()) + (BEST_TEST,) if oracles else ()
    return tuple(dict.fromkeys(SELECTIONS_OF_MODE[mode] + extra))


def split_samples(num_samples: int, num_val: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for synthetic validation; the same split for every mode, seed and classifier.

    At most a tenth is held out.
    """
    order = numpy_rng(0, "synthetic validation").permutation(num_samples)
    num_train = num_samples - min(num_val, num_samples // 10)
    return order[:num_train], order[num_train:]


def select_epochs(
    trained: "TrainedClassifier", wanted: tuple[str, ...], references: References
) -> ClassifierResult:
    """Apply the `wanted` selections to `trained`, and compute the logits of each chosen epoch on the test images.

    Only the selection BEST_TEST uses the test images for the choice, and its value is marked non-private.
    """
    choices: dict[str, Choice | Unavailable] = {}
    for selection in wanted:
        try:
            chosen = _choose(selection, trained, references)
        except Unavailable as reason:
            choices[selection] = reason
            continue
        choices[selection] = Choice(trained.epochs[chosen], trained.logits(chosen, references.test.images))
    return ClassifierResult(trained.name, trained.num_train, trained.num_epochs, choices)


def _choose(selection: str, trained: "TrainedClassifier", references: References) -> int:
    """The index of the selected candidate."""
    held_out, noisy = references.held_out, references.noisy
    if selection == LAST_EPOCH:
        return len(trained.states) - 1
    if selection == BEST_TEST:
        return _best(trained, references.test)
    if selection == BEST_VAL:
        if references.validation is None:
            raise Unavailable("needs the private validation images of a run")
        return _best(trained, references.validation)
    if selection == SYN_VAL:
        if len(held_out) == 0:
            raise Unavailable(
                "no samples are held out for validation; give at least 10 samples and eval.num_val > 0"
            )
        return _best(trained, held_out)
    if noisy is None:
        raise Unavailable("eval.mode=val needs private validation records of a run; use eval.mode=syn")
    chosen = noisy.choose(f"selection/{trained.name}", trained.correct)
    assert 0 <= chosen < len(trained.states), (chosen, len(trained.states))
    return chosen


def _best(trained: "TrainedClassifier", samples: Samples) -> int:
    """The candidate with most correct predictions; the latest of equals."""
    correct = [
        (trained.logits(candidate, samples.images).argmax(axis=1) == samples.labels).sum()
        for candidate in range(len(trained.states))
    ]
    return len(correct) - 1 - int(np.argmax(correct[::-1]))
