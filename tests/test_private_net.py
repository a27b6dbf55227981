"""The net for private images in run folders catches a leak of every kind, and nothing else."""

import base64
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from private_net import PrivateNet

from data.digits import load_digits_8

PRIVATE = load_digits_8()[0].images
LEAK = PRIVATE[17]  # (1, 8, 8)
PIXELS = LEAK[0]


def as_picture(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def in_grid(pixels: np.ndarray, scale: int = 1) -> np.ndarray:
    """A picture of other pixels that shows `pixels`, enlarged, off the origin."""
    canvas = np.random.default_rng(0).integers(0, 256, (40 * scale, 40 * scale), dtype=np.uint8)
    canvas[2 * scale : 10 * scale, 3 * scale : 11 * scale] = np.kron(
        pixels, np.ones((scale, scale), np.uint8)
    )
    return canvas


def near(pixels: np.ndarray) -> np.ndarray:
    """The pixels, each one grey level off at most."""
    noise = np.random.default_rng(1).integers(-1, 2, pixels.shape)
    return np.clip(pixels.astype(int) + noise, 0, 255).astype(np.uint8)


def in_page(picture: bytes) -> bytes:
    return b'<img src="data:image/png;base64,' + base64.b64encode(picture) + b'">'


def write_npz(path, **arrays) -> None:
    np.savez(path, **arrays)


PLANTS = {
    "png": lambda folder: (folder / "a.png").write_bytes(as_picture(PIXELS)),
    "png of a grid": lambda folder: (folder / "a.png").write_bytes(as_picture(in_grid(PIXELS))),
    "png, enlarged": lambda folder: (folder / "a.png").write_bytes(as_picture(in_grid(PIXELS, 4))),
    "png, one grey level off": lambda folder: (folder / "a.png").write_bytes(
        as_picture(in_grid(near(PIXELS)))
    ),
    "npy": lambda folder: np.save(folder / "a.npy", PRIVATE[:20]),
    "npy, flat": lambda folder: np.save(folder / "a.npy", PRIVATE[:20].reshape(20, -1)),
    "npz, one grey level off": lambda folder: write_npz(folder / "a.npz", x=near(PRIVATE[:3])),
    "npz, channels last": lambda folder: write_npz(folder / "a.npz", x=np.moveaxis(PRIVATE[:3], 1, -1)),
    "npz of floats": lambda folder: write_npz(folder / "a.npz", x=PRIVATE[:3] / 255.0),
    "checkpoint": lambda folder: torch.save(
        {"state": {"list": [torch.from_numpy(LEAK.copy())]}}, folder / "a.pth"
    ),
    "checkpoint, in [-1, 1]": lambda folder: torch.save(
        {"x": torch.from_numpy(LEAK / 127.5 - 1).float()}, folder / "a.pth"
    ),
    "page": lambda folder: (folder / "a.html").write_bytes(in_page(as_picture(in_grid(PIXELS)))),
    "hash of all": lambda folder: (folder / "a.json").write_text(
        hashlib.sha256(PRIVATE.tobytes()).hexdigest()
    ),
    "hash of one": lambda folder: (folder / "a.txt").write_text(hashlib.md5(LEAK.tobytes()).hexdigest()),
}


@pytest.fixture(scope="module")
def net() -> PrivateNet:
    return PrivateNet(PRIVATE)


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_leak_is_caught(net, kind, tmp_path):
    (tmp_path / "sub").mkdir()
    PLANTS[kind](tmp_path / "sub")
    (leak,) = net.leaks(tmp_path)
    assert leak.startswith("sub/a.")


def test_other_images_and_weights_are_no_leak(net, tmp_path):
    rng = np.random.default_rng(2)
    np.savez(tmp_path / "gen.npz", x=rng.integers(0, 256, (50, 1, 8, 8), dtype=np.uint8), y=np.arange(50))
    off = np.clip(PIXELS.astype(int) + 3, 0, 255).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(as_picture(in_grid(off)))
    torch.save({"w": torch.randn(16, 3, 8, 8), "zeros": torch.zeros(64, 64)}, tmp_path / "a.pth")
    (tmp_path / "a.html").write_bytes(in_page(as_picture(np.zeros((30, 30), np.uint8))))
    assert net.leaks(tmp_path) == []
