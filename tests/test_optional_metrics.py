"""Metrics that need an optional package or large weights: what is said without them, and the way in with stand-ins."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from data.spec import DataSpec, Samples
from evaluation.features import extract
from evaluation.metrics.image_reward import image_reward, import_package
from extractors.vision_transformer import ClipExtractor, Dinov2Extractor
from utils.errors import MissingWeights, Unavailable

SPEC = DataSpec("toy", 8, 1, 3, 30, ("cat", "dog", "bird"))


class StandIn(torch.nn.Module):
    """A vision model whose embedding is the mean colour of what reaches it."""

    @classmethod
    def from_pretrained(cls, folder: Path, local_files_only: bool):
        assert local_files_only and (folder / "model.safetensors").is_file()
        return cls()

    def forward(self, pixels: torch.Tensor):
        self.seen = pixels
        embedding = pixels.mean(dim=(2, 3))
        return types.SimpleNamespace(pooler_output=embedding, image_embeds=embedding)


@pytest.fixture
def transformers(monkeypatch):
    package = types.ModuleType("transformers")
    package.__version__ = "0.0"
    package.Dinov2Model = package.CLIPVisionModelWithProjection = StandIn
    monkeypatch.setitem(sys.modules, "transformers", package)


def weights(root: Path, kind) -> bytes:
    folder = root / kind.SOURCE.split("/")[1]
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return b"weights"


@pytest.mark.parametrize("kind", [Dinov2Extractor, ClipExtractor])
def test_an_extractor_of_transformers(kind, transformers, tmp_path):
    content = weights(tmp_path, kind)
    extractor = kind(SPEC, tmp_path, "cpu")
    grey = np.full((5, 1, 8, 8), 51, np.uint8)
    found = extract(extractor, grey, batch_size=2, description="test")
    expected = [(0.2 - mean) / std for mean, std in zip(kind.MEAN, kind.STD, strict=True)]
    assert found.logits is None
    assert found.features == pytest.approx(np.tile(expected, (5, 1)), rel=1e-4)
    assert extractor._network.seen.shape == (1, 3, kind.RESOLUTION, kind.RESOLUTION)
    assert not extractor._network.training
    assert extractor.identity == hashlib.sha256(content).hexdigest() == extractor.info["weights_sha256"]
    colour = extract(extractor, grey.repeat(3, axis=1), batch_size=2, description="test")
    assert np.array_equal(colour.features, found.features)


@pytest.mark.parametrize("kind", [Dinov2Extractor, ClipExtractor])
def test_missing_weights_or_packages_are_reported_with_the_fix(kind, transformers, tmp_path, monkeypatch):
    with pytest.raises(
        MissingWeights, match=f"prepare_weights.py --name {kind.name} --weights_root {tmp_path}"
    ):
        kind(SPEC, tmp_path, "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unavailable, match="pip install transformers"):
        kind(SPEC, tmp_path, "cpu")


class RewardModel:
    """Rewards the brightness of an image, plus 100 times the number of the prompt."""

    PROMPTS = ("a photo of a cat", "a photo of a dog", "a photo of a bird")

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.blip = types.SimpleNamespace(tokenizer=self.tokenizer)

    def tokenizer(self, prompt: str, **options):
        assert options["max_length"] == 35 and options["return_tensors"] == "pt"
        ids = torch.full((1, 35), self.PROMPTS.index(prompt))
        tokens = types.SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
        tokens.to = lambda device: tokens
        return tokens

    def preprocess(self, picture) -> torch.Tensor:
        assert picture.mode == "RGB"
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()

    def score_gard(self, ids, mask, images):
        assert len(ids) == len(mask) == len(images)
        self.batches.append(len(images))
        return images.mean(dim=(1, 2, 3))[:, None] + 100.0 * ids[:, :1]


@pytest.fixture
def reward_model(monkeypatch, tmp_path) -> RewardModel:
    model = RewardModel()
    package = types.ModuleType("ImageReward")

    def load(name, device, med_config):
        assert Path(name).is_file() and Path(med_config).is_file()
        return model

    package.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    (tmp_path / "image-reward").mkdir()
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / "image-reward" / name).write_bytes(b"")
    return model


def test_image_reward_scores_batches_with_the_class_names(reward_model, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.metrics.image_reward.BATCH_SIZE", 4)
    images = np.zeros((9, 1, 8, 8), np.uint8)
    labels = np.array([2, 0, 2, 2, 2, 2, 2, 0, 2])  # no dog
    images[labels == 0] = 7
    found = image_reward(Samples(images, labels), SPEC, "a photo of a {}", "cpu", tmp_path)
    assert found.value == pytest.approx((2 * 7 + 7 * 200) / 9)
    assert found.info == {"prompt": "a photo of a {}"}
    assert sorted(reward_model.batches) == [2, 3, 4]


def test_image_reward_without_weights_or_package(reward_model, tmp_path, monkeypatch):
    samples = Samples(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64))
    with pytest.raises(MissingWeights, match=r"prepare_weights\.py --name image_reward"):
        image_reward(samples, SPEC, "{}", "cpu", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(Unavailable, match="pip install image-reward"):
        image_reward(samples, SPEC, "{}", "cpu", tmp_path)


def test_image_reward_is_imported_without_the_clip_that_no_registry_has(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ImageReward", raising=False)
    (tmp_path / "ImageReward.py").write_text("import clip\nload = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_package().load is None
    assert "clip" not in sys.modules
    monkeypatch.delitem(sys.modules, "ImageReward")


def test_a_tokenizer_that_cannot_be_fetched_is_reported(reward_model, tmp_path, monkeypatch):
    def offline(**_):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(sys.modules["ImageReward"], "load", offline)
    samples = Samples(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64))
    with pytest.raises(Unavailable, match="hf download bert-base-uncased") as caught:
        image_reward(samples, SPEC, "{}", "cpu", tmp_path)
    assert "\n" not in str(caught.value)
