"""Central images: noisy means or modes of random subsets of every class (DP-FETA, Gong et al. 2025).

They are noisy results of private queries, and train a model like public images. The published mean divides by the
number of sampled records of the class, which is private, while its noise is scaled for another, public number. Here
each class is a noisy *sum*, divided by the public expected count. A record has one label, so the classes of one query
together are one Gaussian release with the sensitivity of one record.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.spec import DataSpec, Samples
from models.public.config import CentralConfig
from opacus_ext.accounting import Release
from opacus_ext.private_data import PrivateData
from utils.draws import Draws
from utils.errors import UserError
from utils.progress import progress
from utils.runtime import Runtime

CENTRAL_IMAGES = "central images"
MEAN, MODE = "central_mean", "central_mode"  # values of public_data.name
LARGEST_SIDE = 16  # pixels of a query if public_data.central.downscale is null


class CentralImages:
    """Plan, query and augment central images. `result` holds the released images; a checkpoint must keep it."""

    def __init__(self, kind: str, config: CentralConfig, spec: DataSpec, runtime: Runtime) -> None:
        assert kind in (MEAN, MODE), kind
        self.kind, self.config, self.spec, self.runtime = kind, config, spec, runtime
        self.stride = config.downscale or _default_stride(spec.resolution)
        self.bins = config.bins or (2 if spec.channels == 1 else 16)
        self.side = -(-spec.resolution // self.stride)
        self.result: Samples | None = None
        if config.num_ops:
            _rand_augment(config.num_ops, 1)  # fails now, not after the budget is spent

    def release(self) -> Release:
        rate = min(1.0, self.config.batch_size / self.spec.num_train)
        return Release(CENTRAL_IMAGES, self.config.sigma, rate, self.config.sample_num)

    def query(self, private: PrivateData | None) -> Samples:
        """sample_num images per class, uint8 of the private images' shape. The query runs once: a resumed run has the
        result from its checkpoint, or lost it before anyone saw it."""
        if private is None:
            raise UserError("central images are a query of the private data, but sensitive_data.name is null")
        if self.result is None:
            rounds = progress(range(self.config.sample_num), CENTRAL_IMAGES, unit="query")
            coarse = torch.cat([self._query_once(private) for _ in rounds])
            labels = np.tile(np.arange(self.spec.num_classes, dtype=np.int64), self.config.sample_num)
            self.result = Samples(self._postprocess(coarse), labels)
        return self.result

    def _query_once(self, private: PrivateData) -> torch.Tensor:
        """(num_classes, C, side, side), nominally in [0, 1]: one noisy image per class, of one Poisson sample."""
        fn, bound = (
            (self._pixels, self._pixel_bound) if self.kind == MEAN else (self._votes, self._vote_bound)
        )
        total = private.sampled_noisy_sum(CENTRAL_IMAGES, fn, bound, by_class=True)
        shape = (self.spec.num_classes, self.spec.channels, self.side, self.side)
        if self.kind == MODE:
            return total.view(*shape, self.bins).argmax(-1) / (self.bins - 1)
        expected = self.spec.num_train * self.release().sample_rate / self.spec.num_classes
        return (total / expected).view(shape)

    def _pixels(self, images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Every n-th pixel of (B, C, H, W) in [-1, 1], as (B, D) in [0, 1]."""
        return (images[..., :: self.stride, :: self.stride].flatten(1) + 1) / 2

    def _votes(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, D * bins): every pixel casts one vote for its nearest grey level."""
        levels = (self._pixels(images, labels) * (self.bins - 1)).round().long()
        return F.one_hot(levels, self.bins).flatten(1)

    @property
    def _vote_bound(self) -> float:
        """sqrt(D): the norm of D votes, and of D white pixels."""
        return (self.spec.channels * self.side**2) ** 0.5

    @property
    def _pixel_bound(self) -> float:
        return self.config.max_norm or self._vote_bound

    def _postprocess(self, coarse: torch.Tensor) -> np.ndarray:
        """(n, C, side, side) noisy -> (n, C, H, W) uint8: clamp, enlarge, quantise, smooth. Post-processing."""
        size = self.spec.resolution
        images = F.interpolate(coarse.clamp(0, 1).cpu(), size=(size, size), mode="bilinear")
        images = (images * 255).round()
        if self.config.smooth:
            images = _median_filtered(images)
            images = _sharpened(images) if self.spec.channels == 1 else images
        return images.byte().numpy()

    def augment(self, images: np.ndarray, rng: Draws) -> np.ndarray:
        """RandAugment of a magnitude that is drawn for every image at every access; (B, C, H, W) uint8."""
        if not self.config.num_ops:
            return images
        magnitudes = (1 + rng.uniform() * self.config.max_magnitude).int().tolist()
        seeds = rng.uniform().tolist()
        rows = zip(torch.from_numpy(images), magnitudes, seeds, strict=True)
        return torch.stack([self._augmented(*row) for row in rows]).numpy()

    def _augmented(self, image: torch.Tensor, magnitude: int, seed: float) -> torch.Tensor:
        with self.runtime.seeded(f"augment {seed}"):  # the library draws from the global generator
            return _rand_augment(self.config.num_ops, magnitude)(image)

    def state_dict(self) -> dict:
        if self.result is None:
            return {}
        return {key: torch.from_numpy(getattr(self.result, key)) for key in ("images", "labels")}

    def load_state_dict(self, state: dict) -> None:
        self.result = Samples(state["images"].numpy(), state["labels"].numpy()) if state else None


def _default_stride(resolution: int) -> int:
    stride = 2
    while resolution > LARGEST_SIDE * stride:
        stride *= 2
    return stride


def _rand_augment(num_ops: int, magnitude: int) -> nn.Module:
    """Cubuk et al. 2020. UserError if torchvision does not load with the installed torch."""
    try:
        from torchvision.transforms import RandAugment
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"public_data.central.num_ops: {num_ops} needs torchvision, which does not load "
            f"({str(error).splitlines()[0]}); pip install --force-reinstall torch torchvision, or give 0"
        ) from error
    return RandAugment(num_ops, magnitude)


def _median_filtered(images: torch.Tensor) -> torch.Tensor:
    """Median of the 3x3 pixels around each, per channel; the border is repeated."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (n, C, H, W, 3, 3)
    return windows.flatten(4).median(-1).values


def _sharpened(images: torch.Tensor) -> torch.Tensor:
    """Grey images (n, 1, H, W) in [0, 255]: five times the pixel less its four neighbours; the border is mirrored."""
    kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 5.0, -1.0], [0.0, -1.0, 0.0]])
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel[None, None]).clamp(0, 255)
