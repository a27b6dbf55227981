"""Where the images of a run lie: the folder of the private set, and the prepared folders of the public set."""

from pathlib import Path

from data.prepared import is_prepared
from data.registry import EMBEDDED_SENSITIVE
from utils.sections import PublicSetConfig, SensitiveDataConfig

IN_DISTRIBUTION = "in_distribution"  # public_data.name of the private records that are declared public


def is_embedded(section: SensitiveDataConfig) -> bool:
    """True for a sensitive set that comes with the toolkit."""
    return section.path is None and section.name is not None and section.name in EMBEDDED_SENSITIVE


def sensitive_folder(section: SensitiveDataConfig, data_root: Path) -> Path:
    """The folder of the prepared private set, which need not exist."""
    return Path(section.path) if section.path is not None else data_root / str(section.name)


def has_public_images(section: PublicSetConfig) -> bool:
    """False without public data, and for central_*, whose images the method makes from private queries."""
    return section.name is not None and not section.name.startswith("central_")


def is_in_distribution(section: PublicSetConfig) -> bool:
    """True if the public images are those records of the private set that sensitive_data.num_public declares public."""
    return section.name == IN_DISTRIBUTION


def public_folders(section: PublicSetConfig, data_root: Path) -> list[Path]:
    """Prepared folders of the public set: train_path, or <data_root>/<name> and <name>_<resolution>."""
    if section.train_path is not None:
        candidates = [Path(section.train_path)]
    else:
        candidates = [data_root / section.name, *sorted(data_root.glob(f"{section.name}_*"))]
        candidates = [path for path in candidates if _is_size_variant(path.name, section.name)]
    return [path for path in candidates if is_prepared(path)]


def _is_size_variant(folder_name: str, name: str) -> bool:
    return folder_name == name or folder_name.removeprefix(f"{name}_").isdecimal()
