"""A classifier of public classes that needs no training: the nearest class mean in features of a published network."""

import torch
from torch import nn

from data.spec import DataSpec, PublicData
from models.linear.features import FeatureConfig, FeatureMap
from utils.progress import progress
from utils.runtime import Runtime

NETWORK = "efficientnet_lite0"
# Directions in which the public images vary, made equally large: class means are then a linear discriminant.
FEATURES = FeatureConfig(NETWORK, num_directions=256, whitening=1.0, constant=1.0)


class Prototypes(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, K): how near each image is to each public class. Everything is learnt from public
    images. Raises Unavailable if the package with the weights is not installed."""

    def __init__(self, public: PublicData, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__()
        self.features = FeatureMap(FEATURES, spec, runtime.weights_root, runtime.device)
        self.features.learn(public)
        sums = torch.zeros(public.num_classes, self.features.num_features, device=runtime.device)
        for start in progress(range(0, len(public), 256), "public classes", unit="batch"):
            part = slice(start, start + 256)
            labels = torch.from_numpy(public.samples.labels[part]).to(runtime.device)
            sums.index_add_(0, labels, self.features(torch.from_numpy(public.samples.images[part])))
        self.register_buffer("means", nn.functional.normalize(sums[:, :-1], dim=1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)[:, :-1] @ self.means.T
