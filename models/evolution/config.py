"""Settings of Private Evolution: section `train`."""

from dataclasses import dataclass
from typing import TypeVar

from models.evolution.population import SELECTIONS
from models.evolution.voting import BACKENDS, MODES
from utils.errors import unknown
from utils.sections import check

T = TypeVar("T")


@dataclass(frozen=True)
class EvolutionConfig:
    """T iterations. The two schedules have T + 1 entries, the first one for the initial population; the lists below
    `next_variation_fold` have one entry for all iterations, or T."""

    num_samples_schedule: list[int]  # images drawn at first, then images selected in each iteration
    variation_degree_schedule: list[float]  # degree of variation, in the API's own scale
    lookahead_degree: int  # variations whose mean embedding stands for a candidate; 0: its own embedding
    num_nearest_neighbor: int  # candidates that a record votes for
    nn_mode: str  # L2, IP (inner product) or cosine
    nn_backend: str  # auto, faiss or torch
    count_threshold: float  # votes that are subtracted before sampling; negative differences count as 0
    cond: bool  # True: records vote among the candidates of their class alone
    initial_variation_fold: int  # variations of every initial image that join it
    next_variation_fold: list[int]  # variations of every selected image
    keep_selected: list[bool]  # the selected images stay next to their variations
    selection: list[str]  # sample (by votes, with replacement) or rank (the most votes)
    feature_extractor_batch_size: int  # images per forward pass of the feature extractor

    def __post_init__(self) -> None:
        sizes, degrees = self.num_samples_schedule, self.variation_degree_schedule
        check(len(sizes) > 0, "train.num_samples_schedule", sizes, "a list of at least one number of images")
        check(
            len(degrees) == len(sizes),
            "train.variation_degree_schedule",
            f"a list of {len(degrees)}",
            f"as long as train.num_samples_schedule, {len(sizes)}",
        )
        for name in ("next_variation_fold", "keep_selected", "selection"):
            length = len(getattr(self, name))
            allowed = f"a list of 1 entry, or one per iteration, {self.num_iterations}"
            check(length in (1, self.num_iterations), f"train.{name}", f"a list of {length}", allowed)
        self._check_values()

    def _check_values(self) -> None:
        for name, least in (
            ("lookahead_degree", 0),
            ("num_nearest_neighbor", 1),
            ("count_threshold", 0),
            ("initial_variation_fold", 0),
            ("feature_extractor_batch_size", 1),
        ):
            value = getattr(self, name)
            check(value >= least, f"train.{name}", value, f"{least} or more")
        for iteration in range(1, self.num_iterations + 1):
            kept, fold = self.keeps(iteration), self.fold(iteration)
            check(
                fold >= (not kept),
                "train.next_variation_fold",
                fold,
                "1 or more where selected images are not kept",
            )
        for key, values, known in (
            ("nn_mode", [self.nn_mode], MODES),
            ("nn_backend", [self.nn_backend], BACKENDS),
            ("selection", self.selection, SELECTIONS),
        ):
            for value in values:
                if value not in known:
                    raise unknown(f"train.{key}", value, known)

    @property
    def num_iterations(self) -> int:
        return len(self.num_samples_schedule) - 1

    def fold(self, iteration: int) -> int:
        """Of iterations 1 .. T, as the following ones."""
        return _entry(self.next_variation_fold, iteration)

    def keeps(self, iteration: int) -> bool:
        return _entry(self.keep_selected, iteration)

    def selection_of(self, iteration: int) -> str:
        return _entry(self.selection, iteration)

    def growth(self, iteration: int) -> int:
        """Size of the population after iteration 0 .. T, per image that was drawn or selected for it."""
        if iteration == 0:
            return 1 + self.initial_variation_fold
        return self.fold(iteration) + self.keeps(iteration)

    def check_sizes(self, num_classes: int) -> None:
        """Raise UserError unless every class has the candidates that each iteration takes from it."""
        num_blocks = num_classes if self.cond else 1
        for iteration, selected in enumerate(self.num_samples_schedule):
            check(
                selected >= num_classes,
                f"train.num_samples_schedule[{iteration}]",
                selected,
                f"at least one image for each of the {num_classes} classes",
            )
            if iteration == 0:
                continue
            block = self.growth(iteration - 1) * (self.num_samples_schedule[iteration - 1] // num_blocks)
            votes = self.num_nearest_neighbor
            allowed = f"at most the {block} candidates that a class has in iteration {iteration}"
            check(votes <= block, "train.num_nearest_neighbor", votes, allowed)
            needed = -(-selected // num_blocks)
            check(
                self.selection_of(iteration) != "rank" or needed <= block,
                f"train.num_samples_schedule[{iteration}]",
                selected,
                f"at most what ranking can take from a population of {block * num_blocks}",
            )


def _entry(values: list[T], iteration: int) -> T:
    return values[0] if len(values) == 1 else values[iteration - 1]
