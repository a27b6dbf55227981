"""DP-MERF: match a noisy mean embedding of random Fourier features (Harder et al., AISTATS 2021).

One release over all private images: sum of phi(x) (x) onehot(y), a vector of norm 1 per record. Dividing by the
public N, training the generator on it and sampling are post-processing.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from data.spec import DataSpec, PublicData, Samples
from models.features.random_fourier import RandomFourierFeatures
from models.nn.generator import Generator, GeneratorConfig
from models.synthesizer import Cost, Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime
from utils.sections import GenConfig, PublicDataConfig, check

MEAN_EMBEDDING = "mean embedding"


@dataclass(frozen=True)
class ModelConfig:
    Generator: GeneratorConfig
    d_rff: int  # number of random features, even
    rff_sigma: float  # squared bandwidth on pixels in [0, 1]

    def __post_init__(self) -> None:
        check(self.d_rff > 0 and self.d_rff % 2 == 0, "model.d_rff", self.d_rff, "a positive even number")
        check(self.rff_sigma > 0, "model.rff_sigma", self.rff_sigma, "greater than 0")


@dataclass(frozen=True)
class FitConfig:
    batch_size: int  # generated images per step
    epochs: int  # of (number of images) // batch_size steps
    lr: float
    lr_decay: float  # factor per epoch


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    cond: bool  # False: public labels are ignored


class DPMERF(Synthesizer):
    @dataclass(frozen=True)
    class Config:
        model: ModelConfig
        pretrain: PretrainConfig
        train: FitConfig
        gen: GenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        num_labels = max(spec.num_classes, config.public_data.n_classes or 0)
        with runtime.seeded("generator"):
            self.generator = Generator(config.model.Generator, spec.resolution, spec.channels, num_labels)
        self.generator.to(runtime.device)
        self.features = RandomFourierFeatures(
            int(np.prod(spec.image_shape)),
            config.model.d_rff,
            config.model.rff_sigma,
            runtime.rng("frequencies"),
        )
        self.noisy_embedding: torch.Tensor | None = None  # (num_classes, d_rff)

    def privacy_plan(self) -> list[Release]:
        return [Release(MEAN_EMBEDDING, None)]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        config = self.config.pretrain
        if public is None or not config.epochs:
            return
        num_labels = public.num_classes if config.cond else 1
        total = torch.zeros(num_labels, self.features.num_features, device=self.runtime.device)
        for start in progress(range(0, len(public), 1000), "public embedding", unit="batch"):
            part = public.samples.take(np.arange(start, min(start + 1000, len(public))))
            labels = torch.from_numpy(part.labels * config.cond).to(self.runtime.device)
            total.index_add_(0, labels, self._embed(to_float(part.images, self.runtime.device)))
        self._fit("pretrain", total / len(public), config, len(public))

    def train(self, private: PrivateData) -> None:
        if self.noisy_embedding is None:  # else a resumed run, whose one release is in the checkpoint
            total = private.noisy_sum(
                MEAN_EMBEDDING, lambda x, _: self._embed(x), l2_bound=1.0, by_class=True
            )
            self.noisy_embedding = total / self.spec.num_train
            self.runtime.snapshot("train")
        self._fit("train", self.noisy_embedding, self.config.train, self.spec.num_train)

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        self.generator.eval()
        size = self.config.gen.batch_size
        parts = []
        with torch.no_grad():
            for start in progress(range(0, num_samples, size), "generate", unit="batch"):
                batch = torch.from_numpy(labels[start : start + size]).to(self.runtime.device)
                parts.append(to_uint8(self.generator(self._noise(batch, f"generate {start}"), batch)))
        return Samples(np.concatenate(parts), labels)

    def _fit(self, stage: str, target: torch.Tensor, config: FitConfig, num_images: int) -> None:
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
            mean = torch.zeros_like(target).index_add_(0, labels, self._embed(images)) / config.batch_size
            optimizer.zero_grad(set_to_none=True)
            (target - mean).square().sum().backward()
            optimizer.step()

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, d_rff); the published bandwidth is for pixels in [0, 1]."""
        return self.features((images.flatten(1) + 1) / 2)

    def _noise(self, labels: torch.Tensor, stream: str) -> torch.Tensor:
        rng = self.runtime.rng(f"noise {stream}")
        return torch.randn(len(labels), self.generator.z_dim, generator=rng, device=labels.device)

    def state_dict(self) -> dict:
        return {"generator": self.generator.state_dict(), "noisy_embedding": self.noisy_embedding}

    def load_state_dict(self, state: dict) -> None:
        self.generator.load_state_dict(state["generator"])
        embedding = state["noisy_embedding"]
        self.noisy_embedding = None if embedding is None else embedding.to(self.runtime.device)

    def parameter_counts(self) -> dict[str, int]:
        return {"generator": sum(p.numel() for p in self.generator.parameters())}

    def costs(self) -> list[Cost]:
        config = self.config.train
        steps = config.epochs * max(1, self.spec.num_train // config.batch_size)
        labels = torch.zeros(10, dtype=torch.int64, device=self.runtime.device)
        noise = torch.zeros(10, self.generator.z_dim, device=self.runtime.device)
        self.generator(noise, labels)
        start = time.perf_counter()
        self.generator(noise, labels).sum().backward()
        seconds = (time.perf_counter() - start) / 10
        self.generator.zero_grad(set_to_none=True)
        return [
            Cost("train", f"{steps} steps x {config.batch_size} images", steps * config.batch_size * seconds)
        ]
