"""DP-LDM-SD: pretrain on a whole public set, fine-tune a few percent of the weights with DP-SGD.

The pixel-space counterpart of DP-LDM (Liu et al. 2023, "Differentially Private Latent Diffusion Models") in the
published benchmark: what tells classes apart is tuned, what draws textures stays as the public images taught it.
"""

from dataclasses import dataclass

from models.diffusion.config import TrainConfig
from models.diffusion.synthesizer import DiffusionSynthesizer
from models.nn.unet import PARAMETER_GROUPS
from utils.sections import check_field


@dataclass(frozen=True)
class PartialTrainConfig(TrainConfig):
    trained_groups: list[str]  # of models.nn.unet.PARAMETER_GROUPS; all other weights are frozen

    def __post_init__(self) -> None:
        unknown = [name for name in self.trained_groups if name not in PARAMETER_GROUPS]
        allowed = f"a list of at least one of {', '.join(PARAMETER_GROUPS)}"
        check_field(bool(self.trained_groups) and not unknown, "trained_groups", self.trained_groups, allowed)


class DPLDMSD(DiffusionSynthesizer):
    """PDP-Diffusion whose private stage trains named groups of the UNet's weights. Pretrained checkpoints are
    interchangeable with PDP-Diffusion's."""

    @dataclass(frozen=True)
    class Config(DiffusionSynthesizer.Config):
        train: PartialTrainConfig

    def _trained_parameters(self) -> set[str]:
        groups = self.network.parameter_groups()
        return {name for group in self.config.train.trained_groups for name in groups[group]}
