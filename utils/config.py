"""Turn a command line into a typed, frozen configuration that records the layer that set each value.

There are five layers; a later one overrides an earlier one:
  1. base          configs/config.yaml and one file per group (data, public_data, eval, setup, method)
  2. derived       interpolations in these files, such as ${sensitive_data.resolution}
  3. preset        rules of configs/presets/<Method>.yaml that match the dataset and the tuned epsilon
  4. past run      the values of a run that is resumed, or whose samples are evaluated again
  5. command line  flags and key=value
The composed values are then checked against the classes of utils/sections.py and the method's own `Config`.
Nothing heavy is imported before a config is loaded, so that `run.py --help` is fast.
"""

import argparse
import copy
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterable
from pathlib import Path

from utils.command_line import CommandLine, parse_epsilon, parse_value, read_command_line
from utils.config_files import (
    CONFIG_FOLDER,
    ConfigFiles,
    compose,
    config_folders,
    flatten,
    readable_errors,
    written_values,
)
from utils.errors import UserError, unknown
from utils.places import data_root, path_of, weights_root
from utils.presets import PRESETS, Rule, load_presets, nearest_tier
from utils.registry import Registry
from utils.sections import (
    SHARED_SECTIONS,
    EvalConfig,
    GenConfig,
    PrivacyConfig,
    PublicSetConfig,
    SensitiveDataConfig,
    SetupConfig,
    check,
)
from utils.typed import build, changeable_keys, leaf_types, unknown_key

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

RUN_KEYS = {"seed": int, "preset": str}  # the values of config.yaml that belong to no section
FILE_CHOICES = ("eval", "setup")  # groups whose file is chosen as group=name on the command line

OWN_IMAGES = "custom"  # data/custom.yaml and public_data/custom.yaml describe the user's own images
EVERY_METHOD = (
    "_every_method"  # presets/_every_method.yaml: rules for all methods, before the method's own ones
)
COMMAND_LINE = "command line"
PAST_RUN = "past run"
FLAG_KEYS = {"method": "method", "data_name": "data_name", "epsilon": "privacy.epsilon"}  # flag -> key
# Fact (utils/presets.py) -> its key in sensitive_data
DESCRIBED = {"N": "num_train", "resolution": "resolution", "channels": "num_channels", "classes": "n_classes"}
CLASS_DEFAULT = "default of the class"  # the layer of a value that no file and no flag sets
LONGEST_VALUE = 30  # characters of the column of values in --print_config


class MethodRegistry(Registry):
    """The methods by name, and `sections`: those of every run, of which the package of the methods may extend some."""

    def __init__(
        self,
        entries: dict[str, object],
        extended: dict[str, type] | None = None,
        aliases: dict[str, str] | None = None,
    ) -> None:
        """`extended`: section -> its type, a subclass of the one in utils/sections.py."""
        super().__init__("method", entries, aliases)
        self.sections: dict[str, type] = SHARED_SECTIONS | (extended or {})

    @functools.cached_property
    def shared_types(self) -> dict[str, object]:
        """Dotted key -> annotation of every single value that does not depend on the method."""
        return {**RUN_KEYS, **leaf_types(self.sections)}


@dataclasses.dataclass(frozen=True)
class Config:
    method: str  # its registered spelling
    data_name: str
    epsilon: float  # inf: non-private
    seed: int
    preset: str  # quick or paper
    preset_tier: int | None  # the tuned epsilon whose rules apply; None: the method has no preset table
    borrowed: bool  # True: preset_tier is not the requested epsilon
    description: str
    resume: str | None  # folder of the run to continue
    exp_path: Path | None  # eval.py only: the run to evaluate
    images: Path | None  # eval.py only: the images to evaluate
    out: Path | None  # eval.py only: folder of the results of `images`
    list_parts: bool  # eval.py only: list metrics, extractors and classifiers
    dry_run: bool
    print_config: bool
    data_root: Path
    exp_root: Path
    weights_root: Path
    sensitive_data: SensitiveDataConfig
    public_data: PublicSetConfig
    privacy: PrivacyConfig
    eval: EvalConfig
    setup: SetupConfig
    gen: GenConfig
    method_config: object  # instance of the method class's Config
    changeable: tuple[str, ...]  # keys of the method that may have another value when the run is resumed
    provenance: dict[str, str]  # dotted key -> layer that set it
    snapshot: dict  # all values as plain containers; a run writes them to its config.yaml
    notes: tuple[str, ...]  # lines for the program to print
    words: tuple[str, ...] = dataclasses.field(compare=False)  # the command line


@dataclasses.dataclass(frozen=True)
class _Schema:
    """The sections that a run can set: the shared ones, and those of the method's Config."""

    shared: dict[str, type]
    method_type: type

    @functools.cached_property
    def own(self) -> dict[str, type]:
        return typing.get_type_hints(self.method_type)

    @functools.cached_property
    def sections(self) -> dict[str, type]:
        return {**self.shared, **self.own}

    @functools.cached_property
    def types(self) -> dict[str, object]:
        """Dotted key -> annotation of every single value."""
        return {**RUN_KEYS, **leaf_types(self.sections)}


Layered = tuple[str, object, str]  # dotted key, value, the layer that sets it


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The files and rules of a run."""

    data_name: str
    epsilon: float
    preset: str
    tier: int
    has_table: bool  # the method has a preset table
    rules: list[Rule]  # the matching ones, in the order in which they apply
    public_name: str | None
    files: dict[str, Path]  # group -> chosen file
    sizes: list[Layered]  # of the user's own images, if they are prepared

    @property
    def borrowed(self) -> bool:
        return self.has_table and self.epsilon != self.tier

    def notes(self, layers: Iterable[str]) -> tuple[str, ...]:
        """`layers` set the values of the run. A rule whose values are all overridden prints no note."""
        lines, effective = [], set(layers)
        if self.borrowed:
            lines.append(
                f"epsilon {self.epsilon:g}: there is no tuned setting; using that of epsilon {self.tier}"
            )
        if self.preset == "quick":
            lines.append("preset quick: sizes are scaled down; use preset=paper for the published setting")
        lines += [rule.note for rule in self.rules if rule.note is not None and rule.layer in effective]
        return tuple(lines)


def load_config(argv: list[str], methods: MethodRegistry, program: str = "run") -> Config:
    """Compose the configuration of `argv` (without the program's name); writes and prints nothing.

    Imports the plugins that `argv` names. Raises UserError for every mistake that the user can correct.
    """
    return compose_config(read_command_line(argv, program), methods)


def compose_config(
    command_line: CommandLine, methods: MethodRegistry, base: dict[str, object] | None = None
) -> Config:
    """Compose the configuration of a command line that has been read.

    `base` holds the values of a past run by dotted key, as in its config.yaml, or some of them. Its method, data_name
    and privacy.epsilon replace the defaults of the flags. Raises UserError for whatever the user can repair.
    """
    flags, settings, given, arguments = command_line
    flags, settings, base = copy.copy(flags), dict(settings), dict(base or {})
    flag_layers = {flag: COMMAND_LINE if flag in given else f"default of --{flag}" for flag in FLAG_KEYS}
    for flag, key in FLAG_KEYS.items():
        if key in base and flag not in given:
            setattr(flags, flag, str(base[key]))
            flag_layers[flag] = PAST_RUN
        base.pop(key, None)
    files = ConfigFiles(config_folders(flags))
    method = methods.canonical(flags.method)
    choices = {group: settings.pop(group) for group in FILE_CHOICES if group in settings}
    # First what needs no import of the method, which takes seconds.
    shared = {key: text for key, text in settings.items() if key in methods.shared_types}
    early = base | _parse_settings(shared, methods.shared_types)
    cell = _choose_cell(files, method, flags, choices, early)
    parts = files.parts(cell.files)
    written = written_values(parts)  # before Hydra composes them: the reader refuses what Hydra would misread
    if cell.files["method"].is_relative_to(CONFIG_FOLDER):  # these files hold every setting
        _require_known(settings, {*methods.shared_types, *(key for key, _, _ in written)})
    schema = _Schema(methods.sections, methods.resolve(method).Config)
    for key in base:
        if key not in schema.types:
            raise unknown_key(key, schema.types, PAST_RUN)
    command = _parse_settings(settings, schema.types)
    layers = _value_layers(files, cell, schema, flag_layers["epsilon"])
    layers += [(key, value, PAST_RUN) for key, value in base.items()]
    if "public_data.name" in command:  # with the spelling of its file
        command = {**command, "public_data.name": cell.public_name}
    layers += [(key, value, COMMAND_LINE) for key, value in command.items()]
    typed = _typed_values(compose(parts), schema, layers)
    check(typed["seed"] >= 0, "seed", typed["seed"], "0 or more")
    plain = {name: _plain(value) for name, value in typed.items()}
    snapshot = {"method": method, "data_name": cell.data_name, **plain}
    provenance = _provenance(snapshot, [*written, *layers])
    return Config(
        method=method,
        data_name=cell.data_name,
        epsilon=cell.epsilon,
        preset_tier=cell.tier if cell.has_table else None,
        borrowed=cell.borrowed,
        **_run_options(flags),
        **{name: typed[name] for name in (*RUN_KEYS, *SHARED_SECTIONS)},
        method_config=schema.method_type(**{name: typed[name] for name in schema.own}),
        changeable=tuple(changeable_keys(schema.own)),
        provenance={
            **provenance,
            **{flag: flag_layers[flag] for flag in ("method", "data_name")},
        },
        snapshot=snapshot,
        notes=(*_alias_note(flags.method, method), *cell.notes(provenance.values())),
        words=arguments,
    )


def _alias_note(given: str, method: str) -> tuple[str, ...]:
    """A line if --method is another name of the method: its folders and keys are those of `method`."""
    is_alias = given.casefold() != method.casefold()
    return (f"--method {given}: its name here is {method}",) if is_alias else ()


def format_config(config: Config) -> str:
    """A table of key, value and the layer that set it, section by section. If a value is too long for its column, the
    layer is on the next line."""
    rows = [
        (key, _as_yaml(value), config.provenance[key])
        for key, value in sorted(flatten(config.snapshot).items(), key=lambda item: ("." in item[0], item[0]))
    ]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows if len(value) <= LONGEST_VALUE)
    lines, section = [], ""
    for key, value, layer in rows:
        if "." in key and key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append("")
        if len(value) > value_width:
            lines.append(f"{key:<{key_width}}  {value}")
            key, value = "", ""
        lines.append(f"{key:<{key_width}}  {value:<{value_width}}  {layer}")
    return "\n".join(lines)


def _run_options(flags: argparse.Namespace) -> dict[str, object]:
    """The fields of Config that come directly from flags."""
    description = flags.exp_description
    if re.search(r"[/\\\n]", description):
        raise UserError(
            f"--exp_description: '{description}' is not allowed; it becomes part of a folder's name"
        )
    places = {  # flags of eval.py
        name: path_of(given, f"--{name}") if (given := getattr(flags, name, None)) else None
        for name in ("exp_path", "images", "out")
    }
    return {
        "description": description,
        "resume": getattr(flags, "resume_exp", None),  # a flag of run.py
        **places,
        "list_parts": getattr(flags, "list", False),
        "dry_run": flags.dry_run,
        "print_config": flags.print_config,
        "data_root": data_root(flags.data_root),
        "exp_root": path_of(flags.exp_root, "--exp_root"),
        "weights_root": weights_root(flags.weights_root),
    }


def _parse_settings(settings: dict[str, str], types: dict[str, object]) -> dict[str, object]:
    """The values of the command line, parsed by the type of their key. Raises UserError for an unknown key."""
    for key in settings:
        if key not in types:
            if any(known.startswith(key + ".") for known in types):
                raise UserError(f"{key}={settings[key]}: this is a section, set one of its keys")
            raise unknown_key(key, types)
    values = {key: parse_value(text, types[key], key) for key, text in settings.items()}
    for key, value in values.items():
        interpolated = isinstance(value, str) and re.search(r"\$\{.*\}", value)
        if not interpolated:  # the type of an interpolation is known only after composing
            build(types[key], value, key)
    return values


def _require_known(keys: Iterable[str], known: set[str]) -> None:
    """Raise UserError for a key that is not among `known`, nor a section of them, nor in a section that is null."""
    for key in keys:
        parents = [key[:end] for end, letter in enumerate(key) if letter == "."]
        is_section = any(name.startswith(f"{key}.") for name in known)
        if key not in known and not is_section and known.isdisjoint(parents):
            raise unknown_key(key, known)


def _choose_cell(
    files: ConfigFiles,
    method: str,
    flags: argparse.Namespace,
    choices: dict[str, str],
    command: dict[str, object],
) -> _Cell:
    epsilon = parse_epsilon(flags.epsilon)
    data_name, data_file = _choose_data(files, flags, command)
    table_path = files.find("presets", method)
    tables = [load_presets(files.find("presets", EVERY_METHOD)), load_presets(table_path)]
    by_default = "quick" if data_name in tables[0].quick_by_default else "paper"
    preset = command.get("preset") or files.main().get("preset") or by_default
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    tier = nearest_tier(epsilon)
    chosen = {
        "data": data_file,
        "public_data": files.require("public_data", "none"),  # until the other files have named one
        "eval": files.require("eval", choices.get("eval", preset)),
        "setup": files.require("setup", choices.get("setup", files.default("setup"))),
        "method": files.require("method", method),
    }
    written = {key: value for key, value, _ in written_values(files.parts(chosen))}
    facts, sizes = None, []
    if data_file.stem == OWN_IMAGES:
        facts, sizes = _facts_of_own_images(data_name, written, data_root(flags.data_root), command)
    # A file chosen on the command line (eval=none) belongs to that layer: no rule changes its section.
    rules = [
        rule.without(choices).evaluated(facts)
        for table in tables
        for rule in table.chosen(preset)
        if rule.matches(data_name, tier, facts)
    ]
    public_name, chosen["public_data"] = _choose_public_data(files, written, rules, command)
    return _Cell(data_name, epsilon, preset, tier, table_path is not None, rules, public_name, chosen, sizes)


def _choose_data(
    files: ConfigFiles, flags: argparse.Namespace, command: dict[str, object]
) -> tuple[str, Path]:
    """The dataset's name and YAML file. A name without a file means the user's own images, which must be prepared or
    described."""
    found = files.find("data", flags.data_name)
    if found is not None and found.stem != OWN_IMAGES:
        name, chosen = found.stem, found
    else:
        name, chosen = flags.data_name, files.require("data", OWN_IMAGES)
        _check_own_data(files, name, data_root(flags.data_root), command)
    if command.get("sensitive_data.name") not in (None, name):
        raise UserError(
            f"sensitive_data.name={command['sensitive_data.name']}: choose it with --data_name, or null"
        )
    return name, chosen


def _check_own_data(files: ConfigFiles, name: str, root: Path, command: dict[str, object]) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"--data_name: '{name}' is not allowed; it must be made of letters, digits, '_', '-' and '.'"
        )
    described = any(command.get(f"sensitive_data.{key}") is not None for key in ("n_classes", "path"))
    if not described and not (root / name).is_dir():
        hint = f"to use your own images: python scripts/prepare_data.py --data_name {name} --source <folder>"
        known = {*files.names("data"), *_prepared_sets(root)} - {OWN_IMAGES}
        raise UserError(f"{unknown('dataset', name, known)}; {hint}")


def _prepared_sets(root: Path) -> set[str]:
    """Names of the datasets that scripts/prepare_data.py has written to `root`."""
    return {meta.parent.name for meta in root.glob("[!.]*/meta.json")}


def _choose_public_data(
    files: ConfigFiles, written: dict[str, object], rules: list[Rule], command: dict[str, object]
) -> tuple[str | None, Path]:
    """The public set that the latest layer names, and its YAML file: `custom` for a folder given as train_path.

    `written` holds the values of the YAML files, with public_data=none.
    """
    layers = [written, *(rule.values for rule in rules), command]
    early = {key: value for layer in layers for key, value in layer.items()}
    name, folder = early.get("public_data.name"), early.get("public_data.train_path")
    if name is None or name.casefold() == "none":
        if command.get("public_data.train_path") is not None:
            raise UserError(f"public_data.train_path={folder} needs a name: give public_data.name=<name> too")
        return None, files.require("public_data", "none")
    found = files.find("public_data", name)
    if found is None and folder is None:
        error = unknown("public set", name, files.names("public_data"))
        raise UserError(f"{error}; for a folder of your own give public_data.train_path=<folder> too")
    return (found.stem, found) if found else (name, files.require("public_data", OWN_IMAGES))


def _value_layers(files: ConfigFiles, cell: _Cell, schema: _Schema, epsilon_layer: str) -> list[Layered]:
    """Everything that overrides the YAML files, below past run and command line, in the order in which it applies."""
    result = [(key, value, rule.layer) for rule in cell.rules for key, value in rule.values.items()]
    for key, _, layer in result:
        if key not in schema.types:
            raise unknown_key(key, schema.types, layer)
    if files.main().get("preset") is None:
        result.append(("preset", cell.preset, f"default for {cell.data_name}"))
    result.append(("privacy.epsilon", cell.epsilon, epsilon_layer))
    if cell.files["data"].stem == OWN_IMAGES:
        result += [("sensitive_data.name", cell.data_name, COMMAND_LINE), *cell.sizes]
    return result


def _written_facts(meta: Path) -> dict[str, int]:
    """Fact (utils/presets.py) -> its value in meta.json."""
    try:
        written = json.loads(meta.read_text(encoding="utf-8"))
        return {
            "N": int(written["num_train"]),
            "resolution": int(written["resolution"]),
            "channels": int(written["channels"]),
            "classes": len(written["class_names"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{meta}: not the description of prepared data ({error!r}); prepare it again"
        ) from error


def _facts_of_own_images(
    data_name: str, written: dict[str, object], root: Path, command: dict[str, object]
) -> tuple[dict[str, int] | None, list[Layered]]:
    """The public facts that preset rules for the user's own images may depend on, and the sizes of prepared images, so
    that the user need not repeat them. The facts are None for images that are neither prepared nor fully described,
    which no run accepts. `written` holds the values of the YAML files."""
    meta = Path(command.get("sensitive_data.path") or root / data_name) / "meta.json"
    facts = _written_facts(meta) if meta.is_file() else {}
    sizes = [
        (f"sensitive_data.{DESCRIBED[fact]}", facts[fact], f"prepared data {meta}")
        for fact in ("resolution", "channels")
        if fact in facts
    ]
    for fact, key in DESCRIBED.items():
        value = command.get(f"sensitive_data.{key}", facts.get(fact, written.get(f"sensitive_data.{key}")))
        if not isinstance(value, int) or value < 1:
            return None, sizes
        facts[fact] = value
    num_public = command.get("sensitive_data.num_public", written.get("sensitive_data.num_public"))
    facts["num_public"] = num_public if isinstance(num_public, int) else 0  # anything else is refused later
    facts["N"] = max(1, facts["N"] - facts["num_public"])
    return facts, sizes


def _typed_values(composed: "DictConfig", schema: _Schema, layers: list[Layered]) -> dict[str, object]:
    """Section (or run key) -> typed value, from the composed YAML files with `layers` on top."""
    from omegaconf import OmegaConf

    with readable_errors():
        for key, value, _ in layers:
            OmegaConf.update(composed, key, value, merge=False)
        values = OmegaConf.to_container(composed, resolve=True)
    kinds = {**RUN_KEYS, **schema.sections}
    for name in values:
        if name not in kinds:
            raise unknown_key(name, kinds, "the YAML files")
    return {name: build(kind, values.get(name, {}), name) for name, kind in kinds.items()}


def _provenance(snapshot: dict, layers: list[Layered]) -> dict[str, str]:
    """Dotted key -> the last layer that set it, for every value of the snapshot."""
    latest = {
        leaf: layer
        for key, value, layer in layers
        for leaf in (flatten(value, key) if isinstance(value, dict) else [key])
    }
    return {key: latest.get(key, CLASS_DEFAULT) for key in flatten(snapshot)}


def _plain(value: object) -> object:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _as_yaml(value: object) -> str:
    """A value in the syntax of the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return str(value)
