"""Released classifiers: the product of a run that assigns images to the private classes, and its file.

A file holds weights and plain values only. Its architecture is one of KINDS, rebuilt from the settings in the file, so
that neither the run's folder nor its configuration is needed. Legend: B batch, C channels, H W pixels, K classes.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from data.spec import DataSpec
from utils import checkpoint_files
from utils.errors import UserError
from utils.images import to_float
from utils.progress import progress
from utils.registry import Registry

KINDS = Registry(
    "classifier",
    {
        "linear": "models.linear.classifier:LinearClassifier",
        "wide_resnet": "models.released.wide_resnet:WideResNetClassifier",
    },
)
VERSION = 1
ORIGIN = (
    "method", "data", "private", "spent", "budget", "relation", "releases", "noise_seeded", "not_computed",
    "num_public",
)  # fmt: skip


class ReleasedClassifier(nn.Module, abc.ABC):
    """(B, C, H, W) in [-1, 1] -> logits (B, K). In eval mode; every image is treated by itself."""

    kind: ClassVar[str]  # its name in KINDS

    @abc.abstractmethod
    def settings(self) -> dict:
        """Plain values from which `rebuild` makes the same architecture."""

    @classmethod
    @abc.abstractmethod
    def rebuild(cls, settings: dict, spec: DataSpec, weights_root: Path, device: str) -> "ReleasedClassifier":
        """The architecture of `settings` with weights that are still to be loaded. `spec`: size and classes of the
        images. Raises Unavailable if something is not installed."""


@dataclass(frozen=True)
class ClassifierFile:
    """A classifier read from its file. `origin`: facts about its run, with the keys ORIGIN."""

    classifier: ReleasedClassifier
    class_names: tuple[str, ...]
    resolution: int
    channels: int
    origin: dict


@torch.no_grad()
def logits_of(
    classifier: nn.Module,
    images: np.ndarray,
    device: str,
    description: str | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """(N, C, H, W) uint8, N > 0 -> (N, K) float32. No description: no progress bar."""
    starts = range(0, len(images), batch_size)
    if description is not None:
        starts = progress(starts, description, unit="batch")
    parts = [classifier(to_float(images[start : start + batch_size], device)) for start in starts]
    return torch.cat(parts).float().cpu().numpy()


def write_classifier(path: Path, classifier: ReleasedClassifier, spec: DataSpec, origin: dict) -> None:
    """Write the file, whole or not at all."""
    content = {
        "classifier": VERSION,
        "kind": classifier.kind,
        "settings": classifier.settings(),
        "state": {name: tensor.cpu() for name, tensor in classifier.state_dict().items()},
        "class_names": list(spec.class_names),
        "resolution": spec.resolution,
        "channels": spec.channels,
        "origin": origin,
    }
    checkpoint_files.write(path, content)


def read_classifier(path: Path, weights_root: Path, device: str) -> ClassifierFile:
    """Raises UserError for a file that is missing, damaged or no classifier, Unavailable if it needs something that is
    not installed."""
    content = checkpoint_files.read(str(path))
    if content.get("classifier") != VERSION:
        raise UserError(
            f"{path}: not a released classifier of this version; give gen/classifier.pth of a run"
        )
    wrong = [key for key, fits in FITS.items() if not fits(content.get(key))]
    if wrong:
        raise UserError(f"{path}: damaged ({wrong[0]}: {str(content.get(wrong[0]))[:60]})")
    checkpoint_files.require_finite(str(path), content["state"])
    names = tuple(content["class_names"])
    spec = DataSpec("", content["resolution"], content["channels"], len(names), 0, names)
    try:
        classifier = KINDS.resolve(content["kind"]).rebuild(content["settings"], spec, weights_root, device)
    except (KeyError, TypeError, ValueError, AssertionError, UserError) as error:
        raise UserError(f"{path}: damaged (settings: {error})") from error
    own = {name: tensor.shape for name, tensor in classifier.state_dict().items()}
    found = {name: tensor.shape for name, tensor in content["state"].items()}
    if own != found:
        name = next(name for name in [*own, *found] if own.get(name) != found.get(name))
        raise UserError(
            f"{path}: damaged ({name} does not fit {len(names)} classes and images of {spec.resolution} px with "
            f"{spec.channels} channels)"
        )
    classifier.load_state_dict(content["state"])
    return ClassifierFile(
        classifier.to(device).eval(), names, spec.resolution, spec.channels, content["origin"]
    )


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)


# Key of the file -> whether its value can be used
FITS: dict[str, Callable[[object], bool]] = {
    "kind": lambda value: isinstance(value, str) and value in KINDS,
    "settings": lambda value: isinstance(value, dict),
    "state": _is_state,
    "class_names": _are_names,
    "resolution": lambda value: isinstance(value, int) and value > 0,
    "channels": lambda value: value in (1, 3),
    "origin": lambda value: isinstance(value, dict) and value.keys() >= set(ORIGIN),
}
