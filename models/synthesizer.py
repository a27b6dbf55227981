"""The contract of every method."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.locations import IN_DISTRIBUTION, is_in_distribution
from data.spec import DataSpec, PublicData, Samples
from models.public.config import PublicDataConfig
from models.released.classifier import ReleasedClassifier
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.errors import UserError
from utils.runtime import Runtime
from utils.sections import GenConfig, check
from utils.timing import Cost


@dataclass(frozen=True)
class Sections:
    """The sections of the configuration that most methods have. A method's Config states its own types of the first
    three."""

    model: object
    pretrain: object
    train: object
    gen: GenConfig
    public_data: PublicDataConfig


class Synthesizer(abc.ABC):
    """A method: construct, plan, pretrain, train, generate.

    `Config` is a frozen dataclass whose fields are sections of the composed configuration; most methods inherit it from
    `Sections`. Constructing reads no data; `privacy_plan` depends on config and spec alone.
    """

    Config: ClassVar[type]
    selects_public_classes: ClassVar[bool] = False  # by the query of public_data.selective
    learns_class_shares: bool = (
        False  # uses noisy shares of the private classes in training; labels stay balanced
    )

    def __init__(self, config: object, spec: DataSpec, runtime: Runtime) -> None:
        public = getattr(config, "public_data", None)
        if public is not None:
            _require_ratio(public, self.selects_public_classes)
        self.config = config
        self.spec = spec
        self.runtime = runtime

    @abc.abstractmethod
    def privacy_plan(self) -> list[Release]:
        """Every private query of this run; at most one leaves its noise multiplier open."""

    def pretraining_plan(self) -> list[Release]:
        """The private queries of `pretrain`; a run without private data must have none."""
        return []

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        """Learn from public data. `private` may be queried through its mechanisms; None in a run without private
        data (sensitive_data.name=null)."""

    @abc.abstractmethod
    def train(self, private: PrivateData) -> None:
        """Learn from private data through its mechanisms."""

    @property
    def makes_images(self) -> bool:
        """False: the product is the released classifier alone, and `generate` is not called."""
        return True

    @abc.abstractmethod
    def generate(self, num_samples: int) -> Samples:
        """Exactly `num_samples` labelled images, labels balanced."""

    def released_classifier(self) -> ReleasedClassifier | None:
        """A classifier of the private classes that was made from released results: the other product of a run."""
        return None

    @abc.abstractmethod
    def state_dict(self) -> dict:
        """Tensors and plain containers from which an interrupted run continues; nothing private outside a release."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""

    def parameter_counts(self) -> dict[str, int]:
        """Network name -> number of parameters."""
        return {}

    def missing_requirements(self) -> list[str]:
        """Requirements other than data that are missing, such as weights: one line each, with what helps."""
        return []

    def settings_without_effect(self) -> dict[str, str]:
        """Settings that have no effect in this run: dotted key, or section for all in it -> why."""
        return {}

    @property
    def uses_public_images(self) -> bool:
        """Images of public_data are read for this method, if the configuration names any."""
        return True

    @property
    def learns_from_public_images(self) -> bool:
        """With these settings public images have an effect, in this run or in that of the checkpoint it starts from."""
        return self.uses_public_images

    def public_costs(self, num_images: int) -> list[Cost]:
        """Costs of learning from `num_images` public images, for --dry_run."""
        return []

    def costs(self) -> list[Cost]:
        """Costs of the other stages, for --dry_run."""
        return []

    def remaining_share(self, cost: Cost) -> float:
        """The share of this work, from 0 to 1, that is not done in the state that was restored."""
        return 1.0


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
    """(num_samples,) int64 running 0, 1, .. K-1, 0, 1, ..: every prefix is balanced."""
    return np.arange(num_samples, dtype=np.int64) % num_classes


def preview_labels(num_classes: int) -> np.ndarray:
    """Balanced labels of a preview: eight per class, and of more than 16 classes no more images than of 16."""
    return balanced_labels(8 * min(num_classes, 16), num_classes)


def _require_ratio(public: PublicDataConfig, selects: bool) -> None:
    """Raise UserError if public_data.selective.ratio asks for a selection that the method (`selects`: it can make one)
    or the public set does not allow."""
    ratio, key = public.selective.ratio, "public_data.selective.ratio"
    check(ratio == 1 or selects, key, ratio, "1: this method pretrains on all public classes")
    if ratio < 1 and is_in_distribution(public):
        raise UserError(
            f"{key}: {ratio} is not allowed with public_data.name={IN_DISTRIBUTION}, whose classes are the private "
            f"ones, so that a query would select nothing; it must be 1 (instead of PrivImage use PDP-Diffusion)"
        )
