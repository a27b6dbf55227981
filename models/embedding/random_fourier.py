"""Random Fourier features of Gaussian kernels (Rahimi & Recht 2007), and mean embeddings of images in them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.embedding.mean_embedding import Embedding
from utils.runtime import Runtime
from utils.sections import check_field, check_positive


@dataclass(frozen=True)
class FeatureConfig:
    d_rff: int  # number of random features; half of those of a bandwidth are cosines, half are sines
    class_mass: (
        float  # of an additional constant feature, against norm 1 of the others; carries the class shares
    )

    def __post_init__(self) -> None:
        check_field(self.d_rff > 0 and self.d_rff % 2 == 0, "d_rff", self.d_rff, "a positive even number")
        check_positive(self, "class_mass")


@dataclass(frozen=True)
class FourierConfig(FeatureConfig):
    rff_sigma: float  # squared bandwidth on pixels in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rff_sigma")


class RandomFourierFeatures:
    """(B, D) -> (B, num_features): [cos(Wx), sin(Wx)] / sqrt(num_features / 2), of L2 norm exactly 1 for every x.

    Equal numbers of rows of W have entries N(0, 1 / s), s each of the squared bandwidths, so that E[phi(x) . phi(y)] is
    the mean of exp(-|x - y|^2 / (2 s)) over them.
    """

    def __init__(
        self, dim: int, num_features: int, squared_bandwidths: list[float], rng: torch.Generator
    ) -> None:
        number, rest = divmod(num_features, 2 * len(squared_bandwidths))
        assert rest == 0, (num_features, squared_bandwidths)
        frequencies = torch.randn(num_features // 2, dim, generator=rng, device=rng.device)
        bandwidths = torch.tensor(squared_bandwidths, device=rng.device).sqrt().repeat_interleave(number)
        self.frequencies = frequencies / bandwidths[:, None]
        self.num_features = num_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        angles = x @ self.frequencies.T
        return torch.cat([angles.cos(), angles.sin()], dim=1) / (self.num_features / 2) ** 0.5


class FourierEmbedding(Embedding):
    """In random Fourier features of the pixels."""

    def __init__(
        self,
        config: FeatureConfig,
        squared_bandwidths: list[float],  # on pixels in [0, 1]
        *,
        image_size: int,
        channels: int,
        runtime: Runtime,
    ) -> None:
        super().__init__(config.class_mass)
        self.image_size = image_size
        self.phi = RandomFourierFeatures(
            channels * image_size**2, config.d_rff, squared_bandwidths, runtime.rng("frequencies")
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, d_rff + 1)."""
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return F.pad(self.phi((images.flatten(1) + 1) / 2), (0, 1), value=self.mass)
