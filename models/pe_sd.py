"""PE-SD: Private Evolution of the samples of a small diffusion network that the user trains (Gong et al. 2025)."""

from dataclasses import dataclass

from models.evolution.apis.api import ImageAPI
from models.evolution.apis.diffusion import DiffusionAPI, DiffusionAPIConfig
from models.evolution.synthesizer import PrivateEvolution


@dataclass(frozen=True)
class ModelConfig:
    api_params: DiffusionAPIConfig
    feature_extractor: str  # features that distances are measured in: an extractor or auto


class PESD(PrivateEvolution):
    """Private Evolution with a network that model.api_params.ckpt names, or that is pretrained on the public set."""

    @dataclass(frozen=True)
    class Config(PrivateEvolution.Config):
        model: ModelConfig

    def make_api(self) -> ImageAPI:
        return DiffusionAPI(self.config.model.api_params, self.spec, self.runtime)
