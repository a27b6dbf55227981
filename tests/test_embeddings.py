"""What votes are measured by: every embedding is a fixed function of one image, and is found or refused by name."""

import sys
from pathlib import Path

import pytest
import torch

from data.spec import DataSpec
from extractors.random_conv import RandomConvExtractor
from extractors.vision_transformer import ClipExtractor
from models.embeddings import EMBEDDINGS, build_embedding
from utils.errors import MissingWeights, UserError

NOWHERE = Path("there is no such folder")


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def spec(request) -> DataSpec:
    return DataSpec("toy", 8, request.param, 2, 10, ("a", "b"))


@pytest.fixture
def images(spec) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, *spec.image_shape), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["pixels", "random_conv"])
def test_an_image_is_embedded_the_same_in_any_batch(name, spec, images):
    embedding = build_embedding(name, spec, NOWHERE, "cpu")
    together = embedding(images)
    assert together.shape[0] == 6 and together.ndim == 2 and together.dtype == torch.float32
    one_by_one = torch.cat([embedding(image[None]) for image in images])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    again = build_embedding(name, spec, NOWHERE, "cpu")(images)
    assert torch.equal(together, again), "two runs must vote by the same distances"
    assert len(together.unique(dim=0)) == 6
    assert embedding.name == name


def test_pixels_are_pixels(spec, images):
    found = build_embedding("pixels", spec, NOWHERE, "cpu")(images)
    assert torch.equal((found * 255).round().to(torch.uint8), images.flatten(1))
    assert found.max() <= 1


def test_features_are_those_that_metrics_see(spec, images):
    found = build_embedding("Random_Conv", spec, NOWHERE, "cpu")(images)
    assert torch.equal(found, RandomConvExtractor(spec, NOWHERE, "cpu")(images)[0])


def test_auto_takes_what_is_there_and_says_so(spec, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "dpib")
    assert build_embedding("auto", spec, tmp_path, "cpu").name == "random_conv"
    assert "auto: random_conv" in caplog.text and "prepare_weights.py --name inception" in caplog.text

    class StandIn:
        name = "inception"

        def __init__(self, *_):
            pass

    monkeypatch.setattr("extractors.inception.InceptionExtractor.check", lambda root: root)
    monkeypatch.setitem(EMBEDDINGS._entries, "inception", StandIn)
    assert build_embedding("auto", spec, tmp_path, "cpu").name == "inception"
    assert "auto: inception" in caplog.text


def test_an_unknown_name_and_missing_weights_are_one_line(spec, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"unknown model\.feature_extractor 'inseption'; did you mean 'inception'"
    ):
        build_embedding("inseption", spec, tmp_path, "cpu")
    with pytest.raises(MissingWeights, match=r"prepare_weights\.py --name inception") as caught:
        build_embedding("inception", spec, tmp_path, "cpu")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        build_embedding("clip", spec, tmp_path, "cpu")


def test_clip_is_the_extractor_of_the_metrics(spec, tmp_path, images, monkeypatch):
    """With a tiny network of random weights in the place of the published one."""
    transformers = pytest.importorskip("transformers", reason="the optional package transformers is missing")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=8, **sizes)
    folder = tmp_path / ClipExtractor.SOURCE.rpartition("/")[2]
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    monkeypatch.setattr(ClipExtractor, "RESOLUTION", 32)
    found = build_embedding("clip", spec, tmp_path, "cpu")(images)
    assert found.shape == (6, 8) and not found.requires_grad
    torch.testing.assert_close(found, build_embedding("clip", spec, tmp_path, "cpu")(images))
