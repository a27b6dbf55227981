"""DP-MERF: match a noisy mean embedding of random Fourier features (Harder et al., AISTATS 2021)."""

import time
from dataclasses import dataclass

import torch

from data.spec import DataSpec, PublicData, Samples
from models.central_images import CENTRAL_IMAGES, MEAN, MODE, CentralImages
from models.features.random_fourier import FourierConfig, FourierEmbedding
from models.mean_embedding import MEAN_EMBEDDING, EmbeddingGenerator, FitConfig
from models.nn.generator import GeneratorConfig
from models.synthesizer import Cost, Synthesizer, balanced_labels
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.runtime import Runtime
from utils.sections import GenConfig, PublicDataConfig


@dataclass(frozen=True)
class ModelConfig(FourierConfig):
    Generator: GeneratorConfig


@dataclass(frozen=True)
class PretrainConfig(FitConfig):
    cond: bool  # False: public labels are ignored


class DPMERF(Synthesizer):
    """One release over all private images trains a generator; public or noisy central images may train it before."""

    @dataclass(frozen=True)
    class Config:
        model: ModelConfig
        pretrain: PretrainConfig
        train: FitConfig
        gen: GenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        public = config.public_data
        self.embedding = FourierEmbedding(config.model, spec.resolution, spec.channels, runtime)
        self.merf = EmbeddingGenerator(
            config.model.Generator,
            self.embedding,
            spec.resolution,
            spec.channels,
            max(spec.num_classes, public.n_classes or 0),
            runtime,
        )
        warms_up = public.name in (MEAN, MODE) and config.pretrain.epochs
        self.central = CentralImages(public.name, public.central, spec, runtime) if warms_up else None
        self.noisy_embedding: torch.Tensor | None = None  # (num_classes, d_rff)

    def privacy_plan(self) -> list[Release]:
        return [*self.pretraining_plan(), Release(MEAN_EMBEDDING, None)]

    def pretraining_plan(self) -> list[Release]:
        return [] if self.central is None else [self.central.release()]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        config = self.config.pretrain
        if self.central is not None:
            public = PublicData(CENTRAL_IMAGES, self.central.ask(private), self.spec.class_names)
            self.runtime.snapshot("pretrain")
        if public is not None and config.epochs:
            self.merf.fit("pretrain", self.merf.public_mean(public, config.cond), config, len(public))

    def train(self, private: PrivateData) -> None:
        if self.noisy_embedding is None:  # else a resumed run, whose one release is in the checkpoint
            self.noisy_embedding = self.embedding.noisy_mean(private)
            self.runtime.snapshot("train")
        self.merf.fit("train", self.noisy_embedding, self.config.train, self.spec.num_train)

    def generate(self, num_samples: int) -> Samples:
        labels = balanced_labels(num_samples, self.spec.num_classes)
        return Samples(self.merf.draw(labels, self.config.gen.batch_size, "generate"), labels)

    def state_dict(self) -> dict:
        return {
            "generator": self.merf.generator.state_dict(),
            "noisy_embedding": self.noisy_embedding,
            "central": {} if self.central is None else self.central.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.merf.generator.load_state_dict(state["generator"])
        embedding = state["noisy_embedding"]
        self.noisy_embedding = None if embedding is None else embedding.to(self.runtime.device)
        if self.central is not None:
            self.central.load_state_dict(state["central"])

    def parameter_counts(self) -> dict[str, int]:
        return {"generator": self.merf.num_parameters()}

    def costs(self) -> list[Cost]:
        config, generator = self.config.train, self.merf.generator
        steps = config.epochs * max(1, self.spec.num_train // config.batch_size)
        labels = torch.zeros(10, dtype=torch.int64, device=self.runtime.device)
        noise = torch.zeros(10, generator.z_dim, device=self.runtime.device)
        generator(noise, labels)
        start = time.perf_counter()
        generator(noise, labels).sum().backward()
        seconds = (time.perf_counter() - start) / 10
        generator.zero_grad(set_to_none=True)
        return [
            Cost("train", f"{steps} steps x {config.batch_size} images", steps * config.batch_size * seconds)
        ]
