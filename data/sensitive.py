"""The private data of a run: what is public about it (read without opening an image), and its fixed split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.apart import require_no_run
from data.cache import PrivateCache, private_places
from data.prepared import PreparedMeta, is_prepared, new_prepared, read_groups, read_meta, read_prepared
from data.public import has_public_images, stored_folders
from data.registry import EMBEDDED_NUM_TRAIN, EMBEDDED_SENSITIVE, known_set, prepare_command
from data.spec import DataSpec, Samples
from data.splits import training_subset, validation_split
from utils.errors import UserError
from utils.sections import PublicDataConfig, SensitiveDataConfig

ROWS_AT_ONCE = 4096  # copied at a time where a split of mapped images is written to disk


@dataclass(frozen=True)
class SensitiveData:
    """Private images and labels by part. `validation` is None unless eval.mode is val."""

    train: Samples
    validation: Samples | None
    test: Samples


def spec_of(section: SensitiveDataConfig, mode: str, data_root: Path) -> tuple[DataSpec, tuple[str, ...]]:
    """The public facts of the data, and lines to tell the user. Reads YAML numbers and meta.json, no image.

    Of the images on disk at most `section.num_train` are used; mode "val" holds num_val of these out of training. A
    line says if the two counts differ. UserError if the disk contradicts the configuration in resolution, channels or
    classes, if num_val leaves nothing, or if a custom set has not been prepared.
    """
    folder = _folder(section, data_root)
    meta = None if _is_embedded(section) or not is_prepared(folder) else read_meta(folder)
    if meta is not None:
        _check_agreement(section, meta, folder)
    elif section.n_classes is None or section.num_train is None:
        raise _not_prepared(section, folder, data_root)
    class_names = _class_names(section, meta)
    available = _num_available(section, meta)
    used = _num_used(section, available)
    groups = _groups_used(section, data_root, available)
    num_private = used - _num_held_out(section, mode, used, groups)
    spec = DataSpec(
        section.name or "none",
        section.resolution,
        section.num_channels,
        len(class_names),
        num_private,
        class_names,
        "" if meta is None else meta.identity,
        section.path is None and (_is_embedded(section) or known_set(section.name or "") is not None),
        section.protocol,
        num_unused=available - used,
        images_per_person=None if meta is None else meta.images_per_person,
        images_per_person_is="" if meta is None else meta.images_per_person_is,
    )
    return spec, _count_notes(section, available, num_private)


def num_test_images(section: SensitiveDataConfig, data_root: Path) -> int:
    """The number of test images, without opening one; of data that are not prepared yet about a sixth of N."""
    if _is_embedded(section):
        return len(EMBEDDED_SENSITIVE.resolve(section.name)()[1])
    folder = _folder(section, data_root)
    return read_meta(folder).num_test if is_prepared(folder) else (section.num_train or 0) // 6


def require_prepared(section: SensitiveDataConfig, data_root: Path) -> None:
    """Raise UserError, with the command to run, if the images are not there. Opens no image."""
    folder = _folder(section, data_root)
    if section.name is not None and not _is_embedded(section) and not is_prepared(folder):
        raise _not_prepared(section, folder, data_root)


def require_apart(public: PublicDataConfig, section: SensitiveDataConfig, data_root: Path) -> None:
    """Raise UserError where the public data are the private images, or what a run has made of private images, which is
    not public either: nothing would add up what it has cost."""
    if not has_public_images(public):
        return
    private = None if _is_embedded(section) else _folder(section, data_root)
    named = public.train_path is None
    for path in stored_folders(public, data_root) if named else [Path(public.train_path)]:
        if private is None:
            continue
        origin = _origin(path)
        if any(_overlap(*pair) for pair in ((path, private), (origin, private), (origin, _origin(private)))):
            key = "name" if named else "train_path"
            raise UserError(f"public_data.{key}: {path} holds the private images; give a public set")
    if not named:
        require_no_run(Path(public.train_path), "public_data.train_path")


def _origin(path: Path) -> Path:
    """What the images of a prepared folder were made from; of another one, itself."""
    return Path(read_meta(path).source) if is_prepared(path) else path


def _overlap(one: Path, other: Path) -> bool:
    """One lies in the other. Paths alone tell: whether two sets share an image would be a clean answer about it."""
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def load_sensitive(section: SensitiveDataConfig, mode: str, data_root: Path) -> SensitiveData:
    """The images of all parts. The training part keeps the order of the files; the split is the same for every run.

    UserError with the command to run if the data has not been prepared, or if its files are damaged.
    """
    if section.name is None:
        raise UserError("sensitive_data.name: null has no images to load; name a dataset")
    spec, _ = spec_of(section, mode, data_root)  # with its checks
    train, test = _load_parts(section, data_root)
    used = _num_used(section, len(train))
    groups = _groups_used(section, data_root, len(train))
    num_held_out = _num_held_out(section, mode, used, groups)
    if num_held_out == 0 and used == len(train):
        return SensitiveData(train, None, test)
    rows = training_subset(len(train), used)
    train_rows, validation_rows = np.arange(used), np.arange(0)
    if num_held_out:
        train_rows, validation_rows = validation_split(used, section.num_val, groups)
    cache = private_cache(section, data_root)
    kept = _take(train, rows[train_rows], cache, f"train-{used}-without-{num_held_out}-{spec.identity}")
    return SensitiveData(kept, train.take(rows[validation_rows]) if num_held_out else None, test)


def _num_available(section: SensitiveDataConfig, meta: PreparedMeta | None) -> int:
    """Training images that are there; before they are prepared as many as the configuration says."""
    if meta is not None:
        return meta.num_train
    return EMBEDDED_NUM_TRAIN[section.name] if _is_embedded(section) else section.num_train


def _num_used(section: SensitiveDataConfig, available: int) -> int:
    return available if section.num_train is None else min(available, section.num_train)


def private_cache(section: SensitiveDataConfig, data_root: Path) -> PrivateCache:
    """The one place for what is computed from this set without noise: next to its images."""
    return PrivateCache(*private_places(_folder(section, data_root)))


def _class_names(section: SensitiveDataConfig, meta: PreparedMeta | None) -> tuple[str, ...]:
    if section.class_names is not None:
        return tuple(section.class_names)
    return meta.class_names if meta is not None else tuple(str(label) for label in range(section.n_classes))


def _is_embedded(section: SensitiveDataConfig) -> bool:
    return section.path is None and section.name is not None and section.name in EMBEDDED_SENSITIVE


def _folder(section: SensitiveDataConfig, data_root: Path) -> Path:
    return Path(section.path) if section.path is not None else data_root / str(section.name)


def _load_parts(section: SensitiveDataConfig, data_root: Path) -> tuple[Samples, Samples]:
    if _is_embedded(section):
        return EMBEDDED_SENSITIVE.resolve(section.name)()
    require_prepared(section, data_root)
    folder = _folder(section, data_root)
    prepared = read_prepared(folder)
    if prepared.test is None:
        raise UserError(
            f"{folder}: has no test part (it was prepared with --public); prepare it again without --public"
        )
    return prepared.train, prepared.test


def _not_prepared(section: SensitiveDataConfig, folder: Path, data_root: Path) -> UserError:
    state = "is not prepared data" if folder.exists() else "does not exist"
    return UserError(
        f"{section.name}: {folder} {state}; run: {prepare_command(str(section.name), data_root)}"
    )


def _check_agreement(section: SensitiveDataConfig, meta: PreparedMeta, folder: Path) -> None:
    stored = {
        "resolution": meta.resolution,
        "num_channels": meta.channels,
        "n_classes": len(meta.class_names),
    }
    for key, value in stored.items():
        configured = getattr(section, key)
        if configured is not None and configured != value:
            raise UserError(
                f"sensitive_data.{key}: {configured}, but {folder} has {value}; set sensitive_data.{key}={value}"
            )
    names = section.class_names
    if names is not None and len(names) != len(meta.class_names):
        raise UserError(
            f"sensitive_data.class_names: {len(names)} names for the {len(meta.class_names)} classes of {folder}"
        )


def _groups_used(section: SensitiveDataConfig, data_root: Path, available: int) -> np.ndarray | None:
    """The group of every training image that is used; None for a set that was prepared without groups."""
    folder = _folder(section, data_root)
    if _is_embedded(section) or not is_prepared(folder):
        return None
    groups = read_groups(folder, read_meta(folder))
    return None if groups is None else groups[training_subset(available, _num_used(section, available))]


def _num_held_out(
    section: SensitiveDataConfig, mode: str, available: int, groups: np.ndarray | None = None
) -> int:
    """Of groups those are held out as a whole that have about num_val images."""
    if mode != "val":
        return 0
    if not 0 < section.num_val < available:
        allowed = f"1 to {available - 1} ({available:,} training images)"
        raise UserError(
            f"sensitive_data.num_val: {section.num_val} is not allowed with eval.mode=val; it must be {allowed}, "
            f"for instance sensitive_data.num_val={max(1, available // 10)}; or use eval.mode=syn, which holds out none"
        )
    if groups is None:
        return section.num_val
    held_out = len(validation_split(available, section.num_val, groups)[1])
    if held_out == 0:
        raise UserError(
            f"sensitive_data.num_val: {section.num_val} is smaller than half of every group, so none can be held out; "
            f"give more, or use eval.mode=syn, which holds out none"
        )
    return held_out


def _count_notes(section: SensitiveDataConfig, available: int, num_private: int) -> tuple[str, ...]:
    if section.num_train is None or section.num_train == available:
        return ()
    if section.num_train < available:
        return (
            f"{section.name}: {section.num_train:,} of {available:,} training images are used, chosen by position "
            f"(sensitive_data.num_train; null: all); N = {num_private:,}",
        )
    return (
        f"{section.name}: {available:,} training images are there, fewer than sensitive_data.num_train "
        f"{section.num_train:,}; N = {num_private:,} is used",
    )


def _take(samples: Samples, rows: np.ndarray, cache: PrivateCache, name: str) -> Samples:
    """The chosen rows. Of mapped images the copy is written to the cache once and mapped too; without one it is held
    in memory."""
    if not isinstance(samples.images, np.memmap) or cache.folder is None:
        return samples.take(rows)
    folder = cache.folder / name
    if not is_prepared(folder):
        with new_prepared(folder, samples.images.shape[1:]) as writer:
            images = writer.new_part("train", samples.labels[rows])
            for start in range(0, len(rows), ROWS_AT_ONCE):
                images[start : start + ROWS_AT_ONCE] = samples.images[rows[start : start + ROWS_AT_ONCE]]
            images.flush()
            class_names = tuple(str(label) for label in range(samples.labels.max() + 1))
            writer.finish(name, class_names, str(samples.images.filename))
    return read_prepared(folder).train
