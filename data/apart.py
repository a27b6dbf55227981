"""Keep public data apart from what a run made of private images."""

from pathlib import Path

from utils.artefacts import CONFIG, PRIVACY
from utils.config_files import flatten, read_yaml
from utils.errors import UserError


def require_no_run(path: Path, key: str) -> None:
    """Raise UserError, which names `key`, where `path` is given as public and lies in a run of private images."""
    for folder in (path.resolve(), *path.resolve().parents):
        # A config.yaml may also be somebody else's, of any form.
        content = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        run = isinstance(content, dict) and flatten(content).get("sensitive_data.name") is not None
        if run or (folder / PRIVACY).exists():
            raise UserError(
                f"{key}: {path.resolve()} was made of private images by a run, and its cost would be forgotten; if "
                f"these were other images than now, copy it out of the run's folder"
            )
