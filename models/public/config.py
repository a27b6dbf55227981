"""The section `public_data` with the private queries that select or replace public images. Light to import: a command
line is checked with it before anything else of a method is loaded."""

from dataclasses import dataclass

from utils.sections import PublicSetConfig, check_field, check_least, check_positive


@dataclass(frozen=True)
class SelectiveConfig:
    ratio: float  # share of the public classes that are kept; 1.0 keeps all, without a query
    sigma: float  # noise multiplier of the semantic query
    batch_size: int  # images per forward pass of the query classifier
    semantic_path: str | None  # file of an earlier query to reuse; its privacy cost is booked again

    def __post_init__(self) -> None:
        check_field(0 < self.ratio <= 1, "ratio", self.ratio, "in (0, 1]")
        check_least(self, 0, "sigma")
        check_least(self, 1, "batch_size")


@dataclass(frozen=True)
class CentralConfig:
    sample_num: int  # noisy central images per class
    sigma: float  # noise multiplier of one central image query
    batch_size: int  # expected Poisson batch of one query
    downscale: int | None  # the query sees every n-th pixel; None: see central_images.py
    max_norm: float | None  # L2 bound on the pixels of one record; None: that of a white image
    bins: int | None  # grey levels of a vote (modes); None: 2 for grey images, 16 for colour
    smooth: bool  # median filter, and sharpening of grey images
    num_ops: int  # RandAugment: operations per image; 0: none
    max_magnitude: int  # RandAugment: magnitudes 1 .. this, of 30

    def __post_init__(self) -> None:
        check_least(self, 1, "sample_num", "batch_size", "max_magnitude")
        for field, least in (("downscale", 1), ("bins", 2)):
            value = getattr(self, field)
            check_field(value is None or value >= least, field, value, f"null or at least {least}")
        check_positive(self, "sigma")
        norm = self.max_norm
        check_field(norm is None or norm > 0, "max_norm", norm, "null or greater than 0")
        check_least(self, 0, "num_ops")
        check_field(self.max_magnitude <= 30, "max_magnitude", self.max_magnitude, "at most 30")


@dataclass(frozen=True)
class PublicDataConfig(PublicSetConfig):
    selective: SelectiveConfig
    central: CentralConfig
