"""PE: Private Evolution of images that any generator makes (Lin et al., ICLR 2024)."""

import importlib
from dataclasses import dataclass

from models.evolution.apis import APIS
from models.evolution.apis.api import ImageAPI
from models.evolution.apis.diffusion import DiffusionAPIConfig
from models.evolution.apis.glyphs import GlyphsConfig
from models.evolution.apis.guided_diffusion import GuidedDiffusionAPIConfig
from models.evolution.apis.nearest import NearestConfig
from models.evolution.apis.openai import OpenAIAPIConfig
from models.evolution.apis.stable_diffusion import StableDiffusionAPIConfig
from models.evolution.synthesizer import PrivateEvolution
from utils.command_line import parse_value
from utils.errors import UserError
from utils.typed import build, leaf_types, unknown_key


@dataclass(frozen=True)
class ApiParams:
    """One optional section per generator of the table APIS."""

    glyphs: GlyphsConfig | None = None
    nearest: NearestConfig | None = None
    diffusion: DiffusionAPIConfig | None = None
    stable_diffusion: StableDiffusionAPIConfig | None = None
    openai: OpenAIAPIConfig | None = None
    improved_diffusion: GuidedDiffusionAPIConfig | None = None
    guided_diffusion: GuidedDiffusionAPIConfig | None = None


@dataclass(frozen=True)
class ModelConfig:
    api: str  # a name of models/evolution/apis/__init__.py, or "module:Class"
    api_params: ApiParams  # a section per generator; that of `api` is used
    api_options: list[str]  # settings of a generator given as "module:Class": [key=value, ...]
    feature_extractor: str  # features that distances are measured in: an extractor or auto


class PE(PrivateEvolution):
    """Private Evolution with the generator of model.api."""

    @dataclass(frozen=True)
    class Config(PrivateEvolution.Config):
        model: ModelConfig

    def make_api(self) -> ImageAPI:
        model = self.config.model
        if ":" in model.api:
            kind = _imported(model.api)
            return kind(_from_options(kind.Config, model.api_options), self.spec, self.runtime)
        name = APIS.canonical(model.api)
        section = getattr(model.api_params, name)
        if section is None:
            raise UserError(
                f"model.api_params.{name}: has no value; set its keys, or choose another model.api"
            )
        return APIS.resolve(name)(section, self.spec, self.runtime)


def _imported(target: str) -> type[ImageAPI]:
    """The class that "module:Class" names."""
    module, _, attribute = target.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"model.api: cannot load '{target}' ({error})") from error
    if not (isinstance(kind, type) and issubclass(kind, ImageAPI)):
        raise UserError(f"model.api: '{target}' is not a subclass of models.evolution.apis.api.ImageAPI")
    return kind


def _from_options(kind: type, options: list[str]) -> object:
    """An instance of the configuration class `kind` from ["key=value", ...]."""
    known = leaf_types({"model.api_options": kind})
    values = {}
    for option in options:
        name, is_given, text = option.partition("=")
        key = f"model.api_options.{name}"
        if not is_given or key not in known:
            raise unknown_key(key, known)
        values[name] = parse_value(text, known[key], key)
    return build(kind, values, "model.api_options")
