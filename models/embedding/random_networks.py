"""Features of fixed random convolutional networks, and mean embeddings of images in them.

Random networks keep what tells classes apart without any training (Zhao & Bilen 2023, distribution matching,
arXiv:2110.04181). Legend: B batch, C channels, H W pixels, M features of one network, D size of one phi(x).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data.spec import DataSpec
from models.embedding.mean_embedding import Embedding
from models.embedding.random_fourier import FeatureConfig, RandomFourierFeatures
from utils.runtime import Runtime
from utils.sections import check_choice, check_field

NETWORKS, PIXELS = "networks", "pixels"
LAST_SIDE = 3  # pixels that the convolutions leave, at least
MOST_CHANNELS = 4  # of a convolution, times those of the first one
NUM_CENTRE_IMAGES = 256
COARSE = 7  # side of the random images before they are enlarged


@dataclass(frozen=True)
class RandomNetworkConfig(FeatureConfig):
    features: str  # networks or pixels
    num_networks: int
    width: int  # channels of the first convolution
    squared_bandwidth: (
        float | None
    )  # of a Gaussian kernel on these features, which have norm 1; None: no kernel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("features", self.features, (NETWORKS, PIXELS))
        for field in ("num_networks", "width"):
            check_field(getattr(self, field) > 0, field, getattr(self, field), "at least 1")
        bandwidth = self.squared_bandwidth
        fits = bandwidth is None or bandwidth > 0
        check_field(fits, "squared_bandwidth", bandwidth, "null or greater than 0")


class RandomNetwork(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, M): 3x3 convolutions, each normalised per image and channel, rectified and
    halved in resolution. Weights are drawn from the global generator and never change."""

    def __init__(self, spec: DataSpec, width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        channels, side, out = spec.channels, spec.resolution, width
        while not self.convolutions or side // 2 >= LAST_SIDE:
            convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            self.convolutions.append(convolution)
            channels, side, out = out, side // 2, min(2 * out, MOST_CHANNELS * width)
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            x = convolution(x)
            variance, mean = torch.var_mean(x, (2, 3), keepdim=True, unbiased=False)
            # A positive factor commutes with both: dividing after pooling touches a quarter of the numbers.
            x = F.avg_pool2d(F.relu(x - mean), 2) * (variance + 1e-5).rsqrt()
        return x.flatten(1)


class RandomNetworkEmbedding(Embedding):
    """Joined features of the networks, each of norm 1 after a public centre is subtracted; with a bandwidth, random
    Fourier features of a Gaussian kernel on them, which also match what the means of the features leave open."""

    def __init__(self, config: RandomNetworkConfig, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config.class_mass)
        self.config, self.networks = config, nn.ModuleList()
        if config.features == NETWORKS:
            with runtime.seeded("random networks"):
                self.networks = nn.ModuleList(
                    RandomNetwork(spec, config.width) for _ in range(config.num_networks)
                )
                coarse = torch.randn(NUM_CENTRE_IMAGES, spec.channels, COARSE, COARSE)
        self.networks.to(runtime.device)
        self.centres = []
        if config.features == NETWORKS:
            size = (spec.resolution, spec.resolution)
            smooth = F.interpolate(coarse, size=size, mode="bicubic").tanh().to(runtime.device)
            self.centres = [network(smooth).mean(0) for network in self.networks]
        self.kernel = None
        if config.squared_bandwidth is not None:
            dim = self._unit(torch.zeros(1, *spec.image_shape, device=runtime.device)).shape[1]
            rng = runtime.rng("frequencies")
            self.kernel = RandomFourierFeatures(dim, config.d_rff, [config.squared_bandwidth], rng)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, D)."""
        rows = self._unit(images)
        rows = rows if self.kernel is None else self.kernel(rows)
        return F.pad(rows, (0, 1), value=self.mass)

    @property
    def num_parts(self) -> int:
        """Parts of phi(x) that can be computed alone: one per network if there is no kernel over all of them."""
        return len(self.networks) if self.kernel is None and self.networks else 1

    def part(self, images: torch.Tensor, index: int) -> tuple[torch.Tensor, slice]:
        """(B, d): part `index` of the features (B, D) of these images, and its columns; without the constant one."""
        if self.num_parts == 1:
            rows = self.features(images)[:, :-1]
            return rows, slice(0, rows.shape[1])
        rows = self._of_network(images, index)
        return rows, slice(index * rows.shape[1], (index + 1) * rows.shape[1])

    def _unit(self, images: torch.Tensor) -> torch.Tensor:
        """(B, networks * M) of norm 1, or with pixels (B, C * H * W) of norm 1 at most."""
        if self.config.features == PIXELS:
            return (images.flatten(1) + 1) / (2 * images[0].numel() ** 0.5)
        return torch.cat([self._of_network(images, index) for index in range(len(self.networks))], 1)

    def _of_network(self, images: torch.Tensor, index: int) -> torch.Tensor:
        """(B, M): the features of one network, of norm 1 / sqrt(networks)."""
        rows = F.normalize(self.networks[index](images) - self.centres[index], dim=1)
        return rows / len(self.networks) ** 0.5
