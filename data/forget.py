"""Remove a prepared set with everything that the toolkit made from it outside the folders of runs."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.apart import training_set_of
from data.cache import CACHE_NAME, private_places, public_places
from data.prepare import downloads_folder, require_allowed_name
from data.prepared import META_NAME, is_prepared, read_meta
from data.registry import EMBEDDED_PUBLIC, EMBEDDED_SENSITIVE, canonical_name
from utils.artefacts import RESULTS
from utils.errors import UserError
from utils.files import read_json
from utils.text import listed


def forget(data_name: str, data_root: Path, exp_root: Path) -> Iterator[str]:
    """Remove the prepared set `data_name` of `data_root`, its private cache, copies and downloaded files.

    Yields a line for each removed folder, then one for each remaining thing that holds images of the set or results
    computed from them: its source, and the folders of runs and evaluations in `exp_root`. UserError if no set has this
    name, or if something cannot be removed; the command can then be repeated.
    """
    data_name = canonical_name(data_name)
    require_allowed_name("--forget", data_name)
    folder = data_root / data_name
    if folder.exists() and not (is_prepared(folder) or _holds_only_a_cache(folder)):
        raise UserError(f"--forget: {folder} is not prepared data; nothing was removed")
    found = _folders_of(data_name, data_root)
    is_built_in = data_name in EMBEDDED_SENSITIVE or data_name in EMBEDDED_PUBLIC
    if is_built_in:
        state = "only what was computed from it" if found else "nothing"
        yield f"{data_name} is built in and cannot be removed; stored in {data_root}: {state}"
    elif not found:
        # No near match is suggested: the next command would remove that set.
        there = listed(sorted(_names_in(data_root)), 10) or "none; give its --data_root"
        raise UserError(
            f"--forget: no set '{data_name}' is prepared in {data_root}; nothing was removed. Prepared there: {there}"
        )
    source = _source_of(folder)
    for path in found:
        _remove(path)
        yield f"removed: {path}"
    if source is not None and source.exists():
        yield f"not removed: {source}, from which it was made"
    for path in _runs_on(data_name, exp_root):
        yield f"not removed: {path}, which holds results computed from these images"
    yield f"not searched: folders of runs and evaluations outside {exp_root}, and copies of your own"


def _folders_of(data_name: str, data_root: Path) -> list[Path]:
    """Everything on disk that belongs to this set. Its own folder, which identifies it, comes last."""
    folder = data_root / data_name
    copies = re.compile(rf"{re.escape(data_name)}-\d+-[0-9a-f]{{16}}")  # of a public set at another size
    leftovers = re.compile(rf"\.{re.escape(data_name)}-[a-z0-9_]{{8}}")  # of a preparation that was killed
    candidates = [
        *private_places(folder),
        *(path for place in public_places(data_root / CACHE_NAME) for path in _matching(place, copies)),
        downloads_folder(data_name, data_root),
        *_matching(data_root, leftovers),
        folder,
    ]
    return [path for path in candidates if path.exists()]


def _matching(place: Path, names: re.Pattern) -> list[Path]:
    return sorted(path for path in place.glob("*") if names.fullmatch(path.name))


def _holds_only_a_cache(folder: Path) -> bool:
    """True for the folder of an embedded set, which has no other files."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {CACHE_NAME}


def _names_in(data_root: Path) -> list[str]:
    return [path.name for path in data_root.glob("[!.]*") if is_prepared(path)]


def _source_of(folder: Path) -> Path | None:
    """The source of the set; None if it is unknown."""
    try:
        return Path(read_meta(folder).source)
    except UserError:  # no set, or a damaged one
        return None


def _remove(folder: Path) -> None:
    """Remove a folder, and the target of a link. meta.json, which identifies a set, is removed last, so that an
    interrupted command can be repeated."""
    real = folder.resolve()
    try:
        for path in real.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != META_NAME:
                path.unlink()
        shutil.rmtree(real)
        if folder.is_symlink():
            folder.unlink()
    except OSError as error:
        path, reason = error.filename or real, error.strerror or error
        raise UserError(
            f"--forget: cannot remove {path} ({reason}); change that and repeat the command"
        ) from error


def _runs_on(data_name: str, exp_root: Path) -> Iterator[Path]:
    """The folders below `exp_root` of runs on this set, and of evaluations against it."""
    for folder in sorted(exp_root.glob("*/*")):
        if data_name in (_trained_on(folder), _evaluated_against(folder)):
            yield folder


def _trained_on(folder: Path) -> object:
    try:
        return training_set_of(folder)
    except UserError:  # a config.yaml that is not YAML
        return None


def _evaluated_against(folder: Path) -> object:
    try:
        content = read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    except UserError:
        return None
    return content.get("data") if isinstance(content, dict) else None
