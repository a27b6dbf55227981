"""The YAML files of a configuration: where they are found, and how Hydra composes them."""

import argparse
import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, unknown
from utils.places import path_of
from utils.yaml_numbers import ADVICE, misread_numbers

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"

# Group of YAML files -> the package that its file fills, in the order in which config.yaml lists them. Method files
# come last and fill the whole config, so a method may set what it needs in public_data.
GROUPS = {
    "data": "sensitive_data",
    "public_data": "public_data",
    "eval": "eval",
    "setup": "setup",
    "method": "_global_",
}


def config_folders(flags: argparse.Namespace) -> list[Path]:
    """Where YAML files are looked for: the main folder, then what --config_dir and the plugins add.

    Imports the plugins. A --config_dir with a config.yaml of its own takes the place of configs/.
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
    """Import the plugin, which registers its methods; returns the configs folder beside it, which need not exist."""
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
        """What can be chosen in a group; files whose name starts with "_" are parts of others."""
        found = {path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")}
        return sorted(name for name in found if not name.startswith("_"))

    def find(self, group: str, name: str) -> Path | None:
        """The file <group>/<name>.yaml, without regard to case; two of them are an error that shows both."""
        paths = [path for folder in self.folders for path in sorted((folder / group).glob("*.yaml"))]
        found = [path for path in paths if path.stem.casefold() == name.casefold()]
        if len(found) > 1:
            raise UserError(f"{group} '{name}' has two files: {found[0]} and {found[1]}; rename one")
        return found[0] if found else None

    def require(self, group: str, name: str) -> Path:
        found = self.find(group, name)
        if found is None and group == "method":  # a registered one
            places = " or ".join(str(folder / group / f"{name}.yaml") for folder in self.folders)
            raise UserError(f"--method: {name} has no file of settings; write {places}")
        if found is None:
            raise unknown(f"configs/{group} file", name, self.names(group))
        return found

    def default(self, group: str) -> str:
        """The choice that the defaults list of config.yaml makes for a group."""
        entries = [entry for entry in self.main().get("defaults", []) if isinstance(entry, dict)]
        choices = {key.partition("@")[0]: name for entry in entries for key, name in entry.items()}
        if group not in choices:
            raise UserError(f"{self.folders[0] / 'config.yaml'}: the defaults list does not name '{group}'")
        return choices[group]

    def compose(self, files: dict[str, Path]):
        """config.yaml with the chosen file of every group, as an OmegaConf container; interpolations stay open."""
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf

        overrides = [f"{_package_key(group)}={_quoted(files[group].stem)}" for group in GROUPS]
        if len(self.folders) > 1:
            added = ",".join(_quoted(f"file://{folder}") for folder in self.folders[1:])
            overrides.append(f"hydra.searchpath=[{added}]")
        with readable_errors(), initialize_config_dir(str(self.folders[0]), version_base="1.3"):
            config = compose("config", overrides)
        OmegaConf.set_struct(config, False)
        return config

    def written_values(self, files: dict[str, Path]) -> list[tuple[str, object, str]]:
        """(dotted key, value as written, layer) of every value in the chosen files, in the order of merging."""
        result = file_values(self.folders[0] / "config.yaml", "")
        for group, package in GROUPS.items():
            result += file_values(files[group], "" if package == "_global_" else package)
        return result


def _package_key(group: str) -> str:
    return group if GROUPS[group] == group else f"{group}@{GROUPS[group]}"


def _quoted(text: str) -> str:
    """`text` as a literal of Hydra's override grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def file_values(path: Path, section: str) -> list[tuple[str, object, str]]:
    """Of a file, after those of the files beside it that its defaults list includes."""
    content = read_yaml(path)
    included = [
        entry for entry in content.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"
    ]
    before = [value for entry in included for value in file_values(path.with_name(f"{entry}.yaml"), section)]
    name = path.relative_to(path.parents[1 if path.name == "config.yaml" else 2]).as_posix()
    return before + [(key, value, _layer(value, name)) for key, value in flatten(content, section).items()]


def _layer(value: object, file_name: str) -> str:
    derived = isinstance(value, str) and "${" in value
    return f"derived {value} {file_name}" if derived else f"base {file_name}"


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and the YAML reader raise into a UserError of one line."""
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
    """A YAML file as plain containers, by OmegaConf's reader (plain YAML reads 1e-3 as text)."""
    return copy.deepcopy(_read_yaml(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1024)
def _read_yaml(path: Path, changed: int) -> dict:
    """The reader is slow, and composing one configuration reads some files several times."""
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
    """Nested dictionaries as one of dotted keys; a list is a value, an empty dictionary is nothing."""
    result = {}
    for name, value in content.items():
        key = f"{section}.{name}" if section else str(name)
        result.update(flatten(value, key) if isinstance(value, dict) else {key: value})
    return result
