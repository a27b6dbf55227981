"""The public stage of the diffusion family on its own."""

from dataclasses import dataclass

from data.spec import DataSpec
from models.diffusion.config import ModelConfig, OptimConfig
from models.diffusion.loss import LossConfig
from models.diffusion.synthesizer import DiffusionSynthesizer
from models.public.pretraining import Pretraining
from opacus_ext.accounting import Release
from utils.runtime import Runtime
from utils.sections import GenConfig, check_field, check_least


@dataclass(frozen=True)
class PublicStageConfig:
    cond: bool  # False: every label is replaced by the null label
    batch_size: int
    n_epochs: int
    snapshot_freq: int  # steps between snapshots
    flip: bool  # random horizontal flips
    optim: OptimConfig
    loss: LossConfig

    def __post_init__(self) -> None:
        check_field(self.batch_size > 0, "batch_size", self.batch_size, "a positive number of images")
        check_least(self, 1, "n_epochs", "snapshot_freq")


class PublicPretraining(DiffusionSynthesizer):
    """The first stage of the family alone: a network trained on all classes of a public set. It makes no private
    query. From the private data it needs only the shape of the images."""

    @dataclass(frozen=True)
    class Config:
        model: ModelConfig
        pretrain: PublicStageConfig
        gen: GenConfig

    def __init__(self, config: Config, label_dim: int, spec: DataSpec, runtime: Runtime) -> None:
        self.label_dim = label_dim
        super().__init__(config, spec, runtime)

    def privacy_plan(self) -> list[Release]:
        return []

    def _label_dim(self) -> int:
        return self.label_dim

    def _stages(self) -> dict[str, PublicStageConfig]:
        return {"pretrain": self.config.pretrain}

    def _make_pretraining(self) -> Pretraining:
        return Pretraining(None, None, False, self.spec, self.runtime)

    def _flips(self) -> bool:
        return self.config.pretrain.flip
