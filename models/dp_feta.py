"""DP-FETA: warm up on noisy central images of the private set, then DP-SGD (Gong et al., IEEE S&P 2025)."""

from models.diffusion.synthesizer import DiffusionSynthesizer
from models.public.central_images import MEAN


class DPFETA(DiffusionSynthesizer):
    """The family with the warm-up as a stage of its own: means, or modes with public_data.name=central_mode. A public
    set, if one is given, comes before it. The central images are a sampled Gaussian release in addition to DP-SGD."""

    central_kind = MEAN
