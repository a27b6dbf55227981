"""DP-Distill: one noisy mean embedding per class, and a few images per class that are changed until theirs equals it.

Private dataset distillation by distribution matching, after Dosser (Zheng et al., ICCV 2025, arXiv:2508.01749). Where
this differs from the published program:
- Its account covers the sampling steps only, while it adds noise to clean class sums in every optimisation step anew.
  Here the sums are released once, for networks that are fixed beforehand; all steps read this one result.
- It draws records of each class separately and divides by their number. Here a constant feature releases the class
  shares in the same query (models/embedding/mean_embedding.py).
- A Gaussian kernel on the features (model.squared_bandwidth) makes the target depend on the whole distribution.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.spec import DataSpec, PublicData, Samples
from models.distillation.augmentation import AugmentConfig
from models.distillation.images import PUBLIC, DistillConfig, DistilledImages
from models.embedding.mean_embedding import MEAN_EMBEDDING
from models.embedding.random_networks import PIXELS, RandomNetworkConfig, RandomNetworkEmbedding
from models.public.config import PublicDataConfig
from models.synthesizer import Synthesizer
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.errors import UserError
from utils.runtime import Runtime, log
from utils.sections import GenConfig
from utils.timing import Cost


class DPDistill(Synthesizer):
    learns_class_shares = True

    @dataclass(frozen=True)
    class Config:
        model: RandomNetworkConfig
        train: DistillConfig
        augment: AugmentConfig
        gen: GenConfig
        public_data: PublicDataConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        self.embedding = RandomNetworkEmbedding(config.model, spec, runtime)
        self.distilled = DistilledImages(config.train, config.augment, self.embedding, spec, runtime)
        self.noisy_embedding: torch.Tensor | None = None  # (num_classes, D)
        self._public: torch.Tensor | None = (
            None  # (P, C, H, W) uint8, until the images start from some of them
        )

    def privacy_plan(self) -> list[Release]:
        return [Release(MEAN_EMBEDDING, None)]

    def pretrain(self, public: PublicData | None, private: PrivateData | None) -> None:
        """Keep the public images to start from."""
        if not self.uses_public_images:
            return
        least = self.config.train.images_per_class
        if public is None or len(public) < least:
            raise UserError(
                f"train.start: public needs a public set of at least {least} images (train.images_per_class), and this "
                f"run has {0 if public is None else len(public)}; give public_data.name, or train.start=noise"
            )
        self._public = torch.from_numpy(np.array(public.samples.images))

    def train(self, private: PrivateData) -> None:
        if self.noisy_embedding is None:  # otherwise a resumed run has its only release from the checkpoint
            self.noisy_embedding = self.embedding.noisy_mean(private)
            self.runtime.snapshot("train")
        self.distilled.start(self.noisy_embedding, self._public)
        self._public = None
        self.distilled.fit(self.noisy_embedding)

    def generate(self, num_samples: int) -> Samples:
        distinct = self.spec.num_classes * self.config.train.images_per_class
        if num_samples > distinct:
            log.info(
                f"generate: {distinct:,} distinct images; the other {num_samples - distinct:,} repeat them, augmented"
            )
        return self.distilled.draw(num_samples, self.config.gen.batch_size)

    def state_dict(self) -> dict:
        return {
            "fit": self.distilled.state_dict(), "noisy_embedding": self.noisy_embedding, "public": self._public
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.distilled.load_state_dict(state["fit"])
        embedding = state["noisy_embedding"]
        self.noisy_embedding = None if embedding is None else embedding.to(self.runtime.device)
        self._public = state["public"]

    def parameter_counts(self) -> dict[str, int]:
        return {"pixels": sum(images.numel() for images in self.distilled.set.classes)}

    def settings_without_effect(self) -> dict[str, str]:
        unused, model = {}, self.config.model
        if model.features == PIXELS:
            why = "model.features is pixels"
            unused |= {"model.num_networks": why, "model.width": why}
        if model.squared_bandwidth is None:
            unused["model.d_rff"] = "model.squared_bandwidth is null: there is no kernel"
        return unused

    @property
    def uses_public_images(self) -> bool:
        return self.config.train.start == PUBLIC

    def costs(self) -> list[Cost]:
        return [self.distilled.cost()]

    def remaining_share(self, cost: Cost) -> float:
        return self.distilled.remaining_share(cost)
