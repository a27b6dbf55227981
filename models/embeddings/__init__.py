"""Where Private Evolution measures distances between images: the table of embeddings, and how one is built."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data.spec import DataSpec
from extractors import EXTRACTORS
from utils.errors import Unavailable
from utils.registry import Registry
from utils.runtime import log

if TYPE_CHECKING:
    import torch

AUTO = "auto"  # inception where its weights are, else random_conv

EMBEDDINGS = Registry(
    "model.feature_extractor",
    {
        "pixels": "models.embeddings.pixels:Pixels",
        **dict.fromkeys(EXTRACTORS, "models.embeddings.features:Features"),
    },
)


class Embedding(Protocol):
    """A fixed function of one image: what else is in the batch has no influence."""

    name: str

    def __init__(self, name: str, spec: DataSpec, weights_root: Path, device: str) -> None:
        """`name`: its entry in the table. Raises Unavailable with what to install or fetch."""

    def __call__(self, images: "torch.Tensor") -> "torch.Tensor":
        """uint8 (B, C, H, W) on the device, of the spec's shape -> (B, D) float32."""
        ...


def build_embedding(name: str, spec: DataSpec, weights_root: Path, device: str) -> Embedding:
    """The embedding `name`, ready for use. "auto" takes inception where its weights are, and random_conv elsewhere, and
    the log says which. Raises UserError for an unknown name, Unavailable where something has to be fetched."""
    if name.casefold() == AUTO:
        name = _best_there_is(weights_root)
    name = EMBEDDINGS.canonical(name)
    return EMBEDDINGS.resolve(name)(name, spec, weights_root, device)


def _best_there_is(weights_root: Path) -> str:
    try:
        EXTRACTORS.resolve("inception").check(weights_root)
    except Unavailable as reason:
        log.info(f"model.feature_extractor=auto: random_conv, for inception is not there: {reason}")
        return "random_conv"
    log.info("model.feature_extractor=auto: inception")
    return "inception"
