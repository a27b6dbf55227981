"""The private data of a run: its public facts, which are read without opening an image, and its fixed split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import PrivateCache, private_places
from data.locations import is_embedded, sensitive_folder
from data.prepared import (
    PreparedMeta,
    is_prepared,
    new_prepared,
    read_groups,
    read_meta,
    read_prepared,
    read_train_labels,
)
from data.registry import EMBEDDED_NUM_TRAIN, EMBEDDED_SENSITIVE, known_set, prepare_command
from data.spec import DataSpec, Samples
from data.splits import public_share, training_subset, validation_split
from utils.errors import UserError
from utils.sections import SensitiveDataConfig, check

ROWS_AT_ONCE = 4096  # copied at a time when a split of mapped images is written to disk


@dataclass(frozen=True)
class SensitiveData:
    """Images and labels by part. `validation` is None unless eval.mode is val.

    `public` holds the records that sensitive_data.num_public declares public, which are in no other part; None if there
    are none.
    """

    train: Samples
    validation: Samples | None
    test: Samples
    public: Samples | None = None


@dataclass(frozen=True)
class _Selection:
    """Which training images a run uses: `num_used` of the `available` ones, of which `num_public` are declared public,
    and of the others `num_held_out` are for validation.

    groups (num_used,): the group of every image that is used; None for a set that was prepared without groups.
    public_rows (num_public,): sorted indices into the images that are used; None before the set is prepared.
    """

    available: int
    num_used: int
    num_public: int
    num_held_out: int
    groups: np.ndarray | None
    public_rows: np.ndarray | None

    @property
    def num_private(self) -> int:
        return self.num_used - self.num_public - self.num_held_out

    def rows(self, num_val: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(train rows, validation rows, public rows): sorted indices into the training part on disk."""
        used = training_subset(self.available, self.num_used)
        protected = np.setdiff1d(np.arange(self.num_used), self.public_rows, assume_unique=True)
        train, held_out = protected, protected[:0]
        if self.num_held_out:
            train, held_out = (
                protected[part] for part in validation_split(len(protected), num_val, self.groups)
            )
        return used[train], used[held_out], used[self.public_rows]


def spec_of(section: SensitiveDataConfig, mode: str, data_root: Path) -> tuple[DataSpec, tuple[str, ...]]:
    """The public facts of the data, and notes for the user. Reads YAML numbers and meta.json, and the labels if
    num_public is set; no image of a prepared set.

    At most `section.num_train` of the images on disk are used; num_public of them are declared public, and mode "val"
    holds out num_val of the others. A note reports the two counts if they differ, and the public share. UserError if
    the disk contradicts the configuration in resolution, channels or classes, if the classes do not have num_public
    records, if num_val leaves no training image, or if a custom set has not been prepared.
    """
    return _spec_of(section, mode, data_root, _read_meta(section, data_root))


def _spec_of(
    section: SensitiveDataConfig, mode: str, data_root: Path, meta: PreparedMeta | None
) -> tuple[DataSpec, tuple[str, ...]]:
    folder = sensitive_folder(section, data_root)
    if meta is not None:
        _check_agreement(section, meta, folder)
    elif section.n_classes is None or section.num_train is None:
        raise _not_prepared(section, folder, data_root)
    class_names = _class_names(section, meta)
    selection = _select(section, mode, folder, meta)
    spec = DataSpec(
        section.name or "none",
        section.resolution,
        section.num_channels,
        len(class_names),
        selection.num_private,
        class_names,
        "" if meta is None else meta.identity,
        section.path is None and (is_embedded(section) or known_set(section.name or "") is not None),
        section.protocol,
        num_unused=selection.available - selection.num_used,
        images_per_person=None if meta is None else meta.images_per_person,
        images_per_person_is="" if meta is None else meta.images_per_person_is,
        num_public=selection.num_public,
        public_seed=section.public_seed,
    )
    return spec, (*_count_notes(section, selection), *_public_notes(section, selection))


def num_test_images(section: SensitiveDataConfig, data_root: Path) -> int:
    """The number of test images, without opening one; an estimate (a sixth of N) before the set is prepared."""
    if is_embedded(section):
        return len(EMBEDDED_SENSITIVE.resolve(section.name)()[1])
    meta = _read_meta(section, data_root)
    return (section.num_train or 0) // 6 if meta is None else meta.num_test


def require_prepared(section: SensitiveDataConfig, data_root: Path) -> None:
    """Raise UserError, with the command to run, if the images are missing. Opens no image."""
    folder = sensitive_folder(section, data_root)
    if section.name is not None and not is_embedded(section) and not is_prepared(folder):
        raise _not_prepared(section, folder, data_root)


def load_sensitive(section: SensitiveDataConfig, mode: str, data_root: Path) -> SensitiveData:
    """The images of all parts. The training part keeps the order of the files; the split is the same for every run.

    UserError with the command to run if the data has not been prepared, or if its files are damaged.
    """
    if section.name is None:
        raise UserError("sensitive_data.name: null has no images to load; name a dataset")
    meta = _read_meta(section, data_root)
    spec, _ = _spec_of(section, mode, data_root, meta)  # checks the configuration against the disk
    train, test = _load_parts(section, data_root, meta)
    selection = _select(section, mode, sensitive_folder(section, data_root), meta)
    if selection.num_private == len(train):
        return SensitiveData(train, None, test)
    train_rows, validation_rows, public_rows = selection.rows(section.num_val)
    cache = private_cache(section, data_root)
    name = f"train-{selection.num_used}-without-{selection.num_held_out}"
    if selection.num_public:
        name += f"-public-{selection.num_public}-seed-{section.public_seed}"
    kept = _take(train, train_rows, cache, f"{name}-{spec.identity}")
    return SensitiveData(
        kept,
        train.take(validation_rows) if selection.num_held_out else None,
        test,
        train.take(public_rows) if selection.num_public else None,
    )


def private_cache(section: SensitiveDataConfig, data_root: Path) -> PrivateCache:
    """The only place for results that are computed from this set without noise: next to its images."""
    return PrivateCache(*private_places(sensitive_folder(section, data_root)))


def _read_meta(section: SensitiveDataConfig, data_root: Path) -> PreparedMeta | None:
    """meta.json of the set; None for an embedded set, and before the set is prepared."""
    folder = sensitive_folder(section, data_root)
    return None if is_embedded(section) or not is_prepared(folder) else read_meta(folder)


def _class_names(section: SensitiveDataConfig, meta: PreparedMeta | None) -> tuple[str, ...]:
    if section.class_names is not None:
        return tuple(section.class_names)
    return meta.class_names if meta is not None else tuple(str(label) for label in range(section.n_classes))


def _load_parts(
    section: SensitiveDataConfig, data_root: Path, meta: PreparedMeta | None
) -> tuple[Samples, Samples]:
    if is_embedded(section):
        return EMBEDDED_SENSITIVE.resolve(section.name)()
    require_prepared(section, data_root)
    folder = sensitive_folder(section, data_root)
    prepared = read_prepared(folder, meta)
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


# ------------------------------------------------------------------------------------------------------ selection


def _select(section: SensitiveDataConfig, mode: str, folder: Path, meta: PreparedMeta | None) -> _Selection:
    """The images of a run; before the set is prepared, as many are available as the configuration states."""
    if meta is not None:
        available = meta.num_train
    else:
        available = EMBEDDED_NUM_TRAIN[section.name] if is_embedded(section) else section.num_train
    num_used = available if section.num_train is None else min(available, section.num_train)
    num_public, public_rows = section.num_public, np.arange(0)
    if num_public:
        public_rows = _public_rows(section, available, num_used, folder, meta)
    if mode != "val":
        return _Selection(available, num_used, num_public, 0, None, public_rows)
    _check_num_val(section, num_used - num_public)
    groups = None if meta is None else read_groups(folder, meta)
    if groups is None:
        return _Selection(available, num_used, num_public, section.num_val, None, public_rows)
    groups = groups[training_subset(available, num_used)]
    held_out = len(validation_split(num_used, section.num_val, groups)[1])
    if held_out == 0:
        raise UserError(
            f"sensitive_data.num_val: {section.num_val} is smaller than half of every group, so no group can be held "
            f"out; give a larger number, or use eval.mode=syn, which holds out no image"
        )
    return _Selection(available, num_used, num_public, held_out, groups, public_rows)


def _public_rows(
    section: SensitiveDataConfig, available: int, num_used: int, folder: Path, meta: PreparedMeta | None
) -> np.ndarray | None:
    """Indices, into the images that are used, of those that are declared public; None before the set is prepared.

    UserError if num_public is no multiple of the number of classes, a class would have no private record left, or the
    set was prepared with groups: a person would have images on both sides.
    """
    key, num_public = "sensitive_data.num_public", section.num_public
    num_classes = len(_class_names(section, meta))
    if num_public % num_classes:
        raise UserError(
            f"{key}: {num_public} is not allowed; it must be a multiple of the {num_classes} classes, for instance "
            f"{key}={-(-num_public // num_classes) * num_classes}"
        )
    if meta is not None and meta.images_per_person is not None:
        raise UserError(
            f"{key}: {num_public} is not allowed for {folder}, which was prepared with --groups: a person would have "
            f"public and private images; prepare the images of other people with --public, and give them as "
            f"public_data.name=<name>"
        )
    labels = _train_labels(section, folder, meta)
    if labels is None:
        check(num_public < num_used, key, num_public, f"below {num_used}, the number of training images")
        return None
    labels = labels[training_subset(available, num_used)]
    counts = np.bincount(labels, minlength=num_classes)
    if num_public // num_classes >= counts.min():
        # Without the number and the class: sizes of classes are private.
        raise UserError(
            f"{key}: {num_public} are {num_public // num_classes} of each of {num_classes} classes, but a class has "
            f"too few training images, of which one must stay private; give a smaller multiple of {num_classes}"
        )
    return public_share(labels, num_public, num_classes, section.public_seed)


def _train_labels(section: SensitiveDataConfig, folder: Path, meta: PreparedMeta | None) -> np.ndarray | None:
    """The labels of the training part; None before the set is prepared."""
    if is_embedded(section):
        return EMBEDDED_SENSITIVE.resolve(section.name)()[0].labels
    return None if meta is None else read_train_labels(folder, meta)


def _check_num_val(section: SensitiveDataConfig, num_used: int) -> None:
    if not 0 < section.num_val < num_used:
        allowed = f"1 to {num_used - 1} ({num_used:,} training images)"
        raise UserError(
            f"sensitive_data.num_val: {section.num_val} is not allowed with eval.mode=val; it must be {allowed}, for "
            f"instance sensitive_data.num_val={max(1, num_used // 10)}; or use eval.mode=syn, which holds out no image"
        )


def _public_notes(section: SensitiveDataConfig, selection: _Selection) -> tuple[str, ...]:
    if not selection.num_public:
        return ()
    return (
        f"{section.name}: {selection.num_public:,} of {selection.num_used:,} training images are declared public and "
        f"have no protection (sensitive_data.num_public; which: by class, position and public_seed="
        f"{section.public_seed}); N = {selection.num_private:,}",
    )


def _count_notes(section: SensitiveDataConfig, selection: _Selection) -> tuple[str, ...]:
    available, num_private = selection.available, selection.num_private
    if section.num_train is None or section.num_train == available:
        return ()
    if section.num_train < available:
        return (
            f"{section.name}: {section.num_train:,} of {available:,} training images are used, chosen by position "
            f"(sensitive_data.num_train; null: all); N = {num_private:,}",
        )
    return (
        f"{section.name}: {available:,} training images are available, fewer than sensitive_data.num_train "
        f"{section.num_train:,}; N = {num_private:,} is used",
    )


def _take(samples: Samples, rows: np.ndarray, cache: PrivateCache, name: str) -> Samples:
    """The given rows. A copy of mapped images is written to the cache once and mapped; without a cache it is held in
    memory."""
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
