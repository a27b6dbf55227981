"""The table of image generators that Private Evolution can steer. Any other one is given as "module:Class"."""

from utils.registry import Registry

APIS = Registry(
    "model.api",
    {
        "glyphs": "models.apis.glyphs:GlyphsAPI",
        "nearest": "models.apis.nearest:NearestAPI",
        "diffusion": "models.apis.diffusion:DiffusionAPI",
        "stable_diffusion": "models.apis.stable_diffusion:StableDiffusionAPI",
        "openai": "models.apis.openai:OpenAIAPI",
        "improved_diffusion": "models.apis.guided_diffusion:ImprovedDiffusionAPI",
        "guided_diffusion": "models.apis.guided_diffusion:GuidedDiffusionAPI",
    },
)
