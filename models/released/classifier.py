"""Released classifiers: the product of a run that assigns images to the private classes, and its file.

A file holds weights and plain values only. Its architecture is one of KINDS, rebuilt from the settings in the file, so
that neither the run's folder nor its configuration is needed. Legend: B batch, C channels, H W pixels, K classes.
"""

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from data.spec import DataSpec
from models.fitting.stages import load_weights
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
FACTS = {"class_names": list, "resolution": int, "channels": int, "origin": dict}


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
    """A classifier read from its file. `origin`: method, data, epsilon, delta and further facts about its run."""

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
    wrong = [key for key, kind in FACTS.items() if not isinstance(content.get(key), kind)]
    if wrong or content.get("kind") not in KINDS:
        raise UserError(f"{path}: damaged ({wrong[0] if wrong else 'kind'} is missing or of another type)")
    names = tuple(content["class_names"])
    spec = DataSpec("", content["resolution"], content["channels"], len(names), 0, names)
    try:
        classifier = KINDS.resolve(content["kind"]).rebuild(content["settings"], spec, weights_root, device)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged (settings: {error})") from error
    load_weights(classifier, content["state"], str(path))
    return ClassifierFile(
        classifier.to(device).eval(), names, spec.resolution, spec.channels, content["origin"]
    )
