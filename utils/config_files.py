"""Find the YAML files of a configuration and compose them by Hydra's defaults list."""

import argparse
import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, unknown
from utils.places import path_of
from utils.yaml_numbers import ADVICE, misread_numbers

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
REPLACEABLE = "presets"  # the one group in which a file of an added folder replaces a file of the same name


def config_folders(flags: argparse.Namespace) -> list[Path]:
    """The folders of YAML files: the main folder, then those that --config_dir and the plugins add.

    Imports the plugins. A --config_dir with its own config.yaml replaces configs/.
    """
    main, added = CONFIG_FOLDER, []
    if flags.config_dir is not None:
        folder = path_of(flags.config_dir, "--config_dir").resolve()
        if not folder.is_dir():
            raise UserError(f"--config_dir: '{flags.config_dir}' is not a folder")
        if (folder / "config.yaml").is_file():
            main = folder
        elif folder != CONFIG_FOLDER:
            added.append(folder)
    plugin_folders = [_plugin_folder(name) for name in flags.plugin]
    return [main, *dict.fromkeys(added + [folder for folder in plugin_folders if folder.is_dir()])]


def _plugin_folder(name: str) -> Path:
    """Import the plugin, which registers its methods; returns the configs folder next to it, which need not exist."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--plugin: cannot import '{name}': {error}; give a module's name, as in `import my_package.my_module`, "
            f"which Python finds from here or by PYTHONPATH"
        ) from error
    if module.__file__ is None:
        raise UserError(f"--plugin: '{name}' is a folder without __init__.py, so it registers nothing")
    return Path(module.__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class ConfigFiles:
    folders: list[Path]  # the first one holds config.yaml

    def main(self) -> dict:
        """The content of config.yaml."""
        return read_yaml(self.folders[0] / "config.yaml")

    def names(self, group: str) -> list[str]:
        """The choices of a group; files whose name starts with "_" are included by others and cannot be chosen."""
        found = {path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")}
        return sorted(name for name in found if not name.startswith("_"))

    def find(self, group: str, name: str) -> Path | None:
        """The file <group>/<name>.yaml, ignoring case; None if there is none. Two such files raise UserError.

        Presets are no Hydra group: a file of --config_dir or of a plugin replaces the toolkit's table.
        """
        by_folder = [
            [
                path
                for path in sorted((folder / group).glob("*.yaml"))
                if path.stem.casefold() == name.casefold()
            ]
            for folder in self.folders
        ]
        if group == REPLACEABLE:
            by_folder = [own for own in by_folder[1:] if own] or by_folder[:1]
        found = [path for paths in by_folder for path in paths]
        if len(found) > 1:
            raise UserError(f"{group} '{name}' has two files: {found[0]} and {found[1]}; rename one")
        return found[0] if found else None

    def require(self, group: str, name: str) -> Path:
        found = self.find(group, name)
        if found is None and group == "method":  # a registered one
            places = " or ".join(str(folder / group / f"{name}.yaml") for folder in self.folders)
            raise UserError(f"--method: {name} has no config file; create {places}")
        if found is None:
            raise unknown(f"configs/{group} file", name, self.names(group))
        return found

    def choices(self) -> dict[str, str]:
        """The defaults list of config.yaml: group, with its package if it has one (data@sensitive_data) -> file."""
        entries = [entry for entry in self.main().get("defaults", []) if isinstance(entry, dict)]
        return {key: name for entry in entries for key, name in entry.items()}

    def default(self, group: str) -> str:
        """The choice of the defaults list of config.yaml for a group."""
        by_group = {key.partition("@")[0]: name for key, name in self.choices().items()}
        if group not in by_group:
            raise UserError(f"{self.folders[0] / 'config.yaml'}: the defaults list does not name '{group}'")
        return by_group[group]

    def parts(self, chosen: dict[str, Path]) -> list["Part"]:
        """config.yaml, the chosen file of every group, and the files that these include, in the order of merging."""
        names = {group: path.stem for group, path in chosen.items()}
        overrides = [f"{key}={_quoted(names[key.partition('@')[0]])}" for key in self.choices()]
        if len(self.folders) > 1:
            added = ",".join(_quoted(f"file://{folder}") for folder in self.folders[1:])
            overrides.append(f"hydra.searchpath=[{added}]")
        files = sorted(path for folder in self.folders for path in folder.glob("**/*.yaml"))
        changed = tuple((path, path.stat().st_mtime_ns) for path in files)
        return [
            Part(self._locate(name), package)
            for name, package in _defaults_list(self.folders[0], tuple(overrides), changed)
        ]

    def _locate(self, name: str) -> Path:
        """The file behind an entry of the defaults list: the first one along the search path, as for Hydra."""
        name = name if name.endswith(".yaml") else f"{name}.yaml"
        return next(folder / name for folder in self.folders if (folder / name).is_file())


@dataclass(frozen=True)
class Part:
    """One file of a composition."""

    path: Path
    package: str  # the section that it fills; "": the whole configuration

    def content(self) -> dict:
        """The values of the file, below their section."""
        content = read_yaml(self.path)
        content.pop("defaults", None)
        for section in reversed(self.package.split(".") if self.package else []):
            content = {section: content}
        return content

    def layer(self, value: object) -> str:
        """How provenance names this file as the source of `value`."""
        name = self.path.relative_to(
            self.path.parents[1 if self.path.name == "config.yaml" else 2]
        ).as_posix()
        derived = isinstance(value, str) and "${" in value
        return f"derived {value} {name}" if derived else f"base {name}"


def written_values(parts: list[Part]) -> list[tuple[str, object, str]]:
    """(dotted key, value as written, layer) of every value in these files, in the order of merging."""
    return [
        (key, value, part.layer(value)) for part in parts for key, value in flatten(part.content()).items()
    ]


def compose(parts: list[Part]) -> "DictConfig":
    """These files merged to one OmegaConf container; interpolations stay open."""
    from omegaconf import OmegaConf

    with readable_errors():
        return OmegaConf.merge(*(OmegaConf.create(part.content()) for part in parts))


@functools.lru_cache(maxsize=1024)
def _defaults_list(folder: Path, overrides: tuple[str, ...], changed: tuple) -> list[tuple[str, str]]:
    """(file name in the folder of configs without ending, package) of each file, from Hydra's own defaults list.

    Hydra takes 0.1 s for it. `changed` holds the modification times of all files, so that the cache is never stale.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with readable_errors(), initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        entries = loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults
    return [
        (entry.config_path, entry.package or "")
        for entry in entries
        if entry.config_path is not None and not entry.config_path.startswith("hydra/")
    ]


def _quoted(text: str) -> str:
    """`text` as a literal of Hydra's override grammar."""
    return "'" + text.replace("'", "\\'") + "'"


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn an error of Hydra, OmegaConf or the YAML reader into a UserError of one line."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"{error.full_key}: {message}" if error.full_key else message) from error
    except (HydraException, yaml.YAMLError) as error:
        raise UserError(" ".join(str(error).split())) from error


def read_yaml(path: Path) -> dict:
    """A YAML file as plain containers, by OmegaConf's reader because plain YAML reads 1e-3 as text."""
    return copy.deepcopy(_read_yaml(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1024)
def _read_yaml(path: Path, changed: int) -> dict:
    """Cached: the reader is slow, and composing reads some files several times. `changed` is the modification time."""
    from omegaconf import OmegaConf

    with readable_errors():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error})") from error
        for line, number in misread_numbers(text):
            raise UserError(f"{path}, line {line}: YAML reads {number} as another number; {ADVICE}")
        return OmegaConf.to_container(OmegaConf.load(path)) or {}


def flatten(content: dict, section: str = "") -> dict[str, object]:
    """Nested dictionaries as one dictionary of dotted keys. A list is a value; an empty dictionary has no keys."""
    result = {}
    for name, value in content.items():
        key = f"{section}.{name}" if section else str(name)
        result.update(flatten(value, key) if isinstance(value, dict) else {key: value})
    return result
