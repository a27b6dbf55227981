"""DP-LDM: latent diffusion pretrained on public data; DP-SGD on its attention blocks and class embedder alone (Liu et
al. 2023, "Differentially Private Latent Diffusion Models", arXiv:2305.15759)."""

from dataclasses import dataclass

from data.spec import DataSpec
from models.diffusion.latent import LatentDiffusion, LatentTrainConfig
from utils.runtime import Runtime
from utils.sections import check


@dataclass(frozen=True)
class TrainConfig(LatentTrainConfig):
    first_transformer: (
        int  # transformers from this one on are trained, counted from 0 in the order of passing
    )


class DPLDM(LatentDiffusion):
    """The family with the private stage on spatial transformers. The published settings leave out the first eight
    (at 28 px none): those on the way down, in the middle, and in part on the way up."""

    @dataclass(frozen=True)
    class Config(LatentDiffusion.Config):
        train: TrainConfig

    def __init__(self, config: Config, spec: DataSpec, runtime: Runtime) -> None:
        super().__init__(config, spec, runtime)
        count, first = len(self.network.transformers()), config.train.first_transformer
        check(
            0 <= first < count,
            "train.first_transformer",
            first,
            f"from 0 to {count - 1}: the network has {count} transformers",
        )

    def _trained_parameters(self) -> set[str]:
        chosen = [self.network.label_embedding]
        chosen += self.network.transformers()[self.config.train.first_transformer :]
        trained = {id(parameter) for module in chosen for parameter in module.parameters()}
        return {name for name, parameter in self.network.named_parameters() if id(parameter) in trained}
