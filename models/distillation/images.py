"""A few images per class that are changed until their mean embedding equals a noisy one (distribution matching, Zhao &
Bilen 2023, arXiv:2110.04181). Everything here reads a released embedding, so the steps cost no privacy.

Legend: K classes, M images per class, C channels, H W pixels, D size of one phi(x).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.spec import DataSpec, Samples
from models.distillation.augmentation import AugmentConfig, augmented
from models.embedding.random_networks import RandomNetworkEmbedding
from models.fitting.batches import in_batches
from models.fitting.stages import Staged
from models.synthesizer import balanced_labels, preview_labels
from utils.images import to_float, to_uint8
from utils.progress import progress
from utils.runtime import Runtime, log
from utils.sections import check_choice, check_field
from utils.timing import Cost, batch_rows, seconds_of

NOISE, PUBLIC = "noise", "public"
COARSE = 7  # side of the random images before they are enlarged
SPREAD = 0.5  # standard deviation of their pixels
FINAL_LR = 0.01  # of the first one
REVIVALS = (0.2, 0.4, 0.6)  # of the steps
GOOD = 0.75  # quantile of the scores of a class that a good image has


@dataclass(frozen=True)
class DistillConfig:
    images_per_class: int
    start: str  # noise, or public: the public images whose mean embedding is nearest to that of the class
    num_steps: int
    batch_size: int  # images of a step: as many whole classes as fit, at least one
    lr: float  # of Adam, with a cosine decay
    augment: float  # strength of the augmentation in each step, against that of the samples
    revive: float  # images that are less like their class than this share of a good one are replaced; 0: none
    snapshot_freq: int  # steps between snapshots

    def __post_init__(self) -> None:
        check_choice("start", self.start, (NOISE, PUBLIC))
        for field in ("images_per_class", "batch_size", "snapshot_freq"):
            check_field(getattr(self, field) > 0, field, getattr(self, field), "at least 1")
        check_field(self.num_steps >= 0, "num_steps", self.num_steps, "0 or more")
        check_field(self.lr > 0, "lr", self.lr, "greater than 0")
        for field in ("augment", "revive"):
            check_field(0 <= getattr(self, field) <= 1, field, getattr(self, field), "from 0 to 1")


class ImageSet(nn.Module):
    """K parameters (M, C, H, W) in [-1, 1], one per class."""

    def __init__(self, spec: DataSpec, images_per_class: int) -> None:
        super().__init__()
        shape = (images_per_class, *spec.image_shape)
        self.classes = nn.ParameterList(torch.zeros(shape) for _ in range(spec.num_classes))

    def images(self) -> torch.Tensor:
        """(K * M, C, H, W) without a gradient, class after class."""
        return torch.cat([images.detach() for images in self.classes])


class DistilledImages(Staged):
    """The images, and how they are fitted to a target."""

    keeps_average = False

    def __init__(
        self,
        config: DistillConfig,
        augment: AugmentConfig,
        embedding: RandomNetworkEmbedding,
        spec: DataSpec,
        runtime: Runtime,
    ) -> None:
        self.config, self.augment, self.embedding = config, augment, embedding
        self.spec, self.runtime = spec, runtime
        self.set = ImageSet(spec, config.images_per_class).to(runtime.device)
        self._start_stage("start")

    @torch.no_grad()
    def start(self, target: torch.Tensor, public: torch.Tensor | None) -> None:
        """Set the first images unless a restored run has them: noise, or the nearest of `public` (P, C, H, W) uint8."""
        if self.stage != "start":
            return
        self._enter_stage("train")
        if self.config.start == PUBLIC:
            nearest = self._nearest(public, self._means(target))
            for images, chosen in zip(self.set.classes, nearest, strict=True):
                images.copy_(to_float(public[chosen].numpy(), self.runtime.device))
            return
        rng, size = self.runtime.rng("start"), self.spec.resolution
        for images in self.set.classes:
            shape = (len(images), self.spec.channels, COARSE, COARSE)
            coarse = SPREAD * torch.randn(shape, generator=rng, device=rng.device)
            images.copy_(F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1))

    def fit(self, target: torch.Tensor) -> None:
        """Bring the mean embedding of the images of class k to target[k] / share of k; continues from a restored state.

        target (K, D): a noisy mean embedding, whose rows carry the shares of the classes.
        """
        means, shares = self._means(target), self.embedding.class_shares(target)
        start, total = self.step, self.config.num_steps
        revivals = {int(share * total) for share in REVIVALS}
        for step in progress(range(start, total), "distill", total, initial=start):
            if self.config.revive and step in revivals:
                self._revive(means)
            self._take_step(means, shares)
            is_last = step + 1 == total  # its checkpoint is written at the end of the stage
            self._finish_step(None if is_last else self.config.snapshot_freq)

    def _means(self, target: torch.Tensor) -> torch.Tensor:
        """(K, D): the mean of phi over each class."""
        return target / self.embedding.class_shares(target)[:, None]

    def _nearest(self, public: torch.Tensor, means: torch.Tensor) -> list[list[int]]:
        """Per class the positions of M public images, chosen one after another so that the mean of their embeddings
        comes nearest to the class's (kernel herding, Chen et al. 2010)."""
        parts = [
            self.embedding.features(to_float(public[start : start + 250].numpy(), self.runtime.device))
            for start in progress(range(0, len(public), 250), "public embedding", unit="batch")
        ]
        rows = torch.cat(parts)[:, :-1]  # without the constant feature, which is the same for all
        chosen = []
        for mean in progress(means[:, :-1], "choose public images", unit="class"):
            scores, total, picked = rows @ mean, torch.zeros_like(mean), []
            for count in range(1, self.config.images_per_class + 1):
                # The squared distance of the mean of `count` images from the target, up to terms equal for all.
                gains = count * scores - rows @ total
                gains[picked] = -math.inf
                picked.append(int(gains.argmax()))
                total += rows[picked[-1]]
            chosen.append(picked)
        return chosen

    @torch.no_grad()
    def _revive(self, means: torch.Tensor) -> None:
        """Replace images on which the kernel vanishes, and with it the gradient, by augmented good ones of their class.

        Early steps push some images away from all others, where they no longer count (birth and death of particles,
        Rotskoff et al. 2019). An image's score is the inner product of its features with the target of its class.
        """
        rng, replaced = self.runtime.rng(f"revive {self.step}"), 0
        for images, mean in zip(self.set.classes, means, strict=True):
            scores = self.embedding.features(images)[:, :-1] @ mean[:-1]
            is_good = scores >= self.config.revive * scores.quantile(GOOD)
            good, bad = is_good.nonzero().flatten(), (~is_good).nonzero().flatten()
            if len(good) == 0 or len(bad) == 0:
                continue
            sources = good[torch.randint(len(good), (len(bad),), generator=rng, device=rng.device)]
            images[bad] = augmented(images[sources], self.augment, 1.0, rng)
            moments = self.optimizer.state[images]
            if moments:  # the class has been in a step
                moments["exp_avg"][bad] = 0
                moments["exp_avg_sq"][bad] = moments["exp_avg_sq"][sources]
            replaced += len(bad)
        log.info(f"distill: step {self.step}: {replaced:,} images that were unlike their class start again")

    def _take_step(self, means: torch.Tensor, shares: torch.Tensor) -> None:
        """One step down the sum of share_k |mean_k - mean of phi over the images of class k|^2 over some classes k, in
        one part of the features."""
        config, num_classes, num_parts = self.config, len(self.set.classes), self.embedding.num_parts
        rng = self.runtime.rng(f"distill {self.step}")
        decay = FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * self.step / config.num_steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * decay
        self.optimizer.zero_grad(set_to_none=True)  # Adam leaves classes without a gradient as they are
        fitting = max(1, config.batch_size // config.images_per_class)
        # Each class by itself, so that only its graph is in memory.
        for label in torch.randperm(num_classes, generator=rng, device=rng.device)[:fitting].tolist():
            images = self.set.classes[label]
            if config.augment:
                images = augmented(images, self.augment, config.augment, rng)
            rows, columns = self.embedding.part(images, self.step % num_parts)
            distance = (rows.mean(0) - means[label, columns]).square().sum()
            (num_parts * num_classes * shares[label] * distance).backward()
        self.optimizer.step()
        with torch.no_grad():
            for images in self.set.classes:
                images.clamp_(-1, 1)

    def draw(self, num_samples: int, batch_size: int) -> Samples:
        """Each image once as it is, then again and again, augmented; labels balanced."""
        num_classes, per_class = self.spec.num_classes, self.config.images_per_class
        labels = balanced_labels(num_samples, num_classes)
        turns = np.arange(num_samples) // num_classes
        positions = labels * per_class + turns % per_class
        images = self.set.images()

        def draw(rows: slice) -> np.ndarray:
            batch = images[torch.from_numpy(positions[rows]).to(images.device)]
            repeated = torch.from_numpy(turns[rows] >= per_class).to(images.device)
            moved = augmented(batch, self.augment, 1.0, self.runtime.rng(f"augment {rows.start}"))
            return to_uint8(torch.where(repeated[:, None, None, None], moved, batch))

        return Samples(in_batches(num_samples, batch_size, draw, self.spec.image_shape, None), labels)

    def cost(self) -> Cost:
        """Of the embedding of all private images, and of the steps."""
        config, rows = self.config, batch_rows(self.spec.resolution)
        blank = torch.zeros(rows, *self.spec.image_shape, device=self.runtime.device, requires_grad=True)
        with torch.no_grad():
            forward = seconds_of(lambda: self.embedding.features(blank)) / rows
        both = seconds_of(lambda: self.embedding.part(blank, 0)[0].sum().backward()) / rows
        classes = min(self.spec.num_classes, max(1, config.batch_size // config.images_per_class))
        size = classes * config.images_per_class
        text = f"embedding of {self.spec.num_train} images, {config.num_steps} steps x {size} images"
        seconds = self.spec.num_train * forward + config.num_steps * size * both
        return Cost("train", text, seconds, config.num_steps)

    # Stages

    def _networks(self) -> dict[str, nn.Module]:
        return {"images": self.set}

    def _make_optimizers(self, stage: str) -> dict[str, torch.optim.Optimizer]:
        return {"optimizer": torch.optim.Adam(self.set.parameters())}

    def _preview(self) -> Samples:
        count = len(preview_labels(self.spec.num_classes))
        return self.draw(count, count)
