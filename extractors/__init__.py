"""Frozen feature extractors: images -> vectors, for metrics and for the votes of Private Evolution.

Listing the names imports nothing heavy. A new extractor is a class with the interface of
extractors.extractor.Extractor and one line in the table below.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from data.spec import DataSpec
from utils.errors import Unavailable, unknown
from utils.registry import Registry
from utils.runtime import log

if TYPE_CHECKING:
    from extractors.extractor import Extractor

AUTO = "auto"  # inception if its weights are available, else random_conv

EXTRACTORS = Registry(
    "eval.extractor",
    {
        "inception": "extractors.inception:InceptionExtractor",
        "random_conv": "extractors.random_conv:RandomConvExtractor",
        "efficientnet_lite0": "extractors.efficientnet:EfficientNetLite0Extractor",
        "efficientnet_lite0_96": "extractors.efficientnet:EfficientNetLite0At96",
        "efficientnet_lite0_112": "extractors.efficientnet:EfficientNetLite0At112",
        "scattering": "extractors.scattering:ScatteringExtractor",
        "dinov2": "extractors.vision_transformer:Dinov2Extractor",
        "clip": "extractors.vision_transformer:ClipExtractor",
        "pixels": "extractors.pixels:PixelExtractor",
    },
)


def build_extractor(key: str, name: str, spec: DataSpec, weights_root: Path, device: str) -> "Extractor":
    """The extractor `name`, ready for use. `key` is the setting that chose it, for messages.

    "auto" is inception if its weights are available and random_conv otherwise; the log states which. Raises UserError
    for an unknown name, Unavailable with the fix if a package or a weights file is missing.
    """
    if name.casefold() == AUTO:
        name = _best_available(key, weights_root)
    if name not in EXTRACTORS:
        raise unknown(key, name, [*EXTRACTORS, AUTO])
    return EXTRACTORS.resolve(name)(spec, weights_root, device)


def _best_available(key: str, weights_root: Path) -> str:
    try:
        EXTRACTORS.resolve("inception").check(weights_root)
    except Unavailable as reason:
        log.info(f"{key}=auto: falling back to random_conv, since inception is not available: {reason}")
        return "random_conv"
    log.info(f"{key}=auto: inception")
    return "inception"
