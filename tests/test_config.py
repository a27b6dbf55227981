"""The command line and the layers of the configuration, on the shipped YAML files and on toy methods."""

import math
import random
import shlex
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from models import METHODS
from models.diffusion.samplers import MAX_GAMMA
from models.public.config import PublicDataConfig
from pipeline.configuration import evaluation_config
from utils.command_line import parser
from utils.config import (
    EVERY_METHOD,
    Config,
    MethodRegistry,
    _require_known,
    format_config,
    load_config,
)
from utils.config_files import CONFIG_FOLDER, ConfigFiles, compose, flatten, written_values
from utils.errors import UserError
from utils.presets import TIERS, Rule, load_presets, nearest_tier
from utils.sections import GenConfig
from utils.typed import leaf_types

REPOSITORY = CONFIG_FOLDER.parent
SHIPPED = ConfigFiles([CONFIG_FOLDER])
DATASETS = SHIPPED.names("data")
OWN_IMAGES = {"custom": ["sensitive_data.n_classes=3"]}

SHIPPED_METHODS = sorted(METHODS)

# The command lines that users of the published benchmark know; the text between <> stands for what a user has.
PUBLISHED_COMMANDS = """
run.py --method PrivImage --data_name cifar10_32 --epsilon 10
run.py setup.n_gpus_per_node=4 --method PDP-Diffusion --data_name mnist_28 --epsilon 10.0 eval.mode=val
run.py setup.n_gpus_per_node=4 --method PDP-Diffusion --data_name mnist_28 --epsilon 10.0 eval.mode=sen
run.py setup.n_gpus_per_node=4 --method PDP-Diffusion --data_name celeba_male_64 --epsilon 10.0 eval.mode=val
eval.py --method PDP-Diffusion --data_name mnist_28 --epsilon 10.0 --exp_path exp/pdp-diffusion/<run>
eval.py --method PDP-Diffusion --data_name mnist_28 --epsilon 10.0 -ed no-dp-mnist_28
run.py sensitive_data.name=null eval.mode=sen setup.n_gpus_per_node=3 public_data.name=imagenet pretrain.cond=true \
  --method PDP-Diffusion --data_name cifar10_32 --epsilon 10.0 --exp_description pretrain_imagenet32
run.py setup.n_gpus_per_node=4 --method DPDM --data_name mnist_28 --epsilon 10.0 eval.mode=val public_data.name=null \
  model.network.ch_mult=[1,2,2,4] model.network.attn_resolutions=[16,8,4] model.network.nf=128 \
  train.dp.n_split=512 --exp_description 80M
run.py setup.n_gpus_per_node=1 --method DP-LDM --data_name mnist_28 --epsilon 10.0 eval.mode=val \
  public_data.name=imagenet model.network.ch_mult=[1,1,2,4] model.network.attn_resolutions=[16,8,4] \
  model.network.nf=128 train.dp.n_split=16 --exp_description 80M
run.py setup.n_gpus_per_node=4 --method DPGAN --data_name mnist_28 --epsilon 10.0 eval.mode=val \
  public_data.name=null model.Generator.g_conv_dim=120 --exp_description 14M
run.py setup.n_gpus_per_node=4 --method DPGAN --data_name mnist_28 --epsilon 10.0 eval.mode=val \
  public_data.name=imagenet pretrain.cond=true --exp_description pretrain_imagenet_conditional
run.py setup.n_gpus_per_node=4 --method DPGAN --data_name mnist_28 --epsilon 10.0 eval.mode=val \
  public_data.name=places365 public_data.n_classes=365 public_data.train_path=dataset/places365 pretrain.cond=true \
  --exp_description pretrain_places365_conditional
run.py setup.n_gpus_per_node=4 --method DPGAN --data_name mnist_28 --epsilon 10.0 eval.mode=val \
  public_data.name=places365 public_data.n_classes=365 public_data.train_path=dataset/places365 pretrain.cond=False \
  --exp_description pretrain_places365_unconditional
run.py setup.n_gpus_per_node=4 --method DPDM --data_name cifar10_32 --epsilon 10.0 eval.mode=val \
  public_data.name=imagenet public_data.selective.ratio=0.05 pretrain.cond=true \
  --exp_description pretrain_imagenet_5perc
run.py setup.n_gpus_per_node=3 public_data.name=null eval.mode=val \
  model.ckpt=./exp/pdp-diffusion/<run>/pretrain/checkpoints/snapshot_checkpoint.pth --method PDP-Diffusion \
  --data_name fmnist_28 --epsilon 10.0 --exp_description from_pretrained
run.py setup.n_gpus_per_node=3 public_data.name=imagenet eval.mode=val \
  model.ckpt=./exp/pdp-diffusion/<run>/pretrain/checkpoints/snapshot_checkpoint.pth --method PDP-Diffusion \
  --data_name fmnist_28 --epsilon 10.0 --exp_description continue_pretraining
run.py setup.n_gpus_per_node=1 --method DP-MERF --data_name mnist_28 --epsilon 10.0 eval.mode=val \
  public_data.name=central_mean public_data.central.sample_num=50 pretrain.cond=true \
  --exp_description pretrain_central
run.py --method PE-SD --data_name cifar10_32 --epsilon 10.0 eval.mode=val \
  model.api_params.ckpt=./exp/pdp-diffusion/<run>/pretrain/checkpoints/snapshot_checkpoint.pth \
  --exp_description model_from_pdp
run.py setup.n_gpus_per_node=4 train.accountant=prv --method DPDM --data_name fmnist_28 -e 10.0
run.py setup.n_gpus_per_node=4 model.ckpt=./exp/pdp-diffusion/<run>/train/checkpoints/final_checkpoint.pth \
  pretrain.n_epochs=0 train.n_epochs=0 --method PDP-Diffusion --data_name fmnist_28 -e 10.0 --resume_exp <run>
run.py setup.n_gpus_per_node=4 --method Noise --epsilon 10.0 --data_name my-dataset sensitive_data.n_classes=7
"""
PUBLISHED = PUBLISHED_COMMANDS.replace("\\\n", "").strip().splitlines()


@dataclass(frozen=True)
class NetworkConfig:
    ch_mult: list[int]
    channels: int


@dataclass(frozen=True)
class WarmUpConfig:
    rate: float


@dataclass(frozen=True)
class ModelConfig:
    network: NetworkConfig
    ckpt: str | None
    warm_up: WarmUpConfig | None
    attention: bool
    s_max: float


@dataclass(frozen=True)
class TrainConfig:
    n_epochs: int
    lr: float
    tags: list[str]
    extra: int = 7


class Toy:
    @dataclass(frozen=True)
    class Config:
        model: ModelConfig
        train: TrainConfig
        gen: GenConfig
        public_data: PublicDataConfig


class Plain:
    @dataclass(frozen=True)
    class Config:
        gen: GenConfig


def registry(entries: dict[str, type]) -> MethodRegistry:
    return MethodRegistry(entries, {"public_data": PublicDataConfig})


TOY_YAML = """
# @package _global_
public_data: {name: imagenet, selective: {ratio: 0.1}}
model:
  network: {ch_mult: [2, 4], channels: "${sensitive_data.num_channels}"}
  ckpt: null
  warm_up: null
  attention: true
  s_max: .inf
train: {n_epochs: 10, lr: 1e-3, tags: [a]}
gen: {data_num: 600, batch_size: 100}
"""
TOY_PRESETS = """
paper:
  - when: {data: [mnist_28, digits_8], epsilon: 1}
    set: {train.n_epochs: 20, "model.network.ch_mult": [2, 2]}
  - when: {epsilon: 10}
    set: {train.lr: 2e-3}
  - when: {data: [cifar10_32]}
    set: {public_data.name: places365}
quick:
  - set: {train.n_epochs: 3}
"""
PLAIN_YAML = "gen: {data_num: 60, batch_size: 10}\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def toy_folder(tmp_path) -> Path:
    folder = tmp_path / "toy's folder, with = and spaces"
    write(folder / "method" / "Toy.yaml", TOY_YAML)
    write(folder / "presets" / "Toy.yaml", TOY_PRESETS)
    write(folder / "method" / "Plain.yaml", PLAIN_YAML)
    return folder


@pytest.fixture
def load(toy_folder, tmp_path, monkeypatch):
    """load(text) composes a command line for the toy methods; paths in it are relative to an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPIB_DATA_ROOT", raising=False)
    monkeypatch.delenv("DPIB_WEIGHTS_ROOT", raising=False)
    methods = registry({"Toy": Toy, "Plain": Plain})

    def run(text: str, program: str = "run") -> Config:
        arguments = shlex.split(text)
        if not {"--method", "-m"} & set(arguments):
            arguments += ["--method", "Toy"]
        return load_config([*arguments, "--config_dir", str(toy_folder)], methods, program)

    return run


# --- the shipped files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SHIPPED_METHODS)
@pytest.mark.parametrize(
    ("preset", "epsilon"), [pytest.param("paper", 1, marks=pytest.mark.slow), ("paper", 10), ("quick", 10)]
)
def test_every_cell_composes_and_types(method, preset, epsilon):
    for data in DATASETS:
        arguments = ["-m", method, "-dn", data, "-e", str(epsilon), f"preset={preset}"]
        config = load_config(arguments + OWN_IMAGES.get(data, []), METHODS)
        assert config.sensitive_data.name == data and config.privacy.epsilon == epsilon
        assert (config.method, config.preset, config.borrowed) == (method, preset, False)
        values = flatten(config.snapshot)
        assert set(config.provenance) == set(values)
        for key in (key for key in values if key.endswith(".s_churn")):
            per_step = values[key] / values[key.replace("s_churn", "num_steps")]
            assert per_step < MAX_GAMMA, "the sampler would cut the churn of a shipped setting"


def test_every_method_file_belongs_to_a_method():
    for group in ("method", "presets"):
        assert set(SHIPPED.names(group)) <= set(SHIPPED_METHODS), group
    assert set(SHIPPED_METHODS) <= set(SHIPPED.names("method"))


def shipped_tables() -> list[str]:
    return [EVERY_METHOD, *(name for name in SHIPPED.names("presets") if name in SHIPPED_METHODS)]


def shipped_parts(**names: str) -> list:
    """The files of a configuration from the shipped folder; `names` replaces some of the choices."""
    names = {
        "data": "digits_8",
        "public_data": "none",
        "eval": "none",
        "setup": "cpu",
        "method": "Noise",
    } | names
    return SHIPPED.parts({group: SHIPPED.require(group, name) for group, name in names.items()})


def values_before_presets(method: str, data: str, preset: str) -> dict[str, object]:
    from omegaconf import OmegaConf

    composed = compose(shipped_parts(data=data, eval=preset, method=method))
    return flatten(OmegaConf.to_container(composed, resolve=True))


OWN_SIZES = [
    {"N": number, "resolution": resolution, "channels": 3, "classes": classes, "num_public": 2 * classes}
    for number, resolution, classes in (
        (1000, 8, 2),
        (5000, 28, 5000),
        (300_000, 32, 10),
        (60_000, 64, 2),
        (9, 256, 3),
    )
] + [{"N": 2000, "resolution": 28, "channels": 1, "classes": 2, "num_public": 0}]


@pytest.mark.parametrize("table", shipped_tables())
@pytest.mark.parametrize("preset", ["paper", "quick"])
def test_every_preset_rule_matches_a_cell_and_changes_a_value(table, preset, monkeypatch):
    monkeypatch.setattr(Rule, "_fits_packages", lambda self: True)
    method = "Noise" if table == EVERY_METHOD else table
    presets = load_presets(SHIPPED.require("presets", table))
    rules, unused = presets.chosen(preset), {rule.layer for rule in presets.rules[preset]}
    bases: dict[str, dict] = {}
    cells = [*((data, None) for data in DATASETS), *(("custom", facts) for facts in OWN_SIZES)]
    for data, facts in cells:
        matching = {rule.layer for rule in rules for tier in TIERS if rule.matches(data, tier, facts)}
        if not matching & unused:
            continue  # it takes long to compose, and would show nothing new
        if data not in bases:
            bases[data] = values_before_presets(method, data, preset)
        base = bases[data]
        for tier in TIERS:
            values = dict(base)
            for rule in rules:
                if rule.matches(data, tier, facts):
                    rule = rule.evaluated(facts)
                    changes = {key for key, value in rule.values.items() if values.get(key) != value}
                    unused -= {rule.layer} if changes else set()
                    values.update(rule.values)
    assert not unused


@pytest.mark.parametrize("table", shipped_tables())
def test_preset_rules_name_known_datasets(table):
    content = load_presets(SHIPPED.require("presets", table))
    listed = [rule.data for rule in content.chosen("quick") if isinstance(rule.data, list)]
    named = {data for names in listed for data in names} | set(content.quick_by_default)
    assert named <= set(DATASETS)


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_commands_compose(command):
    program, *arguments = shlex.split(command)
    config = load_config(arguments, METHODS, program.removesuffix(".py"))
    values = flatten(config.snapshot)
    aliases = {"train.accountant": "privacy.accountant"}
    settings = [word.partition("=") for word in arguments if "=" in word]
    assert all(config.provenance[aliases.get(key, key)] == "command line" for key, _, _ in settings)
    for key, _, text in settings:
        written = str(values[aliases.get(key, key)]).replace(" ", "").replace("None", "null")
        assert written.casefold() == text.casefold(), key


def test_shipped_groups_have_the_same_keys():
    for group in ("data", "public_data", "eval", "setup"):
        keys = {
            frozenset(key for key, _, _ in written_values(shipped_parts(**{group: name})))
            for name in SHIPPED.names(group)
        }
        assert len(keys) == 1, group


def test_provenance_names_the_included_file_that_set_a_value():
    config = load_config(["-m", "Noise", "eval=none", "setup=multi_gpu"], METHODS)
    assert config.eval.extractor == "inception" and config.setup.n_gpus_per_node == 4
    written = {
        "eval.extractor": "none", "eval.recipe": "quick", "eval.batch_size": "paper",
        "setup.n_gpus_per_node": "multi_gpu", "setup.precision": "gpu", "setup.n_nodes": "cpu",
    }  # fmt: skip
    for key, name in written.items():
        assert config.provenance[key] == f"base configs/{key.split('.')[0]}/{name}.yaml"


def test_provenance_follows_any_defaults_list_that_hydra_accepts(load, toy_folder):
    """A file included with a package of its own, and one from another group."""
    write(toy_folder / "parts" / "network.yaml", "{ch_mult: [3, 5], channels: 2}\n")
    included = "defaults: [/parts/network@model.network, _self_]\n"
    lines = [line for line in TOY_YAML.splitlines() if "ch_mult" not in line]
    write(toy_folder / "method" / "Toy.yaml", "\n".join([lines[1], included, *lines[2:]]))
    config = load("-dn mnist_28")
    assert config.method_config.model.network == NetworkConfig([3, 5], 2)
    assert config.provenance["model.network.channels"].endswith("/parts/network.yaml")
    assert config.provenance["train.lr"] == "preset Toy paper rule 2"
    assert config.provenance["model.s_max"].endswith("/method/Toy.yaml")


def test_a_section_that_a_rule_sets_as_a_whole_has_the_rule_as_its_layer(load, toy_folder):
    write(toy_folder / "presets" / "Toy.yaml", "paper:\n  - set: {model.warm_up: {rate: 0.5}}\n")
    assert load("").provenance["model.warm_up.rate"] == "preset Toy paper rule 1"


def test_a_changed_defaults_list_is_read_again(load, toy_folder):
    load("-m Plain")
    write(toy_folder / "method" / "_small.yaml", "gen: {data_num: 6, batch_size: 1}\n")
    write(toy_folder / "method" / "Plain.yaml", "defaults: [_small]\n")
    assert load("-m Plain").gen == GenConfig(6, 1, None, 0.7, "relabel")


# --- layers --------------------------------------------------------------------------------------------------------


def test_defaults_of_the_toy_method(load):
    config = load("")
    assert (config.method, config.data_name, config.epsilon, config.seed) == ("Toy", "digits_8", 10.0, 0)
    assert (config.preset, config.preset_tier, config.borrowed) == ("quick", 10, False)
    assert config.method_config.model.network == NetworkConfig([2, 4], 1)
    assert config.method_config.model.s_max == math.inf
    assert config.method_config.gen is config.gen and config.method_config.public_data is config.public_data
    assert config.privacy.delta is None and config.privacy.epsilon == 10.0
    assert config.eval.extractor == "random_conv" and config.eval.classifiers == [
        "small_cnn",
        "logistic_regression",
    ]
    assert (config.resume, config.exp_path, config.dry_run, config.print_config) == (None, None, False, False)


def test_later_layers_win(load):
    base = "-dn mnist_28 preset=paper"
    assert load(f"{base} -e 10").method_config.train.n_epochs == 10
    assert load(f"{base} -e 1").method_config.train.n_epochs == 20
    assert load("-dn mnist_28 -e 1 preset=quick").method_config.train.n_epochs == 3
    assert load("-dn mnist_28 -e 1 preset=quick train.n_epochs=5").method_config.train.n_epochs == 5
    assert load(f"{base} -e 1").method_config.model.network.ch_mult == [2, 2]
    assert load("-dn mnist_28 -e 1 preset=quick").method_config.model.network.ch_mult == [2, 2]


def test_interpolation_follows_the_data_and_the_command_line(load):
    assert load("-dn mnist_28").method_config.model.network.channels == 1
    assert load("-dn cifar10_32").method_config.model.network.channels == 3
    assert load("-dn cifar10_32 sensitive_data.num_channels=1").method_config.model.network.channels == 1
    assert load("gen.batch_size='${train.n_epochs}'").gen.batch_size == 3


def test_provenance_names_the_layer_of_every_value(load):
    provenance = load("-dn mnist_28 -e 1 preset=quick eval.mode=val").provenance
    assert provenance["sensitive_data.resolution"] == "base configs/data/mnist_28.yaml"
    assert provenance["eval.recipe"] == "base configs/eval/quick.yaml"
    assert provenance["privacy.relation"] == "base configs/config.yaml"
    assert provenance["public_data.n_classes"] == "base configs/public_data/imagenet.yaml"
    assert provenance["public_data.name"].endswith("/method/Toy.yaml")
    assert provenance["model.network.channels"].startswith("derived ${sensitive_data.num_channels} ")
    assert provenance["model.network.ch_mult"] == "preset Toy paper rule 1"
    assert provenance["train.n_epochs"] == "preset Toy quick rule 1"
    assert provenance["train.extra"] == "default of the class"
    for key in ("eval.mode", "preset", "privacy.epsilon", "data_name"):
        assert provenance[key] == "command line"
    assert load("").provenance["privacy.epsilon"] == "default of --epsilon"


def test_print_config_shows_every_value_once(load):
    config = load("train.tags=[x,y]")
    lines = [line for line in format_config(config).splitlines() if line and not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == sorted(
        flatten(config.snapshot), key=lambda key: ("." in key, key)
    )
    tags = next(line for line in lines if line.startswith("train.tags"))
    assert "[x, y]" in tags and tags.endswith("command line")
    setup = [line for line in lines if line.startswith("setup.") and "base configs" in line]
    assert len(setup) > 1 and len({line.index("base configs") for line in setup}) == 1


def test_print_config_keeps_its_columns_next_to_a_long_value(load):
    long = "[" + ", ".join(f"tag{number}" for number in range(12)) + "]"
    lines = format_config(load(f"train.tags={long.replace(' ', '')}")).splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith("train.tags"))
    assert lines[number].split(maxsplit=1)[1] == long
    assert lines[number + 1].strip() == "command line"
    seed = next(line for line in lines if line.startswith("seed "))
    assert lines[number + 1].index("command") == seed.index("base")


def test_snapshot_is_plain_and_complete(load):
    from omegaconf import OmegaConf

    config = load("-e inf -dn MNIST_28")
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config.snapshot))) == config.snapshot
    assert config.snapshot["data_name"] == "mnist_28" and config.snapshot["privacy"]["epsilon"] == math.inf
    assert config.snapshot["model"]["network"] == {"ch_mult": [2, 4], "channels": 1}


def test_loading_prints_nothing_and_writes_nothing(load, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    load("--dry_run --print_config")
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr() == ("", "")


# --- presets -------------------------------------------------------------------------------------------------------


def test_nearest_tier_is_by_ratio():
    assert [nearest_tier(e) for e in (0.1, 1, 3.1, 3.2, 8, 10, 100, math.inf)] == [
        1,
        1,
        1,
        10,
        10,
        10,
        10,
        10,
    ]


@pytest.mark.parametrize(
    ("epsilon", "tier", "borrowed"), [("1.0", 1, False), ("3", 1, True), ("inf", 10, True)]
)
def test_other_budgets_borrow_a_tier_and_report_it(load, epsilon, tier, borrowed):
    config = load(f"-e {epsilon} -dn mnist_28")
    assert (config.preset_tier, config.borrowed) == (tier, borrowed)
    assert config.method_config.train.n_epochs == {1: 20, 10: 10}[tier]
    notes = [f"epsilon {epsilon}" in note and f"epsilon {tier}" in note for note in config.notes]
    assert notes == ([True] if borrowed else [])


def test_without_a_preset_table_nothing_is_borrowed(load):
    config = load("-m Plain -e 3 -dn mnist_28")
    assert (config.preset_tier, config.borrowed, config.notes) == (None, False, ())
    assert (
        config.method_config == Plain.Config(GenConfig(60, 10, None, 0.7, "relabel"))
        and config.public_data.name is None
    )


def test_quick_is_the_default_of_the_embedded_digits_only(load):
    assert load("").preset == "quick" and load("-dn mnist_28").preset == "paper"
    assert load("preset=paper").eval.recipe == "paper"
    assert "quick" in load("").notes[0]


def test_eval_and_setup_files_are_chosen_by_name(load):
    assert load("eval=none").eval.metrics == []
    assert load("setup=multi_gpu setup.n_gpus_per_node=2").setup.n_gpus_per_node == 2
    assert load("setup=gpu").setup.device == "cuda"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "{when: {epsilon: 5}, set: {train.lr: 1}}",
            r"epsilon: 5.*1.*10",
        ),
        (
            "{when: {dataset: [x]}, set: {train.lr: 1}}",
            r"'dataset'.*'data'",
        ),
        (
            "{when: {data: mnist_28}, set: {train.lr: 1}}",
            r"data: 'mnist_28'.* list",
        ),
        (
            "{set: {train.lrr: 1}}",
            r"'train.lrr'.*preset Toy paper rule 1.*'train.lr'",
        ),
        ("{when: {epsilon: 1}}", r"preset Toy paper rule 1"),
    ],
)
def test_an_error_in_a_rule_names_the_rule(load, toy_folder, rule, message):
    write(toy_folder / "presets" / "Toy.yaml", f"paper:\n  - {rule}\n")
    with pytest.raises(UserError, match=message):
        load("")


# --- data and public data ------------------------------------------------------------------------------------------


def test_names_match_without_regard_to_case(load):
    config = load("-m tOY -dn CIFAR10_32 public_data.name=ImageNet")
    assert (config.method, config.data_name, config.public_data.name) == ("Toy", "cifar10_32", "imagenet")
    assert config.sensitive_data.name == "cifar10_32"


@pytest.mark.parametrize(
    ("arguments", "name", "n_classes"),
    [
        ("", "imagenet", 1000),  # method file
        ("-dn cifar10_32", "places365", 365),  # preset
        ("-dn cifar10_32 public_data.name=emnist", "emnist", 26),  # command line
        ("-dn cifar10_32 public_data.name=null", None, None),
        ("public_data=places365", "places365", 365),
    ],
)
def test_the_latest_layer_chooses_the_public_set(load, arguments, name, n_classes):
    config = load(arguments)
    assert (config.public_data.name, config.public_data.n_classes) == (name, n_classes)
    assert config.public_data.selective.ratio == 0.1


def test_a_folder_can_be_the_public_dataset(load):
    config = load("public_data.name=kittens public_data.train_path='my kittens'")
    assert (config.public_data.name, config.public_data.train_path) == ("kittens", "my kittens")


def test_own_images_can_be_described_on_the_command_line(load):
    config = load("-dn my-cats sensitive_data.n_classes=4")
    assert config.data_name == config.sensitive_data.name == "my-cats"
    assert config.sensitive_data.n_classes == 4


def test_own_images_are_found_in_their_prepared_folder(load, tmp_path, monkeypatch):
    (tmp_path / "dataset" / "cats").mkdir(parents=True)
    assert load("-dn cats").sensitive_data.name == "cats"
    with pytest.raises(UserError, match="'cats'"):
        load("-dn cats --data_root elsewhere")
    monkeypatch.setenv("DPIB_DATA_ROOT", str(tmp_path / "dataset"))
    assert load("-dn cats").data_root == tmp_path / "dataset"


def test_without_sensitive_data_there_is_no_private_stage(load):
    config = load("-dn mnist_28 sensitive_data.name=null")
    assert config.sensitive_data.name is None and config.sensitive_data.resolution == 28
    assert config.data_name == "mnist_28"


# --- the command line ----------------------------------------------------------------------------------------------

ODD = {
    "model.ckpt=./exp/pdp/<run>/x=1/a b, c/snapshot.pth": "./exp/pdp/<run>/x=1/a b, c/snapshot.pth",
    "model.ckpt=.../it's #1: [final].pth": ".../it's #1: [final].pth",
    "model.ckpt='quoted'": "quoted",
    "model.ckpt=0010": "0010",
    "model.ckpt=$HOME/*?!&{a}.pth": "$HOME/*?!&{a}.pth",
    "model.ckpt=C:\\data\\x.pth": "C:\\data\\x.pth",
    "model.ckpt=null": None,
    "model.ckpt=": "",
}


@pytest.mark.parametrize("word", ODD)
def test_values_with_odd_characters(load, word):
    assert load(shlex.quote(word)).method_config.model.ckpt == ODD[word]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.lr=1e-3", 0.001),
        ("train.lr=1", 1.0),
        ("train.n_epochs=3.0", 3),
        ("train.n_epochs=1e2", 100),
        ("train.tags=[x, 'y z']", ["x", "y z"]),
        ("train.tags=[]", []),
        ("model.network.ch_mult=[1,2,2,4]", [1, 2, 2, 4]),
        ("model.attention=False", False),
        ("model.s_max=inf", math.inf),
        ("model.warm_up.rate=0.5", 0.5),
        ("model.warm_up=null", None),
        ("privacy.delta=1e-5", 1e-5),
        ("setup.omp_n_threads=null", None),
    ],
)
def test_values_are_read_by_type(load, word, value):
    found = flatten(load(shlex.quote(word)).snapshot)[word.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "010",
        "08",
        "+010",
        "-07",
        "0_1",
        "00",
        "1:30",
        "1:30.5",
        "[1,010]",
        "!!int 010",
        "1_000",
        "0x10",
        "01.5e1",
    ],
)
def test_numbers_that_yaml_misreads_are_refused(load, text):
    key = "model.network.ch_mult" if text.startswith("[") else "train.n_epochs"
    with pytest.raises(UserError, match=key) as error:
        load(shlex.quote(f"{key}={text}"))
    assert "010" in str(error.value) or text in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("-3", -3), ("+4", 4), ("1e3", 1000), ("1.5e1", 15)])
def test_numbers_that_yaml_reads_correctly_are_accepted(load, text, value):
    assert load(f"train.n_epochs={text}").method_config.train.n_epochs == value


@pytest.mark.parametrize("method", list(METHODS))
def test_the_files_of_a_method_hold_every_setting_of_its_class(method, monkeypatch):
    """A key that they do not hold is refused before the class is imported."""
    known = set()
    monkeypatch.setattr("utils.config._require_known", lambda _, names: known.update(names))
    config = load_config(["--method", method, "--data_name", "mnist_28"], METHODS)
    types = leaf_types({**METHODS.sections, **typing.get_type_hints(type(config.method_config))})
    _require_known(types, known)
    assert known >= set(config.provenance) - {"method", "data_name", "privacy.epsilon"}


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("Noise", set()),
        ("DPDM", {"train.dp.n_split", "train.dp.max_physical_batch_size"}),
        ("PE", {"model.api_params.openai.max_requests", "model.api_params.openai.max_retries"}),
    ],
)
def test_a_resumed_run_may_change_what_its_sections_declare(method, keys):
    found = set(load_config(["--method", method, "--data_name", "mnist_28"], METHODS).changeable)
    assert found == keys


def test_texts_in_lists_are_taken_literally(load):
    assert load("'train.tags=[010, no, 1e3, \"a, b\"]'").method_config.train.tags == [
        "010",
        "no",
        "1e3",
        "a, b",
    ]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("method/Toy.yaml", "n_epochs: 10", "n_epochs: 010"),
        ("method/Toy.yaml", "n_epochs: 10", "n_epochs: 1:30"),
        ("presets/Toy.yaml", "train.n_epochs: 20", "train.n_epochs: 020"),
    ],
)
def test_files_with_numbers_that_yaml_misreads_are_refused(load, toy_folder, name, old, new):
    path = toy_folder / name
    content = path.read_text()
    line = content[: content.index(old)].count("\n") + 1
    path.write_text(content.replace(old, new))
    with pytest.raises(UserError) as error:
        load("")
    assert all(word in str(error.value) for word in (str(path), f"line {line}", new.split(": ")[1]))


def test_order_does_not_matter(load):
    words = [
        "-m Toy",
        "-dn mnist_28",
        "--epsilon 1",
        "train.n_epochs=4",
        "eval.mode=val",
        "preset=quick",
        "--dry_run",
    ]
    reference = load(" ".join(words))
    for seed in range(3):
        random.Random(seed).shuffle(words)
        assert load(" ".join(words)) == reference


def test_flags_set_their_fields(load, tmp_path, monkeypatch):
    config = load("-e 1.0 -ed 80M -re run-1 --data_root d --exp_root e --weights_root w --print_config")
    assert (config.description, config.resume, config.print_config, config.dry_run) == (
        "80M",
        "run-1",
        True,
        False,
    )
    assert (config.data_root, config.exp_root, config.weights_root) == (Path("d"), Path("e"), Path("w"))
    assert load("").weights_root == Path.home() / ".cache" / "dp-image-bench"
    monkeypatch.setenv("DPIB_WEIGHTS_ROOT", "/weights")
    assert load("").weights_root == Path("/weights")
    assert load("-ep exp/toy/<run>".replace("<", "'<").replace(">", ">'"), "eval").exp_path == Path(
        "exp/toy/<run>"
    )


def test_epsilon_inf_is_non_private(load):
    assert load("--epsilon inf").privacy.epsilon == math.inf


def test_keys_of_the_published_benchmark_are_aliases(load):
    config = load("train.accountant=prv train.dp.delta=1e-6")
    assert (config.privacy.accountant, config.privacy.delta) == ("prv", 1e-6)
    assert config.provenance["privacy.accountant"] == "command line"


ERRORS = {  # command line -> parts of the message: key, value, what is allowed, suggestion
    "--seed 1": ("--seed", "seed=<value>"),
    "--train.n_epochs=3": ("--train.n_epochs", "train.n_epochs=<value>"),
    "--dataset_name mnist_28": ("'--dataset_name'", "'--data_name'"),
    "--data_nam mnist_28": ("'--data_nam'", "'--data_name'"),
    "-e10": ("'-e10'", "'-e'"),
    "--exp_path x": ("'--exp_path'", "'--exp_root'"),
    "--epsilon": ("--epsilon/-e", "one argument"),
    "-e 1 --epsilon 10": ("--epsilon",),
    "mnist_28": ("'mnist_28'", "key=value", "a flag"),
    "=3": ("'=3'", "key=value"),
    "train.n_epoch=3": ("'train.n_epoch'", "'train.n_epochs'"),
    "model.networks.ch_multi=[1]": ("'model.networks.ch_multi'", "'model.network.ch_mult'"),
    "network.ch_mult=[1]": ("'network.ch_mult'", "'model.network.ch_mult'"),
    "delta=1e-5": ("'delta'", "'privacy.delta'"),
    "train.zzz=3": ("'train.zzz'", "train.extra, train.lr, train.n_epochs, train.tags"),
    "zzz.y=3": ("'zzz.y'", "eval, gen, model"),
    "model.network=3": ("model.network=3",),
    "train.lr=1 train.lr=2": ("train.lr", "1", "2"),
    "train.accountant=prv privacy.accountant=rdp": ("privacy.accountant",),
    "train.n_epochs=ten": ("train.n_epochs: 'ten'", "int"),
    "train.n_epochs=2.5": ("train.n_epochs: 2.5", "int"),
    "train.n_epochs=true": ("train.n_epochs: True", "int"),
    "train.n_epochs=inf": ("train.n_epochs: inf", "int"),
    "train.n_epochs=null": ("train.n_epochs: None", "int"),
    "train.lr=fast": ("train.lr: 'fast'", "float"),
    "train.tags=x": ("train.tags: 'x'", "str, written [a,b]"),
    "train.tags=[?]": ("train.tags: '[?]'", "str"),
    "train.n_epochs=?": ("train.n_epochs: '?'", "int"),
    "train.n_epochs='3 # or 4'": ("train.n_epochs: '3 # or 4'", "int"),
    "train.n_epochs=": ("train.n_epochs: ''", "int"),
    "setup.omp_n_threads=": ("setup.omp_n_threads: ''", "int", "null"),
    "train.lr=.nan": ("train.lr: nan", "float"),
    "model.network.ch_mult=[1,b]": ("model.network.ch_mult[1]: 'b'", "int"),
    "model.network.ch_mult=[1,2": ("model.network.ch_mult: '[1,2'", "int"),
    "model.attention=1": ("model.attention: 1", "bool"),
    "setup.omp_n_threads=all": ("setup.omp_n_threads: 'all'", "int", "null"),
    "gen.batch_size=\\${train.no}": ("gen.batch_size", "'train.no'"),
    "seed=\\${a": ("seed: '${a'", "int"),
    "--method PrivImge": ("'PrivImge'", "Plain, Toy"),
    "--method Tox": ("'Tox'", "'Toy'"),
    "-dn mnist28": ("'mnist28'", "'mnist_28'"),
    "-dn cats": ("python scripts/prepare_data.py --data_name cats --source <folder>",),
    "-dn ../x sensitive_data.n_classes=2": ("--data_name: '../x'",),
    "sensitive_data.name=mnist_28": ("sensitive_data.name=mnist_28", "--data_name", "null"),
    "public_data.name=imagenett": ("'imagenett'", "'imagenet'"),
    "public_data.name=null public_data.train_path=x": ("public_data.train_path=x",),
    "--epsilon 0": ("--epsilon: 0", "0", "1000", "inf"),
    "--epsilon -1": ("--epsilon: -1",),
    "--epsilon nan": ("--epsilon: nan",),
    "--epsilon ten": ("--epsilon: ten",),
    "privacy.delta=1": ("privacy.delta: 1.0", "null", "in (0, 1)"),
    "privacy.delta=0": ("privacy.delta: 0.0", "null", "in (0, 1)"),
    "privacy.epsilon=3": ("privacy.epsilon=3", "--epsilon 3"),
    "train.dp.epsilon=3": ("train.dp.epsilon=3", "--epsilon 3"),
    "epsilon=3": ("epsilon=3", "--epsilon 3"),
    "method=DPDM": ("method=DPDM", "--method DPDM"),
    "privacy.accountant=rpd": ("privacy.accountant: rpd", "pld, rdp", "prv", "'rdp'"),
    "eval.mode=vall": ("eval.mode: vall", "val, syn", "sen", "'val'"),
    "preset=fast": ("'fast'", "paper, quick"),
    "eval=papr": ("eval", "'papr'", "'paper'"),
    "setup=multigpu": ("setup", "'multigpu'", "'multi_gpu'"),
    "--plugin no_such_module": ("--plugin", "'no_such_module'"),
    "-ed a/b": ("--exp_description: 'a/b'",),
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_bad_input_is_refused_with_key_value_and_suggestion(load, arguments):
    with pytest.raises(UserError) as error:
        load(arguments)
    assert all(part in str(error.value) for part in ERRORS[arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "key", "suggestion"),
    [
        ("DP-MERF", "train.n_epochs", "did you mean 'train.epochs'?"),
        ("DPDM", "train.lr", "did you mean 'train.optim.params.lr'?"),
        ("DPDM", "trian.n_epochs", "did you mean 'train.n_epochs'?"),
        ("DPDM", "train.delta", "did you mean 'privacy.delta'?"),
        ("DPDM", "network.ch_mult", "did you mean 'model.network.ch_mult'?"),
        ("PE", "train.n_epochs", "; known: train."),
        ("DPDM", "lr", "'pretrain.optim.params.lr' or 'pretrain.query.lr' or 'train.optim.params.lr'?"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_key_of_the_same_meaning(method, key, suggestion):
    with pytest.raises(UserError) as error:
        load_config(["--method", method, f"{key}=3"], METHODS)
    assert suggestion in str(error.value)


@pytest.mark.parametrize(
    ("program", "arguments", "parts"),
    [
        ("eval", "eval.metrics=fid,kid", ["eval.metrics: 'fid,kid'", "write eval.metrics=[fid,kid]"]),
        ("run", "eval.classifiers=wrn", ["write eval.classifiers=[wrn]"]),
        ("run", "sensitive_data.class_names=a,b", ["write sensitive_data.class_names=[a,b]"]),
        ("eval", "--metrics [fid,kid]", ["--metrics fid,kid", "eval.metrics=[fid,kid]"]),
        ("eval", "--extractor clip", ["--extractor", "write eval.extractor="]),
        ("eval", "--batch_size 9", ["write eval.batch_size="]),
        ("run", "--metrics fid", ["write eval.metrics=["]),
        ("run", "--delta 1e-5", ["write privacy.delta="]),
        ("run", "--batch_size 9", ["gen.batch_size=", "--print_config"]),
        ("run", "--extraktor clip", ["unknown flag '--extraktor'"]),
        ("eval", "extractor=clip", ["unknown key 'extractor'", "'eval.extractor'"]),
        ("eval", "train.lr=1", ["train.lr=1", "leave it out"]),
    ],
)
def test_settings_that_are_written_wrongly_are_corrected(program, arguments, parts):
    argv = ["--data_name", "digits_8", *arguments.split()]
    with pytest.raises(UserError) as error:
        if program == "eval":
            evaluation_config(["--images", "x.npz", *argv])
        else:
            load_config(argv, METHODS)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_config_dir_must_exist(tmp_path):
    with pytest.raises(UserError, match="--config_dir: 'nowhere'"):
        load_config(["--config_dir", "nowhere"], registry({"Toy": Toy}))


# --- YAML files of users ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            TOY_YAML.replace("ckpt: null", ""),
            ("model.ckpt has no value", "model.ckpt=<value>"),
        ),
        (TOY_YAML.replace("ckpt: null", "ckpt: ???"), ("model.ckpt has no value",)),
        (
            TOY_YAML.replace("n_epochs", "n_epoch"),
            ("'train.n_epoch'", "YAML", "'train.n_epochs'?"),
        ),
        (TOY_YAML + "trian: {lr: 1}\n", ("'trian'", "YAML", "'train'?")),
        (TOY_YAML.replace("1e-3", "'1e-3'"), ("train.lr: '1e-3'", "float")),
        (TOY_YAML.replace("{n_epochs: 10", "{n_epochs: [10"), ("Toy.yaml",)),
        (
            TOY_YAML.replace("num_channels", "channels"),
            ("model.network.channels", "'sensitive_data.channels'"),
        ),
    ],
)
def test_an_error_in_a_method_file_is_reported_in_one_line(load, toy_folder, text, parts):
    write(toy_folder / "method" / "Toy.yaml", text)
    with pytest.raises(UserError) as error:
        load("-e 1")
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_a_method_without_a_config_file_is_refused(load, toy_folder):
    (toy_folder / "method" / "Plain.yaml").unlink()
    with pytest.raises(UserError, match=r"--method: Plain .*method/Plain.yaml"):
        load("-m Plain")


def test_two_files_of_one_name_are_refused(load, toy_folder):
    write(toy_folder / "data" / "MNIST_28.yaml", "name: mnist_28\n")
    with pytest.raises(UserError, match=r"'mnist_28'.*mnist_28.yaml"):
        load("-dn mnist_28")


def test_a_complete_config_dir_replaces_the_shipped_one(tmp_path):
    import shutil

    shutil.copytree(CONFIG_FOLDER, tmp_path / "mine")
    write(tmp_path / "mine" / "method" / "Plain.yaml", PLAIN_YAML)
    text = (CONFIG_FOLDER / "config.yaml").read_text()
    text = text.replace("seed: 0", "seed: 5").replace("preset: null", "preset: quick")
    write(tmp_path / "mine" / "config.yaml", text)
    arguments = ["-m", "Plain", "-dn", "mnist_28", "--config_dir", str(tmp_path / "mine")]
    config = load_config(arguments, registry({"Plain": Plain}))
    assert (config.seed, config.preset, config.eval.recipe) == (5, "quick", "quick")
    assert config.provenance["seed"] == config.provenance["preset"] == "base mine/config.yaml"


def test_a_plugin_adds_its_class_and_its_config_files(tmp_path, monkeypatch):
    write(
        tmp_path / "shelf" / "my_plugin.py",
        "from test_config import Plain, PLUGIN_METHODS\nPLUGIN_METHODS.register('Mine', Plain)\n",
    )
    write(tmp_path / "shelf" / "configs" / "method" / "Mine.yaml", PLAIN_YAML)
    monkeypatch.syspath_prepend(str(tmp_path / "shelf"))
    monkeypatch.setitem(sys.modules, "test_config", sys.modules[__name__])
    config = load_config(["-m", "mine", "--plugin", "my_plugin"], PLUGIN_METHODS)
    assert config.method == "Mine" and config.gen == GenConfig(60, 10, None, 0.7, "relabel")


PLUGIN_METHODS = registry({})


# --- start-up ------------------------------------------------------------------------------------------------------


def test_importing_the_config_system_imports_nothing_heavy():
    program = (
        "import sys; import models, utils.config; from utils.command_line import parser; parser('run').format_help();"
        "print([name for name in ('torch', 'hydra', 'omegaconf', 'numpy', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_composing_imports_no_torch():
    program = (
        "import sys; from dataclasses import make_dataclass; from models.public.config import PublicDataConfig;"
        "from utils.config import MethodRegistry, load_config; from utils.sections import GenConfig;"
        "kind = type('Noise', (), {'Config': make_dataclass('Config', [('gen', GenConfig)], frozen=True)});"
        "methods = MethodRegistry({'Noise': kind}, {'public_data': PublicDataConfig});"
        "load_config(['-m', 'noise'], methods); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("program", ["run", "eval", "test_classifier"])
def test_help_names_every_flag(program, capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"], registry({}), program)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text == parser(program).format_help()
    assert all(flag in text for flag in ("--method", "--epsilon", "--plugin", "key=value"))
    assert ("--exp_path" in text) == (program == "eval") and ("--resume_exp" in text) == (program == "run")
