"""InceptionV3 as a feature extractor."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from data.prepared import sha256_of
from data.spec import DataSpec
from extractors.weights import find_weights
from utils.errors import Unavailable

if TYPE_CHECKING:
    import torch

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class InceptionExtractor:
    """InceptionV3 with the TensorFlow weights of 2015, by torch-fidelity: 2048 features of the last pooling.

    Grey images are replicated to three channels. The 1008 logits have no bias, as in the original Inception score.
    """

    name = "inception"

    def __init__(self, spec: DataSpec, weights_root: Path, device: str) -> None:
        network, path = _inception_network(), self.check(weights_root)
        self.identity = sha256_of(path)
        self.info = {"weights_sha256": self.identity, "torch-fidelity": version("torch-fidelity")}
        self.device = device
        # A path keeps torch-fidelity from downloading.
        self._network = network(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(device)

    @classmethod
    def check(cls, weights_root: Path) -> Path:
        """The path of the weights file. Raises Unavailable with the fix if it or a package is missing."""
        _inception_network()
        return find_weights(cls.name, INCEPTION_WEIGHTS, weights_root)

    def __call__(self, images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        return self._network(images.expand(-1, 3, -1, -1))


def _inception_network() -> type:
    """torch-fidelity's class. Raises Unavailable with the fix if torchvision, which it needs, cannot be imported."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError, OSError) as error:
        import torch

        # torchvision from PyPI is built for CUDA; next to a CPU-only torch its operators do not load.
        reason = (
            f"torchvision cannot be imported with torch {torch.__version__}: {str(error).splitlines()[0]}"
        )
        fix = "pip install --force-reinstall torch torchvision"
        raise Unavailable(f"{reason}; install a matching pair from one index: {fix}") from error
    return FeatureExtractorInceptionV3
