"""The table of image generators that Private Evolution can steer. Any other one is given as "module:Class"."""

from utils.registry import Registry

APIS = Registry(
    "model.api",
    {
        "glyphs": "models.evolution.apis.glyphs:GlyphsAPI",
        "nearest": "models.evolution.apis.nearest:NearestAPI",
        "diffusion": "models.evolution.apis.diffusion:DiffusionAPI",
        "stable_diffusion": "models.evolution.apis.stable_diffusion:StableDiffusionAPI",
        "openai": "models.evolution.apis.openai:OpenAIAPI",
        "improved_diffusion": "models.evolution.apis.guided_diffusion:ImprovedDiffusionAPI",
        "guided_diffusion": "models.evolution.apis.guided_diffusion:GuidedDiffusionAPI",
    },
)
