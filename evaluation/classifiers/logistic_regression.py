"""Multinomial logistic regression on the pixels: the fastest classifier, a baseline for the others."""

from torch import nn

from data.spec import DataSpec


def build(spec: DataSpec) -> nn.Module:
    """(B, C, H, W) float32 in [-1, 1] -> logits (B, num_classes)."""
    channels, height, width = spec.image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, spec.num_classes))
