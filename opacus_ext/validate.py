"""Refuse networks in which one example can influence another's gradient."""

from torch import nn

from utils.errors import UserError


def validate_per_example(network: nn.Module) -> None:
    """Raise UserError naming the first module that mixes examples (batch statistics) or keeps statistics of them."""
    for name, module in network.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        )
        tracks = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        if mixes or tracks:
            raise UserError(
                f"network: {type(module).__name__} at '{name}' mixes the examples of a batch, so per-example "
                f"clipping bounds nothing; use GroupNorm"
            )
