"""Frozen networks that turn images into vectors, for metrics and for the votes of Private Evolution.

Listing them imports nothing heavy. A new one is a class like extractors.extractor.Extractor and a line here.
"""

from utils.registry import Registry

EXTRACTORS = Registry(
    "eval.extractor",
    {
        "inception": "extractors.inception:InceptionExtractor",
        "random_conv": "extractors.random_conv:RandomConvExtractor",
        "efficientnet_lite0": "extractors.efficientnet:EfficientNetLite0Extractor",
        "scattering": "extractors.scattering:ScatteringExtractor",
        "dinov2": "extractors.vision_transformer:Dinov2Extractor",
        "clip": "extractors.vision_transformer:ClipExtractor",
    },
)
