"""PDP-Diffusion: pretrain on a whole public set, fine-tune every weight with DP-SGD (Ghalebikesabi et al. 2023)."""

from models.diffusion.synthesizer import DiffusionSynthesizer


class PDPDiffusion(DiffusionSynthesizer):
    """The family with public pretraining on all classes. The label table holds the public classes; private class k
    starts from the row of public class k."""
