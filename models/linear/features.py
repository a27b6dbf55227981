"""Fixed features of images for linear classifiers under differential privacy.

A feature map treats every image by itself and knows no statistic of the private set: an extractor, an optional
projection that public images determine, unit norm, and a constant feature. Legend: B batch, C channels, H W pixels, D
features, M features of the extractor.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data.spec import DataSpec, PublicData
from extractors import build_extractor
from utils.images import to_uint8
from utils.progress import progress
from utils.sections import check_field, check_positive

# Of the first direction's: a smaller one is mostly numerical noise.
SMALLEST_VARIANCE = 1e-4


@dataclass(frozen=True)
class FeatureConfig:
    features: str  # pixels, scattering or another name of extractors/__init__.py
    num_directions: int | None  # principal directions of the public features that remain; None: no projection
    whitening: float  # power of the public standard deviation that each direction is divided by, 0 to 1
    constant: float  # size of one more, constant feature (the others have norm 1): the intercept

    def __post_init__(self) -> None:
        directions = self.num_directions
        fits = directions is None or directions > 0
        check_field(fits, "num_directions", directions, "null or at least 1")
        check_field(0 <= self.whitening <= 1, "whitening", self.whitening, "from 0 to 1")
        check_positive(self, "constant")


class FeatureMap(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, D) of L2 norm sqrt(1 + constant^2). An image without any feature maps to the
    constant alone.

    With `num_directions`, `learn` must be called before the first use. Raises Unavailable if the extractor needs
    something that is not installed.
    """

    def __init__(self, config: FeatureConfig, spec: DataSpec, weights_root: Path, device: str) -> None:
        super().__init__()
        self._extract = build_extractor("model.features", config.features, spec, weights_root, device)
        # By name, since "auto" may be another extractor where a released classifier is used.
        self.config = replace(config, features=self._extract.name)
        blank = torch.zeros(1, *spec.image_shape, device=device)
        num_extracted = self._extracted(blank).shape[1]
        most = num_extracted if config.num_directions is None else config.num_directions
        check_field(
            most <= num_extracted, "num_directions", most,
            f"at most {num_extracted}, the number of features of {config.features}",
        )  # fmt: skip
        self.num_features = most + 1
        if config.num_directions is not None:
            self.register_buffer("centre", torch.zeros(num_extracted, device=device))
            self.register_buffer("directions", torch.zeros(num_extracted, most, device=device))

    def learn(self, public: PublicData) -> None:
        """Determine the projection from public images; without `num_directions` there is nothing to determine."""
        if self.config.num_directions is None:
            return
        parts = [
            self._extracted(torch.from_numpy(public.samples.images[start : start + 256]))
            for start in progress(range(0, len(public), 256), "public features", unit="batch")
        ]
        features = torch.cat(parts)
        self.centre.copy_(features.mean(0))
        centred = _unit(features - self.centre).double()
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        kept = slice(-self.directions.shape[1], None)
        variances = variances[kept].clamp(min=SMALLEST_VARIANCE * float(variances[-1]))
        self.directions.copy_(vectors[:, kept] / variances ** (self.config.whitening / 2))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self._extracted(images)
        if self.config.num_directions is not None:
            features = _unit(features - self.centre) @ self.directions
        return nn.functional.pad(_unit(features), (0, 1), value=self.config.constant)

    def _extracted(self, images: torch.Tensor) -> torch.Tensor:
        """(B, M) of float images in [-1, 1] or of uint8 images. Extractors read uint8 pixels."""
        pixels = images if images.dtype == torch.uint8 else torch.from_numpy(to_uint8(images))
        return self._extract(pixels.to(self._extract.device))[0].float()


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Every row divided by its L2 norm; a row of zeros stays."""
    return nn.functional.normalize(rows, dim=1)
