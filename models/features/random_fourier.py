"""Random Fourier features of the Gaussian kernel (Rahimi & Recht 2007), and mean embeddings of images in them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.mean_embedding import MEAN_EMBEDDING
from opacus_ext.private_data import PrivateData
from utils.runtime import Runtime
from utils.sections import check_field


@dataclass(frozen=True)
class FourierConfig:
    d_rff: int  # number of random features, even
    rff_sigma: float  # squared bandwidth on pixels in [0, 1]

    def __post_init__(self) -> None:
        check_field(self.d_rff > 0 and self.d_rff % 2 == 0, "d_rff", self.d_rff, "a positive even number")
        check_field(self.rff_sigma > 0, "rff_sigma", self.rff_sigma, "greater than 0")


class RandomFourierFeatures:
    """(B, D) -> (B, num_features): [cos(Wx), sin(Wx)] / sqrt(num_features / 2), of L2 norm exactly 1 for every x.

    W has entries N(0, 1 / squared_bandwidth), so that E[phi(x) . phi(y)] = exp(-|x - y|^2 / (2 squared_bandwidth)).
    """

    def __init__(self, dim: int, num_features: int, squared_bandwidth: float, rng: torch.Generator) -> None:
        assert num_features % 2 == 0, num_features
        frequencies = torch.randn(num_features // 2, dim, generator=rng, device=rng.device)
        self.frequencies = frequencies / squared_bandwidth**0.5
        self.num_features = num_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        angles = x @ self.frequencies.T
        return torch.cat([angles.cos(), angles.sin()], dim=1) / (self.num_features / 2) ** 0.5


class FourierEmbedding:
    """`models.mean_embedding.Embedding` in random Fourier features of the pixels."""

    def __init__(self, config: FourierConfig, image_size: int, channels: int, runtime: Runtime) -> None:
        self.image_size = image_size
        self.phi = RandomFourierFeatures(
            channels * image_size**2, config.d_rff, config.rff_sigma, runtime.rng("frequencies")
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, d_rff) of norm 1; the published bandwidth is for pixels in [0, 1]."""
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return self.phi((images.flatten(1) + 1) / 2)

    def noisy_mean(self, private: PrivateData) -> torch.Tensor:
        total = private.noisy_sum(MEAN_EMBEDDING, lambda x, _: self.features(x), l2_bound=1.0, by_class=True)
        return total / private.spec.num_train

    def mean(self, images: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
        features = self.features(images)
        total = torch.zeros(num_labels, features.shape[1], device=features.device)
        return total.index_add_(0, labels, features) / len(images)
