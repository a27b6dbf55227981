"""LPIPS, the distance of images in the features of a classifier (Zhang et al. 2018, arXiv:1801.03924), by
torch-fidelity: VGG16, which was trained on public photographs.

Its two weights files come from their publishers, at the first use, into the folder of torch.hub.
"""

import os

import torch
from torch import nn

from utils import distributed
from utils.errors import Unavailable

SMALLEST = 16  # pixels: VGG16 halves four times
FILES = (
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
)


class PerceptualDistance(nn.Module):
    """(images, images), (B, C, H, W) in [-1, 1] each -> (B,), differentiable; grey images count as grey colour images.

    Raises Unavailable, with what to fetch, where the weights are neither there nor to be had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lpips = _load()

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        shown = [(127.5 * (part.float() + 1.0)).expand(-1, 3, -1, -1) for part in (images, others)]
        return self.lpips(*shown).flatten()


def _load() -> nn.Module:
    try:
        from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

        with distributed.main_goes_first():
            return SampleSimilarityLPIPS("lpips-vgg16")
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise Unavailable(
            f"pretrain.autoencoder.perceptual_weight: LPIPS cannot be loaded ({reason}); put {' and '.join(FILES)} "
            f"into {folder}, or set pretrain.autoencoder.perceptual_weight=0"
        ) from error
