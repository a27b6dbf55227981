"""utils/places.py: all programs use the same folders of data and weights."""

from pathlib import Path

import pytest

from models import METHODS
from scripts import prepare_data, prepare_weights
from utils.config import load_config


def roots_of_all_programs() -> set[tuple[Path, Path]]:
    """(data root, weights root) of each program."""
    config = load_config(["--method", "Noise"], METHODS)
    data = prepare_data.parse_arguments(["--data_name", "mnist_28"]).data_root
    weights = prepare_weights.parse_arguments(["--name", "inception"]).weights_root
    return {(config.data_root, config.weights_root), (data, weights)}


@pytest.mark.parametrize(
    ("variable", "data", "weights"),
    [
        ("~/zz", Path.home() / "zz", Path.home() / "zz"),
        ("", Path("dataset"), Path.home() / ".cache" / "dp-image-bench"),
        (None, Path("dataset"), Path.home() / ".cache" / "dp-image-bench"),
    ],
)
def test_all_programs_have_the_same_default_folders(variable, data, weights, monkeypatch):
    for name in ("DPIB_DATA_ROOT", "DPIB_WEIGHTS_ROOT"):
        monkeypatch.delenv(name, raising=False) if variable is None else monkeypatch.setenv(name, variable)
    assert roots_of_all_programs() == {(data, weights)}


def test_a_flag_overrides_the_variable_and_its_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("DPIB_DATA_ROOT", "/elsewhere")
    given = prepare_data.parse_arguments(["--data_name", "mnist_28", "--data_root", "~/zz"])
    assert given.data_root == Path.home() / "zz"
