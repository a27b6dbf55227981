"""ImageReward (Xu et al. 2023, arXiv:2304.05977): how well images fit a text that names their class."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

from evaluation.registry import Value, metric
from utils.errors import MissingWeights, Unavailable
from utils.progress import progress

BATCH_SIZE = 64
SOURCE = "THUDM/ImageReward"  # where the weights are published
FILES = ("ImageReward.pt", "med_config.json")
TOKENIZER = "bert-base-uncased"
MAX_TOKENS = 35  # of a prompt, as the authors' model was trained


def check_weights(weights_root: Path) -> Path:
    """The folder of the weights. Raises Unavailable with what to install or fetch; nothing is downloaded here."""
    import_package()
    folder = weights_root / "image-reward"
    for name in FILES:
        if not (folder / name).is_file():
            fix = f"python scripts/prepare_weights.py --name image_reward --weights_root {weights_root}"
            raise MissingWeights(f"no file {folder / name}; fetch it: {fix}")
    return folder


@metric(
    "image_reward",
    better="higher",
    needs=("samples", "spec", "prompt", "device", "weights_root"),
    check=check_weights,
)
def image_reward(samples, spec, prompt: str, device: str, weights_root: Path) -> Value:
    """Mean reward of the images for `prompt` with their class's name in the place of {}; no real image is read."""
    model = load_model(device, weights_root)
    total = 0.0
    for label in progress(np.unique(samples.labels), "ImageReward", unit="class"):
        text, images = prompt.format(spec.class_names[label]), samples.images[samples.labels == label]
        total += _rewards(model, text, images, device)
    return Value(total / len(samples), {"prompt": prompt})


def load_model(device: str, weights_root: Path):
    """The authors' model from <weights_root>/image-reward. Raises Unavailable with what to install or fetch."""
    folder = check_weights(weights_root)
    files = dict(zip(("name", "med_config"), (str(folder / name) for name in FILES), strict=True))
    try:
        return import_package().load(**files, device=device)
    except OSError as error:  # the package takes its tokenizer from the hub or from the hub's cache
        reason = str(error).strip().partition("\n")[0]
        fix = f"fetch it: hf download {TOKENIZER}"
        raise Unavailable(f"the tokenizer {TOKENIZER} cannot be had ({reason}); {fix}") from error


def import_package():
    """The module ImageReward. Raises Unavailable with the install command.

    ImageReward also imports OpenAI's clip, for scores that are not used here. No registry has that package, so an empty
    module replaces it if it is missing.
    """
    stand_in = "clip" not in sys.modules and importlib.util.find_spec("clip") is None
    if stand_in:
        sys.modules["clip"] = types.ModuleType("clip")
    try:
        return importlib.import_module("ImageReward")
    except ImportError as error:
        raise Unavailable(
            f"the package image-reward cannot be imported ({error}); install it: "
            f"pip install image-reward 'transformers<4.50'"
        ) from error
    finally:
        if stand_in:
            del sys.modules["clip"]


def _rewards(model, prompt: str, images: np.ndarray, device: str) -> float:
    """Sum of the rewards of images (N, C, H, W) uint8 for one prompt, BATCH_SIZE at a time."""
    import torch
    from PIL import Image

    tokens = model.blip.tokenizer(
        prompt, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).to(device)
    total = 0.0
    for start in range(0, len(images), BATCH_SIZE):
        batch = np.broadcast_to(
            images[start : start + BATCH_SIZE],
            (len(images[start : start + BATCH_SIZE]), 3, *images.shape[2:]),
        )
        pictures = [model.preprocess(Image.fromarray(image.transpose(1, 2, 0))) for image in batch]
        ids, mask = (tensor.expand(len(pictures), -1) for tensor in (tokens.input_ids, tokens.attention_mask))
        with torch.no_grad():
            total += model.score_gard(ids, mask, torch.stack(pictures).to(device)).double().sum().item()
    return total
