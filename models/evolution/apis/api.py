"""The contract of an image generator that Private Evolution steers (Lin et al., ICLR 2024): draw at random, vary.

Generators see public data and what votes have selected, never a private image.
"""

import abc
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from data.spec import DataSpec, PublicData
from opacus_ext.accounting import Release
from utils.errors import UserError
from utils.runtime import Runtime
from utils.timing import Cost


@dataclass(frozen=True)
class Candidates:
    """Synthetic images with the private class that each belongs to.

    images (N, C, H, W) uint8 of the generator's shape; labels (N,) int64; info: name -> array of N rows, what the
    generator wants to know again when it varies an image (its ImageNet label, the row of a public set); numbers.
    """

    images: np.ndarray
    labels: np.ndarray
    info: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | slice) -> "Candidates":
        info = {name: rows[indices] for name, rows in self.info.items()}
        return Candidates(self.images[indices], self.labels[indices], info)

    @staticmethod
    def concatenate(parts: list["Candidates"]) -> "Candidates":
        """All rows of `parts`, in order; they must carry the same info."""
        return Candidates(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
            {name: np.concatenate([part.info[name] for part in parts]) for name in parts[0].info},
        )


class ImageAPI(abc.ABC):
    """A generator behind two calls. Constructing checks the settings and reads no data.

    `Config` is a frozen dataclass, the section model.api_params.<name> of the configuration. Randomness comes from
    `runtime`, by streams whose names start with `rng_name`: the same name repeats the result, so that a resumed run
    makes the same call again. Several processes make the same calls and must get the same result; they may share the
    work (models/fitting/batches.py). Long calls show their own progress.
    """

    Config: ClassVar[type]

    def __init__(self, config: object, spec: DataSpec, runtime: Runtime) -> None:
        self.config = config
        self.spec = spec
        self.runtime = runtime

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it makes; voting and the delivered samples use them at the spec's shape."""
        return self.spec.image_shape

    def check_degree(self, degree: float) -> None:
        """Raise UserError("7 is not allowed for api ...; it must be ...") for a degree of variation that makes no sense
        here. Private Evolution puts the key of its setting in front."""

    @property
    def needs_public_images(self) -> bool:
        """`prepare` must be given public images."""
        return False

    def releases(self) -> list[Release]:
        """What the weights that it starts from have already cost on the private data."""
        return []

    def require_ready(self) -> None:
        """Raise UserError where weights, a library or a key is missing; quick, for --dry_run."""

    def prepare(self, public: PublicData | None) -> None:
        """Called once in pretraining, and not again in a run that resumes after it: load, or learn from public data."""

    @abc.abstractmethod
    def random_api(self, labels: np.ndarray, rng_name: str) -> Candidates:
        """One random image per entry of `labels` (N,) int64, the private class that it is drawn for."""

    @abc.abstractmethod
    def variation_api(self, candidates: Candidates, degree: float, rng_name: str) -> Candidates:
        """One variation of every candidate, in order, labels kept. What a degree means is the generator's own."""

    def public_costs(self, num_images: int, num_classes: int) -> list[Cost]:
        """What `prepare` will take with so many public images, for --dry_run."""
        return []

    def remaining_share(self, cost: Cost) -> float:
        """The share of this work, from 0 to 1, that is not done in the state that was restored."""
        return 1.0

    def seconds_per_image(self) -> float | None:
        """What one image takes on this machine, for --dry_run; None where that shows only after `prepare`."""
        return None

    def state_dict(self) -> dict:
        """Tensors and plain containers that `prepare` has left and the calls need."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""

    def parameter_counts(self) -> dict[str, int]:
        """Network name -> number of parameters."""
        return {}


def checked(
    found: Candidates, labels: np.ndarray, image_shape: tuple[int, int, int], call: str
) -> Candidates:
    """Return `found` if a generator's result of `call` meets the contract; else raise a UserError of one line."""
    images = np.asarray(found.images)
    expected = (len(labels), *image_shape)
    if images.shape != expected:
        raise UserError(f"{call} returned images of shape {images.shape}; expected {expected}")
    if images.dtype != np.uint8:
        finite = "" if images.dtype.kind != "f" or np.isfinite(images).all() else ", some of them not finite"
        raise UserError(f"{call} returned {images.dtype} pixels{finite}; they must be uint8")
    for name, rows in found.info.items():
        if len(rows) != len(labels):
            raise UserError(f"{call} returned {len(rows)} rows of '{name}' for {len(labels)} images")
    return replace(found, images=images, labels=np.asarray(labels, np.int64))
