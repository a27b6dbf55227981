"""Generators fitted to a mean embedding of labelled images (DP-MERF, Harder et al., AISTATS 2021).

The embedding is the mean of phi(x) (x) onehot(y), phi being random Fourier features. The sum over all private records,
each a vector of norm 1, is one Gaussian release; dividing it by the public N and fitting a generator to it are
post-processing.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data.spec import PublicData
from models.features.random_fourier import RandomFourierFeatures
from models.nn.generator import Generator, GeneratorConfig
from opacus_ext.private_data import PrivateData
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field

MEAN_EMBEDDING = "mean embedding"


@dataclass(frozen=True)
class EmbeddingConfig:
    Generator: GeneratorConfig
    d_rff: int  # number of random features, even
    rff_sigma: float  # squared bandwidth on pixels in [0, 1]

    def __post_init__(self) -> None:
        check_field(self.d_rff > 0 and self.d_rff % 2 == 0, "d_rff", self.d_rff, "a positive even number")
        check_field(self.rff_sigma > 0, "rff_sigma", self.rff_sigma, "greater than 0")


@dataclass(frozen=True)
class FitConfig:
    batch_size: int  # generated images per step
    epochs: int  # of (number of images) // batch_size steps
    lr: float
    lr_decay: float  # factor per epoch

    def __post_init__(self) -> None:
        check_field(self.batch_size > 0, "batch_size", self.batch_size, "at least 1")
        check_field(self.epochs >= 0, "epochs", self.epochs, "0 or more")


class EmbeddingGenerator:
    """A generator of images (C, image_size, image_size), and the mean embeddings that it is fitted to."""

    def __init__(
        self, config: EmbeddingConfig, image_size: int, channels: int, num_labels: int, runtime: Runtime
    ) -> None:
        self.runtime = runtime
        self.image_size = image_size
        with runtime.seeded("generator"):
            self.generator = Generator(config.Generator, image_size, channels, num_labels)
        self.generator.to(runtime.device)
        self.features = RandomFourierFeatures(
            channels * image_size**2, config.d_rff, config.rff_sigma, runtime.rng("frequencies")
        )

    def noisy_mean(self, private: PrivateData) -> torch.Tensor:
        """(num_classes, d_rff): the one planned release MEAN_EMBEDDING, over the public N."""
        total = private.noisy_sum(MEAN_EMBEDDING, lambda x, _: self.embed(x), l2_bound=1.0, by_class=True)
        return total / private.spec.num_train

    def public_mean(self, public: PublicData, cond: bool) -> torch.Tensor:
        """(public classes, d_rff), or with cond=False (1, d_rff): all public images count as label 0."""
        num_labels = public.num_classes if cond else 1
        total = torch.zeros(num_labels, self.features.num_features, device=self.runtime.device)
        for start in progress(range(0, len(public), 1000), "public embedding", unit="batch"):
            part = public.samples.take(np.arange(start, min(start + 1000, len(public))))
            labels = torch.from_numpy(part.labels * cond).to(self.runtime.device)
            total.index_add_(0, labels, self.embed(to_float(part.images, self.runtime.device)))
        return total / len(public)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, d_rff) of norm 1; the published bandwidth is for pixels in [0, 1]."""
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return self.features((images.flatten(1) + 1) / 2)

    def fit(self, stage: str, target: torch.Tensor, config: FitConfig, num_images: int) -> None:
        """Minimise |target - mean embedding of generated images|^2, labels uniform; target (K, d_rff)."""
        self.generator.train()
        steps_per_epoch = max(1, num_images // config.batch_size)
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.lr)
        for step in progress(range(config.epochs * steps_per_epoch), stage):
            rng = self.runtime.rng(f"{stage} labels {step}")
            for group in optimizer.param_groups:
                group["lr"] = config.lr * config.lr_decay ** (step // steps_per_epoch)
            labels = torch.randint(
                len(target), (config.batch_size,), generator=rng, device=self.runtime.device
            )
            images = self.generator(self._noise(labels, f"{stage} {step}"), labels)
            mean = torch.zeros_like(target).index_add_(0, labels, self.embed(images)) / config.batch_size
            optimizer.zero_grad(set_to_none=True)
            (target - mean).square().sum().backward()
            optimizer.step()

    def draw(self, labels: np.ndarray, batch_size: int, stream: str) -> np.ndarray:
        """One image per label: (N, C, image_size, image_size) uint8."""
        self.generator.eval()
        parts = []
        with torch.no_grad():
            for start in progress(range(0, len(labels), batch_size), stream, unit="batch"):
                batch = torch.from_numpy(labels[start : start + batch_size]).to(self.runtime.device)
                parts.append(to_uint8(self.generator(self._noise(batch, f"{stream} {start}"), batch)))
        return np.concatenate(parts)

    def _noise(self, labels: torch.Tensor, stream: str) -> torch.Tensor:
        rng = self.runtime.rng(f"noise {stream}")
        return torch.randn(len(labels), self.generator.z_dim, generator=rng, device=labels.device)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.generator.parameters())
