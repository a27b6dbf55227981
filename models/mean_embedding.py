"""Generators fitted to a mean embedding of labelled images (DP-MERF, Harder et al., AISTATS 2021).

The embedding of a set is the mean of phi(x) (x) onehot(y). The sum over all private records, each of bounded norm, is
one Gaussian release; dividing it by the public N and fitting a generator to it are post-processing.
Legend: B batch, C channels, H W pixels, D size of one phi(x), K labels.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from data.spec import PublicData
from models.nn.generator import Generator, GeneratorConfig
from opacus_ext.private_data import PrivateData
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import check_field

MEAN_EMBEDDING = "mean embedding"


class Embedding(Protocol):
    """A feature map phi of images, and how means of phi(x) (x) onehot(y) are taken with it: phi(x) may be too large to
    be written out for a batch."""

    def noisy_mean(self, private: PrivateData) -> torch.Tensor:
        """(num_classes, D): the one planned release MEAN_EMBEDDING over all records, divided by the public N."""

    def mean(self, images: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1], (B,) -> (num_labels, D): row k is the sum of phi(x) over label k, divided by B.
        Differentiable in the images."""


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
    """A generator of images (C, image_size, image_size) that is fitted to mean embeddings."""

    def __init__(
        self,
        config: GeneratorConfig,
        embedding: Embedding,
        image_size: int,
        channels: int,
        num_labels: int,
        runtime: Runtime,
    ) -> None:
        self.runtime = runtime
        self.embedding = embedding
        with runtime.seeded("generator"):
            self.generator = Generator(config, image_size, channels, num_labels)
        self.generator.to(runtime.device)

    def public_mean(self, public: PublicData, cond: bool) -> torch.Tensor:
        """(public classes, D), or with cond=False (1, D): all public images count as label 0."""
        num_labels = public.num_classes if cond else 1
        total = 0.0
        for start in progress(range(0, len(public), 1000), "public embedding", unit="batch"):
            part = public.samples.take(np.arange(start, min(start + 1000, len(public))))
            labels = torch.from_numpy(part.labels * cond).to(self.runtime.device)
            images = to_float(part.images, self.runtime.device)
            total = total + self.embedding.mean(images, labels, num_labels) * len(labels)
        return total / len(public)

    def fit(self, stage: str, target: torch.Tensor, config: FitConfig, num_images: int) -> None:
        """Minimise |target - mean embedding of generated images|^2, labels uniform; target (K, D)."""
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
            mean = self.embedding.mean(images, labels, len(target))
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
