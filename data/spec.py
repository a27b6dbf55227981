"""Records that all packages share: the public facts of a dataset, and labelled images."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DataSpec:
    """The public facts of a sensitive dataset. Images are square; class names are for prompts and plots.

    `num_train` is the number of private training records; it is treated as public, and the ledger records that.
    `identity` is a random name of the prepared folder, empty for an embedded set. `is_benchmark`: a published set, on
    which the settings of the presets were compared. `protocol`: which of the two published evaluation
    protocols its test classifiers follow, "standard" or "cifar". `num_unused`: training images that the run does
    not use. `images_per_person`: the largest number of training images of one person (or other group), declared or
    observed when the images were prepared. `num_public`: records of the set that were declared public, equally many
    per class, chosen by `public_seed`; they are not among num_train.
    """

    name: str
    resolution: int
    channels: int
    num_classes: int
    num_train: int
    class_names: tuple[str, ...]
    identity: str = ""
    is_benchmark: bool = False
    protocol: str = "standard"
    num_unused: int = 0
    images_per_person: int | None = None
    images_per_person_is: str = ""
    num_public: int = 0
    public_seed: int = 0

    def __post_init__(self) -> None:
        assert self.channels in (1, 3), self.channels
        assert len(self.class_names) == self.num_classes, (self.num_classes, self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.resolution, self.resolution


@dataclass(frozen=True)
class Samples:
    """Labelled images, as methods return them and metrics receive them.

    images (N, C, H, W) uint8, possibly memory-mapped; labels (N,) int64 in [0, num_classes).
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        assert self.images.ndim == 4 and self.images.dtype == np.uint8, (self.images.shape, self.images.dtype)
        assert self.labels.shape == (len(self.images),), (self.labels.shape, self.images.shape)
        assert self.labels.dtype == np.int64, self.labels.dtype

    @classmethod
    def none(cls, image_shape: tuple[int, int, int]) -> "Samples":
        """No image: what a run has whose only product is a classifier."""
        return cls(np.empty((0, *image_shape), np.uint8), np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> "Samples":
        return Samples(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class PublicData:
    """A public labelled set at the resolution and channel count of the sensitive data."""

    name: str
    samples: Samples
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, classes: list[list[int]], class_names: tuple[str, ...]) -> "PublicData":
        """The images of the listed classes, relabelled: those of `classes[k]` get label k.

        A class index may appear in several lists; its images then appear once per list.
        """
        indices = [np.flatnonzero(np.isin(self.samples.labels, chosen)) for chosen in classes]
        labels = np.repeat(np.arange(len(classes)), [len(i) for i in indices]).astype(np.int64)
        images = self.samples.images[np.concatenate(indices)]
        return PublicData(self.name, Samples(images, labels), class_names)
