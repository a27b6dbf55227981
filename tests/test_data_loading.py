"""Loading: the public facts, the fixed split, the prepared format, public data at the private shape, the real files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from data import prepared as prepared_module
from data.convert import resized, to_channels
from data.prepare import prepare
from data.prepared import new_prepared, read_meta, read_prepared
from data.public import load_public, num_public_classes
from data.registry import EMBEDDED_NUM_TRAIN, EMBEDDED_SENSITIVE
from data.sensitive import load_sensitive, spec_of
from data.spec import DataSpec
from data.splits import stratified_test_rows, validation_split
from scripts.prepare_data import facts_of
from utils.config_files import read_yaml
from utils.errors import UserError
from utils.sections import PublicSetConfig, SensitiveDataConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("DPIB_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"real files are not at {SHARED} (DPIB_SHARED_DATA)"
)

PUBLISHED_NUM_TRAIN = {  # eval.mode=val
    "digits_8": 1_300,
    "mnist_28": 55_000,
    "fmnist_28": 55_000,
    "cifar10_32": 45_000,
    "cifar100_32": 45_000,
    "eurosat_32": 21_000,
    "celeba_male_32": 145_064,
    "celeba_male_64": 145_064,
    "celeba_male_128": 145_064,
    "camelyon_32": 269_538,
}


def sensitive_section(file: str = "custom", **changes) -> SensitiveDataConfig:
    fields = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "configs" / "data" / f"{file}.yaml"))
    return SensitiveDataConfig(**{**fields, **changes})


def public_section(file: str, **changes) -> PublicSetConfig:
    folder = REPOSITORY / "configs" / "public_data"
    fields = read_yaml(folder / "_defaults.yaml") | read_yaml(folder / f"{file}.yaml")
    for key in ("defaults", "selective", "central"):
        del fields[key]
    return PublicSetConfig(**{**fields, **changes})


def spec(resolution: int = 8, channels: int = 1) -> DataSpec:
    return DataSpec("any", resolution, channels, 2, 100, ("a", "b"))


def write_set(
    folder: Path, num_train: int = 40, num_test: int = 10, side: int = 8, channels: int = 1, classes: int = 2
):
    """A prepared folder of random images; image i of the training part has the value i % 251 in its first pixel."""
    rng = np.random.default_rng(0)
    with new_prepared(folder, (channels, side, side)) as writer:
        for part, count in (("train", num_train), ("test", num_test)):
            if count:
                images = writer.new_part(part, np.arange(count) % classes)
                images[:] = rng.integers(0, 256, images.shape, np.uint8)
                images[:, 0, 0, 0] = np.arange(count) % 251
        writer.finish(folder.name, tuple(f"class {i}" for i in range(classes)), "test")
    return folder


def own_section(**changes) -> SensitiveDataConfig:
    return sensitive_section(**{"name": "mine", "resolution": 8, "num_channels": 1, "num_val": 8, **changes})


# ------------------------------------------------------------------------------------------------ spec


@pytest.mark.parametrize("name", PUBLISHED_NUM_TRAIN)
def test_num_train_in_val_mode_is_the_published_one_before_the_set_is_prepared(tmp_path, name):
    section = sensitive_section(name)
    found, notes = spec_of(section, "val", tmp_path)
    assert (found.name, found.num_train, notes) == (name, PUBLISHED_NUM_TRAIN[name], ())
    assert spec_of(section, "sen", tmp_path)[0].num_train == section.num_train
    assert found.num_classes == section.n_classes == len(set(found.class_names))
    assert found.resolution == int(name.rsplit("_", 1)[1])
    assert found.protocol == ("cifar" if name in ("cifar10_32", "cifar100_32") else "standard")


def test_own_images_follow_the_standard_protocol_by_default(tmp_path):
    write_set(tmp_path / "cifar_scans")
    assert spec_of(own_section(name="cifar_scans"), "syn", tmp_path)[0].protocol == "standard"
    chosen = own_section(name="cifar_scans", protocol="cifar")
    assert spec_of(chosen, "syn", tmp_path)[0].protocol == "cifar"
    with pytest.raises(UserError, match=r"protocol: cifer .*standard or cifar.*'cifar'"):
        own_section(protocol="cifer")


def test_spec_reads_counts_and_classes_of_a_custom_set_from_disk(tmp_path):
    write_set(tmp_path / "mine", num_train=40, classes=4)
    found, notes = spec_of(own_section(), "val", tmp_path)
    assert (found.num_train, found.num_classes, found.class_names[3], notes) == (32, 4, "class 3", ())


def test_fewer_images_than_configured_are_all_used_and_reported(tmp_path):
    write_set(tmp_path / "mine", num_train=40)
    found, (note,) = spec_of(own_section(num_train=50), "val", tmp_path)
    assert (found.num_train, found.num_unused) == (32, 0)
    assert all(number in note for number in ("40", "50", "N = 32"))


@pytest.mark.parametrize(("mode", "num_private"), [("syn", 24), ("val", 16)])
def test_a_trial_uses_a_part_of_the_images_by_position(tmp_path, mode, num_private, monkeypatch):
    write_set(tmp_path / "mine", num_train=40)
    section = own_section(num_train=24)
    found, (note,) = spec_of(section, mode, tmp_path)
    assert (found.num_train, found.num_unused) == (num_private, 16)
    assert "24 of 40" in note and f"N = {num_private}" in note
    parts = [load_sensitive(section, mode, tmp_path) for _ in range(2)]
    rows = [part.train.images[:, 0, 0, 0].tolist() for part in parts]  # write_set numbers them
    assert rows[0] == rows[1] == sorted(set(rows[0])) and len(rows[0]) == num_private
    if mode == "val":
        held_out = parts[0].validation.images[:, 0, 0, 0].tolist()
        assert len(held_out) == 8 and not set(held_out) & set(rows[0])
    monkeypatch.setattr("data.prepared.MEMORY_MAP_ABOVE", 0)
    mapped = load_sensitive(section, mode, tmp_path).train
    assert mapped.images[:, 0, 0, 0].tolist() == rows[0]
    assert np.array_equal(mapped.labels, parts[0].train.labels)


def test_which_images_a_trial_uses_does_not_depend_on_them(tmp_path):
    write_set(tmp_path / "mine", num_train=40)
    write_set(tmp_path / "other", num_train=40, classes=4)
    rows = [
        load_sensitive(own_section(name=name, num_train=9), "syn", tmp_path).train.images[:, 0, 0, 0].tolist()
        for name in ("mine", "other")
    ]
    assert rows[0] == rows[1]


def test_the_counts_of_embedded_sets_are_those_of_their_images():
    for name, count in EMBEDDED_NUM_TRAIN.items():
        assert len(EMBEDDED_SENSITIVE.resolve(name)()[0]) == count
    assert set(EMBEDDED_NUM_TRAIN) == set(EMBEDDED_SENSITIVE)


@pytest.mark.parametrize(("num_train", "used"), [(100, 100), (2000, 1437)])
def test_a_part_of_an_embedded_set(tmp_path, num_train, used):
    section = sensitive_section("digits_8", num_train=num_train)
    assert spec_of(section, "syn", tmp_path)[0].num_train == used
    assert len(load_sensitive(section, "syn", tmp_path).train) == used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(resolution=28),
            r"sensitive_data\.resolution: 28, but .* has 8; set sensitive_data\.resolution=8",
        ),
        (dict(num_channels=3), r"sensitive_data\.num_channels: 3, but .* has 1"),
        (dict(n_classes=5), r"sensitive_data\.n_classes: 5, but .* has 2"),
        (dict(class_names=["a"]), r"sensitive_data\.class_names: 1 names for the 2 classes"),
        (dict(num_val=40), r"num_val: 40 is not allowed .* 1 to 39 \(40 training images\)"),
        (dict(num_val=0), r"num_val: 0 is not allowed"),
        (
            dict(name="other"),
            r"other does not exist; run: python scripts/prepare_data\.py --data_name other .*--source",
        ),
    ],
)
def test_spec_refuses_what_contradicts_the_disk(tmp_path, changes, message):
    write_set(tmp_path / "mine")
    with pytest.raises(UserError, match=message):
        spec_of(own_section(**changes), "val", tmp_path)


def test_a_custom_set_that_is_described_needs_no_file_for_its_spec(tmp_path):
    found, _ = spec_of(own_section(n_classes=3, num_train=100), "val", tmp_path)
    assert (found.num_train, found.class_names) == (92, ("0", "1", "2"))


@pytest.mark.parametrize("mode", ["syn", "val"])
def test_meta_is_read_once(tmp_path, monkeypatch, mode):
    write_set(tmp_path / "mine")
    reads = []
    monkeypatch.setattr("data.sensitive.read_meta", lambda folder: reads.append(folder) or read_meta(folder))
    monkeypatch.setattr("data.prepared.read_meta", None)  # read_prepared is given the meta
    spec_of(own_section(num_val=5), mode, tmp_path)
    assert len(reads) == 1
    load_sensitive(own_section(num_val=5), mode, tmp_path)
    assert len(reads) == 2


def test_missing_known_set_names_the_command(tmp_path):
    with pytest.raises(
        UserError, match=r"run: python scripts/prepare_data\.py --data_name mnist_28 --data_root \S+$"
    ):
        load_sensitive(sensitive_section("mnist_28"), "val", tmp_path)


def test_a_public_set_is_no_sensitive_set(tmp_path):
    write_set(tmp_path / "mine", num_test=0)
    with pytest.raises(UserError, match="has no test part"):
        load_sensitive(own_section(), "val", tmp_path)


# ------------------------------------------------------------------------------------------------ splits


def test_digits_8_counts_and_stratification(tmp_path):
    data = load_sensitive(sensitive_section("digits_8"), "val", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (1300, 137, 360)
    assert data.train.images.shape[1:] == (1, 8, 8) and data.train.images.max() == 255
    everything = load_sensitive(sensitive_section("digits_8"), "sen", tmp_path)
    assert everything.validation is None and len(everything.train) == 1437
    share = np.bincount(everything.test.labels) / np.bincount(
        np.concatenate([everything.train.labels, everything.test.labels])
    )
    assert (
        np.abs(share - 360 / 1797).max() < 1 / 174
    )  # at most one image away from an even share of each class
    from sklearn.datasets import load_digits

    originals = {image.tobytes() for image in np.round(load_digits().images * 255 / 16).astype(np.uint8)}
    assert {
        image.tobytes() for image in np.concatenate([everything.train.images, everything.test.images])
    } == originals


def test_validation_split_is_a_partition_in_file_order_that_never_changes():
    train, validation = validation_split(100, 10)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))
    assert np.array_equal(train, np.sort(train)) and len(validation) == 10
    assert validation.tolist() == validation_split(100, 10)[1].tolist()
    assert validation.tolist() == FROZEN_VALIDATION_ROWS  # a change here changes every published number


FROZEN_VALIDATION_ROWS = [0, 5, 30, 43, 50, 53, 62, 63, 67, 76]


def test_split_of_a_prepared_set_does_not_look_at_the_data(tmp_path):
    write_set(tmp_path / "mine")
    data = load_sensitive(own_section(), "val", tmp_path)
    train_rows, validation_rows = validation_split(40, 8)
    assert np.array_equal(data.train.images[:, 0, 0, 0], train_rows)
    assert np.array_equal(data.validation.images[:, 0, 0, 0], validation_rows)
    assert len(data.test) == 10


def test_memory_mapped_sets_give_the_same_split(tmp_path, monkeypatch):
    write_set(tmp_path / "mine")
    in_memory = load_sensitive(own_section(), "val", tmp_path)
    monkeypatch.setattr(prepared_module, "MEMORY_MAP_ABOVE", 0)
    mapped = load_sensitive(own_section(), "val", tmp_path)
    assert isinstance(mapped.train.images, np.memmap) and not isinstance(in_memory.train.images, np.memmap)
    for part in ("train", "validation", "test"):
        assert np.array_equal(getattr(mapped, part).images, getattr(in_memory, part).images)
        assert np.array_equal(getattr(mapped, part).labels, getattr(in_memory, part).labels)
    with pytest.raises(ValueError, match="read-only"):
        mapped.train.images[0] = 0


def test_stratified_rows_keep_one_record_of_tiny_classes():
    labels = np.array([0] * 20 + [1] + [2] * 3)
    rows = stratified_test_rows(labels, 12, "test")
    assert set(np.delete(labels, rows).tolist()) == {0, 1, 2}
    assert len(set(rows.tolist())) == len(rows)


# ------------------------------------------------------------------------------------------------ prepared format


def damage(folder: Path, file: str, change) -> None:
    path = folder / file
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train_images.npy", lambda content: content[:-10], "corrupt or truncated"),
        ("test_labels.npy", lambda content: b"", "corrupt or truncated"),
        ("train_images.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "sha256 differs"),
        ("meta.json", lambda content: content[:-30], "not the meta.json"),
        ("meta.json", lambda content: b'{"name": "mine"}', "not the meta.json"),
        ("meta.json", lambda content: content.replace(b'"channels": 1', b'"channels": 2'), "out of range"),
        (
            "meta.json",
            lambda content: content.replace(b'"num_train": 40', b'"num_train": 41'),
            r"\(40, 1, 8, 8\).*\(41, 1, 8, 8\)",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, file, change, message):
    folder = write_set(tmp_path / "mine")
    damage(folder, file, change)
    with pytest.raises(UserError, match=message) as raised:
        read_prepared(folder)
    assert str(folder) in str(raised.value)


def test_missing_file_is_named(tmp_path):
    folder = write_set(tmp_path / "mine")
    (folder / "test_images.npy").unlink()
    with pytest.raises(UserError, match=r"test_images\.npy: missing"):
        read_prepared(folder)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full(40, 2), r"train_labels\.npy: labels run from 2 to 2; allowed are 0 to 1"),
        (np.full(40, -1), r"labels run from -1 to -1"),
        (np.zeros(40, np.int32), r"int32 \(40,\).*int64"),
    ],
)
def test_wrong_labels_are_named(tmp_path, array, message):
    folder = write_set(tmp_path / "mine")
    np.save(folder / "train_labels.npy", array)
    meta = (folder / "meta.json").read_text()
    digest = read_prepared(write_set(tmp_path / "same")).meta.sha256["train_labels.npy"]
    (folder / "meta.json").write_text(
        meta.replace(digest, prepared_module.sha256_of(folder / "train_labels.npy"))
    )
    with pytest.raises(UserError, match=message):
        read_prepared(folder)


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path):
    before = read_prepared(write_set(tmp_path / "mine")).meta

    with pytest.raises(KeyboardInterrupt), new_prepared(tmp_path / "mine", (1, 8, 8)) as writer:
        writer.new_part("train", np.zeros(5))
        raise KeyboardInterrupt
    assert read_prepared(tmp_path / "mine").meta == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ------------------------------------------------------------------------------------------------ public data


@pytest.mark.parametrize("file", ["none", "central_mean", "central_mode"])
def test_no_public_images(tmp_path, file):
    assert load_public(public_section(file), spec(), tmp_path) is None
    assert num_public_classes(public_section(file), tmp_path) is None


def test_number_of_classes_is_known_before_and_checked_after_preparation(tmp_path):
    section = public_section("imagenet")
    assert num_public_classes(section, tmp_path) == 1000
    write_set(tmp_path / "imagenet", classes=3)
    for load in (
        lambda: num_public_classes(section, tmp_path),
        lambda: load_public(section, spec(), tmp_path),
    ):
        with pytest.raises(UserError, match=r"public_data\.n_classes: 1000, but imagenet has 3 classes"):
            load()
    assert num_public_classes(public_section("imagenet", n_classes=3), tmp_path) == 3


def test_missing_public_set_names_the_command(tmp_path):
    with pytest.raises(
        UserError, match=r"run: python scripts/prepare_data\.py --data_name imagenet .*--source <path>"
    ):
        load_public(public_section("imagenet"), spec(), tmp_path)
    with pytest.raises(UserError, match=r"public_data\.train_path: .*nothing does not exist"):
        load_public(public_section("custom", train_path=str(tmp_path / "nothing")), spec(), tmp_path)


def test_public_set_is_converted_once_to_the_private_shape(tmp_path):
    stored = read_prepared(write_set(tmp_path / "imagenet", side=12, channels=3, classes=3)).train
    section = public_section("imagenet", n_classes=3)
    public = load_public(section, spec(8, 1), tmp_path)
    grey = Image.fromarray(stored.images[5].transpose(1, 2, 0)).convert("L")
    expected = np.asarray(grey.resize((8, 8), Image.Resampling.BILINEAR))
    assert public.samples.images.shape == (40, 1, 8, 8) and np.array_equal(
        public.samples.images[5, 0], expected
    )
    cached = sorted((tmp_path / ".cache").iterdir())
    again = load_public(section, spec(8, 1), tmp_path)
    assert np.array_equal(again.samples.images, public.samples.images)
    assert sorted((tmp_path / ".cache").iterdir()) == cached


def test_the_cache_follows_the_content(tmp_path):
    section = public_section("imagenet", n_classes=3)
    for count in (30, 60):
        write_set(tmp_path / "imagenet", num_train=count, side=12, classes=3)
        assert len(load_public(section, spec(), tmp_path)) == count


def test_per_class_takes_the_first_images_of_each_class(tmp_path):
    write_set(tmp_path / "imagenet", classes=3)
    public = load_public(public_section("imagenet", n_classes=3, per_class=2), spec(), tmp_path)
    assert public.samples.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_smallest_stored_size_that_is_large_enough_is_used(tmp_path, caplog):
    caplog.set_level("INFO", "dpib")
    for name, side in (("imagenet", 8), ("imagenet_16", 16), ("imagenet_32", 32)):
        write_set(tmp_path / name, num_train=side, side=side)
    section = public_section("imagenet", n_classes=2)
    sizes = [len(load_public(section, spec(wanted), tmp_path)) for wanted in (4, 8, 12, 16)]
    assert sizes == [8, 8, 16, 16] and not caplog.messages
    assert len(load_public(section, spec(36), tmp_path)) == 32
    assert caplog.messages == ["public_data: imagenet is stored at 32 px and enlarged to 36"]


@pytest.mark.parametrize("form", ["class folders", "npz", "prepared"])
def test_train_path_may_be_any_form(tmp_path, form):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    path = tmp_path / "somewhere"
    if form == "class folders":
        for index, image in enumerate(images):
            (path / f"c{index % 3}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / f"c{index % 3}" / f"{index:02d}.png")
    elif form == "npz":
        path = tmp_path / "somewhere.npz"
        np.savez(path, x=images, y=np.arange(12) % 3)
    else:
        write_set(path, num_train=12, classes=3)
    section = public_section("custom", train_path=str(path))
    assert num_public_classes(section, tmp_path / "root") == 3
    public = load_public(section, spec(), tmp_path / "root")
    assert public.samples.images.shape == (12, 1, 8, 8) and public.num_classes == 3
    if form == "class folders":
        assert np.array_equal(public.samples.images[4:8, 0], images[1::3])


def test_glyphs_are_rendered_once(tmp_path, monkeypatch):
    section = public_section("glyphs", per_class=2)
    assert num_public_classes(section, tmp_path) == 62
    first = load_public(section, spec(8, 3), tmp_path)
    assert first.samples.images.shape == (124, 3, 8, 8) and first.class_names[10] == "A"
    monkeypatch.setattr("data.glyphs.render", None)
    assert np.array_equal(load_public(section, spec(8, 3), tmp_path).samples.images, first.samples.images)


def test_conversion_of_channels_and_sizes_is_pillows():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 12, 12), np.uint8)
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    grey = np.stack([np.asarray(picture.convert("L")) for picture in pictures])
    assert np.array_equal(to_channels(images, 1)[:, 0], grey)
    assert np.array_equal(to_channels(grey[:, None], 3), np.stack([grey] * 3, axis=1))
    small = np.stack([np.asarray(picture.resize((5, 5), Image.Resampling.BILINEAR)) for picture in pictures])
    assert np.array_equal(resized(images, 5), small.transpose(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------ imports


def test_importing_the_data_layer_imports_nothing_heavy():
    code = (
        "import sys, data.sensitive, data.public, data.registry, data.prepare, data.glyphs; "
        "print([m for m in ('torch', 'sklearn', 'matplotlib', 'PIL', 'scipy', 'omegaconf') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ real files


@needs_shared
@pytest.mark.parametrize(("name", "folder"), [("mnist_28", "mnist"), ("fmnist_28", "fashion_mnist")])
def test_real_idx_files(tmp_path, name, folder):
    prepare(name, tmp_path, source=SHARED / folder, facts=facts_of(name))
    found, notes = spec_of(sensitive_section(name), "val", tmp_path)
    data = load_sensitive(sensitive_section(name), "val", tmp_path)
    assert (found.num_train, notes) == (55_000, ())
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    if name == "mnist_28":
        assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]  # as every tutorial prints it
        assert np.bincount(data.test.labels).tolist() == [
            980,
            1135,
            1032,
            1010,
            982,
            892,
            958,
            1028,
            974,
            1009,
        ]


@needs_shared
def test_real_cifar10_part_lowers_num_train_and_logs_it(tmp_path):
    prepare("cifar10_32", tmp_path, source=SHARED / "cifar10", facts=facts_of("cifar10_32"))
    found, notes = spec_of(sensitive_section("cifar10_32"), "val", tmp_path)
    assert found.num_train == 20_000
    assert len(notes) == 1 and all(number in notes[0] for number in ("25,000", "50,000", "N = 20,000"))
    data = load_sensitive(sensitive_section("cifar10_32"), "syn", tmp_path)
    with np.load(SHARED / "cifar10" / "train.npz") as raw:
        assert np.array_equal(data.train.images[123], raw["x"][123].transpose(2, 0, 1))
    assert np.bincount(data.test.labels).tolist() == [500] * 10


@needs_shared
def test_real_public_letters_and_pictures(tmp_path):
    prepare("kazakh_letters", tmp_path, source=SHARED / "public" / "kazakh_letters_28.npz")
    letters = load_public(public_section("kazakh_letters"), spec(28, 1), tmp_path)
    assert (len(letters), letters.num_classes) == (19_285, 42)
    prepare("tiny_imagenet", tmp_path, source=SHARED / "public" / "tiny_imagenet_32.tar")
    pictures = load_public(public_section("tiny_imagenet", per_class=5), spec(28, 1), tmp_path)
    assert pictures.samples.images.shape == (1000, 1, 28, 28) and pictures.num_classes == 200
    assert np.bincount(pictures.samples.labels).tolist() == [5] * 200
