"""First weights of the residual classifiers."""

from torch import nn


def he_normal(network: nn.Module, mode: str) -> None:
    """Draw the weights of every convolution from a normal of variance 2 / fan (He et al. 2015, arXiv:1502.01852).

    `mode` is "fan_in" or "fan_out"; other layers keep PyTorch's defaults.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
