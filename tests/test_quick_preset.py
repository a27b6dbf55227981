"""preset=quick on the user's own images takes at most 20 minutes on two cores, for any number and size of images.

Times are computed, not measured (work_clock.py), for one core. A second core shortens a step by at least a third
(docs/bench_dpsgd.md: 1.9 times faster); the limit below uses only part of that.
"""

import pytest
import torch
import work_clock

import evaluation.cost  # noqa: F401 - its clock is replaced
from data.public import num_public_images
from models import METHODS
from pipeline.compose import compose
from pipeline.planning import evaluation_costs_of
from utils.config import load_config

MINUTES = 25  # of one core
TINY_IMAGENET = 100_000  # images, where PE's public set is not prepared
GENERAL = [(500, 28, 1, 2), (20_000, 32, 3, 10)]
CORNERS = [
    (200, 8, 1, 2),
    (2_000, 8, 3, 1000),
    (60_000, 28, 1, 10),
    (20_000, 48, 3, 40),
    (60_000, 64, 3, 10),
    (500, 128, 3, 2),
    (60_000, 128, 3, 10),
    (5_000, 256, 3, 2),
    (1_000_000, 32, 3, 10),
]


def own_images(
    method: str, number: int, resolution: int, channels: int, classes: int, *more: str
) -> list[str]:
    """The command line of a run on images that are described by settings, without prepared data."""
    sizes = {"num_train": number, "resolution": resolution, "num_channels": channels, "n_classes": classes}
    settings = [f"sensitive_data.{key}={value}" for key, value in sizes.items()]
    return [
        "--method",
        method,
        "--data_name",
        "own",
        "--epsilon",
        "inf",
        *settings,
        "setup.device=cpu",
        *more,
    ]


def stages(argv: list[str], tmp_path, monkeypatch) -> list:
    """Costs of all stages of a run."""
    work_clock.use(monkeypatch)
    parts = compose(load_config([*argv, "--data_root", str(tmp_path)], METHODS))
    costs, synthesizer = [], parts.synthesizer
    if synthesizer.uses_public_images:
        number = num_public_images(parts.config.public_data, tmp_path)
        if number is None and parts.config.public_data.name == "tiny_imagenet":
            number = TINY_IMAGENET
        costs += [] if number is None else synthesizer.public_costs(number)
    return [*costs, *synthesizer.costs(), *evaluation_costs_of(parts)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cells():
    for method in METHODS:
        if method == "Noise":
            continue
        for size in GENERAL + CORNERS:
            fits = method != "PrivImage" or size[3] <= 62  # as many classes as glyphs has
            if fits:
                yield pytest.param(method, size, marks=() if size in GENERAL else pytest.mark.slow)


def needs(method: str, size: tuple[int, int, int, int]) -> list[str]:
    """What only the user can decide: which share of the images is public, here 4 percent."""
    if method != "IDPS":
        return []
    number, _, _, classes = size
    return [f"sensitive_data.num_public={classes * max(1, int(min(2000, 0.04 * number) / classes))}"]


@pytest.mark.parametrize(("method", "size"), list(cells()))
def test_quick_takes_minutes_on_own_images(method, size, tmp_path, monkeypatch):
    costs = stages(own_images(method, *size, "preset=quick", *needs(method, size)), tmp_path, monkeypatch)
    assert any(cost.stage == "train" for cost in costs)
    listed = {cost.stage: round(cost.seconds) for cost in costs}
    assert sum(cost.seconds for cost in costs) <= 60 * MINUTES, listed
