"""DPDM: a diffusion model trained from scratch with DP-SGD and noise multiplicity (Dockhorn et al., TMLR 2023)."""

from models.diffusion.synthesizer import DiffusionSynthesizer


class DPDM(DiffusionSynthesizer):
    """The family without its first stage: `public_data.name` is null, all weights are trained with DP-SGD."""
