"""DINOv2 and CLIP as feature extractors, through the optional package transformers and weights in a local folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from data.prepared import sha256_of
from data.spec import DataSpec
from utils.errors import MissingWeights, Unavailable

if TYPE_CHECKING:
    import torch

# A model repository has one or both; the first is preferred.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


class TransformersExtractor:
    """A vision model of transformers. Grey images are replicated to three channels; all are resized (bicubic)."""

    name: str
    MODEL: str  # class of transformers
    SOURCE: str  # repository of its published weights
    RESOLUTION: int
    MEAN: tuple[float, float, float]
    STD: tuple[float, float, float]

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        import torch

        weights = self.check(weights_root)
        import transformers

        self.identity = sha256_of(weights)
        self.info = {"weights_sha256": self.identity, "transformers": transformers.__version__}
        self.device = device
        self._network = getattr(transformers, self.MODEL).from_pretrained(
            weights.parent, local_files_only=True
        )
        self._network.eval().to(device)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.MEAN, self.STD)
        )

    @classmethod
    def check(cls, weights_root: Path) -> Path:
        """The path of the weights file. Raises Unavailable with what to install or fetch; downloads nothing."""
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise Unavailable(
                f"the package transformers cannot be imported ({error}); install it: pip install transformers"
            ) from error
        folder = weights_root / cls.SOURCE.rpartition("/")[2]
        found = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
        if not found:
            fix = f"python scripts/prepare_weights.py --name {cls.name} --weights_root {weights_root}"
            raise MissingWeights(f"no weights file {folder / WEIGHTS_FILES[0]}; fetch it: {fix}")
        return found[0]

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, None]":
        import torch

        pixels = images.expand(-1, 3, -1, -1).float() / 255
        size = (self.RESOLUTION, self.RESOLUTION)
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            return self._features(self._network((pixels - self._mean) / self._std)), None

    def _features(self, output) -> "torch.Tensor":
        """The (B, D) embedding among the outputs of the network."""
        raise NotImplementedError


class Dinov2Extractor(TransformersExtractor):
    """ViT-L/14 at 224 pixels, its class token: 1024 features (Oquab et al. 2023, arXiv:2304.07193)."""

    name, MODEL, SOURCE, RESOLUTION = "dinov2", "Dinov2Model", "facebook/dinov2-large", 224
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def _features(self, output) -> "torch.Tensor":
        return output.pooler_output


class ClipExtractor(TransformersExtractor):
    """ViT-L/14 at 336 pixels, its projected embedding: 768 features (Radford et al. 2021, arXiv:2103.00020)."""

    name, MODEL, RESOLUTION = "clip", "CLIPVisionModelWithProjection", 336
    SOURCE = "openai/clip-vit-large-patch14-336"
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def _features(self, output) -> "torch.Tensor":
        return output.image_embeds
