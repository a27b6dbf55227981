"""Keep public data apart from private images, and from what a run made of private images."""

from pathlib import Path

from data.locations import (
    has_public_images,
    is_embedded,
    is_in_distribution,
    public_folders,
    sensitive_folder,
)
from data.prepared import is_prepared, read_meta
from utils.artefacts import CONFIG, PRIVACY
from utils.config_files import flatten, read_yaml
from utils.errors import UserError
from utils.sections import PublicSetConfig, SensitiveDataConfig


def require_apart(public: PublicSetConfig, section: SensitiveDataConfig, data_root: Path) -> None:
    """Raise UserError if the public data are the private images, or the output of a run on private images.

    Output of a run is not public, because the ledger would not include the privacy cost of that run. Records of the
    private set that are declared public are no breach: they left it, and come from no folder of their own.
    """
    if not has_public_images(public) or (is_in_distribution(public) and public.train_path is None):
        return
    named = public.train_path is None
    if not is_embedded(section):
        key = "name" if named else "train_path"
        private = sensitive_folder(section, data_root)
        for path in public_folders(public, data_root) if named else [Path(public.train_path)]:
            _require_no_overlap(path, private, f"public_data.{key}")
    if not named:
        require_not_from_run(Path(public.train_path), "public_data.train_path")


def require_not_from_run(path: Path, key: str) -> None:
    """Raise UserError, which names `key`, if `path` is given as public data and lies in the folder of a private run."""
    for folder in (path.resolve(), *path.resolve().parents):
        if training_set_of(folder) is not None or (folder / PRIVACY).exists():
            raise UserError(
                f"{key}: {path.resolve()} was made from private images by a run, whose privacy cost would not be "
                f"counted; if those were other images, copy it out of the folder of the run"
            )


def training_set_of(folder: Path) -> object:
    """The name of the sensitive set that the run in `folder` trained on; None for any other folder.

    UserError if its config.yaml is not YAML.
    """
    # A config.yaml may belong to another program and have any form.
    content = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return flatten(content).get("sensitive_data.name") if isinstance(content, dict) else None


def _require_no_overlap(public: Path, private: Path, key: str) -> None:
    """Compare paths only: whether two sets share an image would be a query of the private images without noise."""
    pairs = (public, private), (_origin(public), private), (_origin(public), _origin(private))
    if any(_overlap(*pair) for pair in pairs):
        raise UserError(f"{key}: {public} holds the private images; give a public set")


def _origin(path: Path) -> Path:
    """The source of a prepared folder; any other folder itself."""
    return Path(read_meta(path).source) if is_prepared(path) else path


def _overlap(one: Path, other: Path) -> bool:
    """True if one path lies in the other."""
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
