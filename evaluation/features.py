"""Feature extractors: what images look like to a frozen network, for the metrics that compare sets of images."""

import hashlib
import os
import shlex
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from data.prepared import sha256_of
from data.spec import DataSpec
from evaluation.errors import MissingWeights, Unavailable
from utils.images import to_float
from utils.progress import progress
from utils.seeding import numpy_rng

if TYPE_CHECKING:
    import torch

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class Features(NamedTuple):
    """Features (N, D) float32; class logits (N, 1008) float32, or None where the extractor has no classes."""

    features: np.ndarray
    logits: np.ndarray | None


class Extractor(Protocol):
    """A frozen network. `identity` says which weights: it is part of the key of cached features."""

    name: str
    identity: str
    info: dict[str, str]
    device: str

    @classmethod
    def check(cls, weights_root: Path) -> Path | None:
        """Where its weights are; raises Unavailable with what to install or fetch."""
        ...

    def __call__(self, images: "torch.Tensor") -> tuple:
        """uint8 (B, C, H, W) on `device` -> features (B, D), logits (B, 1008) or None."""
        ...


class InceptionExtractor:
    """InceptionV3 with the TensorFlow weights of 2015, by torch-fidelity: 2048 features of the last pooling.

    Grey images are replicated to three channels. The logits have no bias, as in the original Inception score.
    """

    name = "inception"

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        network, path = _inception_network(), self.check(weights_root)
        self.identity = sha256_of(path)
        self.info = {"weights_sha256": self.identity, "torch-fidelity": version("torch-fidelity")}
        self.device = device
        # A path keeps torch-fidelity from downloading.
        self._network = network(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(device)

    @classmethod
    def check(cls, weights_root: Path) -> Path:
        """The weights file; raises Unavailable with the fix where it, or a package, is missing."""
        _inception_network()
        return find_weights(cls.name, INCEPTION_WEIGHTS, weights_root)

    def __call__(self, images: "torch.Tensor") -> tuple:
        return self._network(images.expand(-1, 3, -1, -1))


def _inception_network() -> type:
    """torch-fidelity's class; Unavailable, with the fix, where the torchvision that it needs cannot be imported."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError, OSError) as error:
        import torch

        # torchvision from the registry is built for CUDA; beside a CPU-only torch its operators do not load.
        reason = (
            f"torchvision cannot be imported beside torch {torch.__version__} ({str(error).splitlines()[0]})"
        )
        fix = "pip install --force-reinstall torch torchvision"
        raise Unavailable(f"{reason}; install a matching pair from one index: {fix}") from error
    return FeatureExtractorInceptionV3


class RandomConvExtractor:
    """Three fixed random convolutions; means and deviations of 64 channels at full and half resolution: 256 features.

    It needs no weights file and takes any size: a yardstick for small images, not comparable with any other extractor.
    """

    name = "random_conv"
    WIDTHS = (32, 64, 64)
    STRIDES = (1, 2, 1)

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        import torch

        self.identity = f"v1, {spec.channels} channels"
        self.info: dict[str, str] = {}
        self.device = device
        rng = numpy_rng(0, "random_conv")
        self._layers = []
        for width_in, width in zip((spec.channels, *self.WIDTHS), self.WIDTHS, strict=False):
            weight = rng.standard_normal((width, width_in, 3, 3)) * np.sqrt(2 / (9 * width_in))
            bias = rng.standard_normal(width) * 0.1
            self._layers.append([torch.tensor(x, dtype=torch.float32, device=device) for x in (weight, bias)])

    @classmethod
    def check(cls, weights_root: Path) -> None:
        """Nothing can be missing."""

    def __call__(self, images: "torch.Tensor") -> tuple:
        import torch

        images = to_float(images, self.device)
        halved = torch.nn.functional.avg_pool2d(images, 2, ceil_mode=True)
        return torch.cat([*self._pooled(images), *self._pooled(halved)], dim=1), None

    def _pooled(self, hidden: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """(B, C, H, W) float32 in [-1, 1] -> means and standard deviations over positions, (B, 64) each."""
        import torch

        for (weight, bias), stride in zip(self._layers, self.STRIDES, strict=True):
            hidden = torch.relu(torch.nn.functional.conv2d(hidden, weight, bias, stride=stride, padding=1))
        return hidden.mean(dim=(2, 3)), hidden.std(dim=(2, 3), correction=0)


def extract(
    extractor: Extractor,
    images: np.ndarray,
    *,
    batch_size: int,
    description: str,
    cache_dir: Path | None = None,
) -> Features:
    """One pass of uint8 images (N, C, H, W).

    With `cache_dir` the result is kept there under the hash of the images and of the extractor. Features of private
    images are private: cache them only where the images themselves may lie.
    """
    if cache_dir is None:
        return _forward(extractor, images, batch_size, description)
    path = cache_dir / f"{extractor.name}-{_content_hash(images, extractor.identity)}.npz"
    if path.exists():
        with np.load(path) as stored:
            return Features(stored["features"], stored.get("logits"))
    result = _forward(extractor, images, batch_size, description)
    _write(path, result)
    return result


def find_weights(name: str, file_name: str, weights_root: Path) -> Path:
    """The weights file, if it is there and its SHA-256 starts with the hex digits at the end of its name.

    Raises MissingWeights with the command that fetches it otherwise; nothing is downloaded here.
    """
    path = weights_root / file_name
    root = shlex.quote(str(weights_root))
    command = f"python scripts/prepare_weights.py --name {name} --weights_root {root}"
    if not path.is_file():
        raise MissingWeights(f"no weights file {path}; fetch it: {command}")
    expected, found = expected_hash(file_name), sha256_of(path)
    if not found.startswith(expected):
        raise MissingWeights(
            f"{path} is damaged: SHA-256 {found[:8]}, expected {expected}; fetch it: {command}"
        )
    return path


def expected_hash(file_name: str) -> str:
    """The first hex digits of the SHA-256 that a weights file carries at the end of its name."""
    return Path(file_name).stem.rsplit("-", 1)[-1]


def _forward(extractor: Extractor, images: np.ndarray, batch_size: int, description: str) -> Features:
    import torch

    features, logits = [], []
    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        for start in progress(starts, description, unit="batch"):
            # np.array copies: PyTorch warns about the read-only pages of a memory map.
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(extractor.device)
            batch_features, batch_logits = extractor(batch)
            features.append(batch_features.cpu().numpy())
            logits.append(None if batch_logits is None else batch_logits.cpu().numpy())
    return Features(np.concatenate(features), None if logits[0] is None else np.concatenate(logits))


def _content_hash(images: np.ndarray, identity: str) -> str:
    digest = hashlib.sha256(f"{identity} {images.shape}".encode())
    for start in range(0, len(images), 1024):
        digest.update(np.ascontiguousarray(images[start : start + 1024]))
    return digest.hexdigest()[:32]


def _write(path: Path, result: Features) -> None:
    """Write whole or not at all: a killed run leaves no half file under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"features": result.features} | ({} if result.logits is None else {"logits": result.logits})
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, path)
