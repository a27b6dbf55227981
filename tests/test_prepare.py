"""Preparation: every source layout round-trips to the same pixels, every bad input is named, downloads survive."""

import gzip
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import prepared as prepared_module
from data.convert import decode
from data.download import RemoteFile, download
from data.labels import places_of
from data.prepare import prepare
from data.prepared import read_meta, read_prepared
from data.readers.layouts import open_source
from data.readers.npz import as_nhwc
from data.registry import known_names, known_set
from scripts.prepare_data import facts_of, main
from utils.errors import UserError


def colour_images(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    """(N, H, W, 3) random uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def class_files(
    classes=("cat", "dog"), per_class: int = 3, prefix: str = "", side: int = 8
) -> dict[str, bytes]:
    images = colour_images(len(classes) * per_class, side)
    return {
        f"{prefix}{name}/{index}.png": png(images[row * per_class + index])
        for row, name in enumerate(classes)
        for index in range(per_class)
    }


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def cifar_batch(images: np.ndarray, labels: list[int], label_key: bytes = b"labels") -> bytes:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({b"data": rows, label_key: labels}, protocol=2)


def prepare_known(name: str, root: Path, **options):
    return prepare(name, root, facts=facts_of(name), **options)


def prepare_custom(tmp_path: Path, source: Path, **options):
    """The prepared set and the notes, without those on the classes, which sets as small as these always cause."""
    folder, _, notes = prepare("mine", tmp_path / "root", source=source, **options)
    return read_prepared(folder), [note for note in notes if not is_about_classes(note)]


def is_about_classes(note: str) -> bool:
    return any(words in note for words in ("fewer than", "no test image", "--class_names"))


def class_notes(tmp_path: Path, source: Path, **options) -> list[str]:
    _, _, notes = prepare("mine", tmp_path / "root", source=source, **options)
    return [note for note in notes if is_about_classes(note)]


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    labels = np.arange(20) % 10
    pack = gzip.compress if compress else bytes
    ending = ".gz" if compress else ""
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte{ending}"] = pack(idx_bytes(images))
        files[f"{part}-labels-idx1-ubyte{ending}"] = pack(idx_bytes(labels))
    folder, meta, notes = prepare_known(
        "mnist_28", tmp_path / "root", source=write_files(tmp_path / "raw", files)
    )
    result = read_prepared(folder)
    assert np.array_equal(result.train.images, images[:, None]) and np.array_equal(result.test.labels, labels)
    assert (meta.num_train, meta.num_test, meta.class_names, notes) == (20, 20, tuple("0123456789"), [])


def test_cifar10_pickles_in_a_folder_with_their_archive_only(tmp_path):
    images, names = colour_images(10, 32), facts_of("cifar10_32").class_names
    files = {f"cifar-10-batches-py/data_batch_{i}": cifar_batch(images, list(range(10))) for i in range(1, 6)}
    files["cifar-10-batches-py/test_batch"] = cifar_batch(images[::-1], list(range(9, -1, -1)))
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps({b"label_names": [n.encode() for n in names]}, 2)
    (tmp_path / "raw").mkdir()
    write_tar(tmp_path / "raw" / "cifar-10-python.tar.gz", files, "w:gz")
    folder, meta, _ = prepare_known("cifar10_32", tmp_path / "root", source=tmp_path / "raw")
    result = read_prepared(folder)
    assert (meta.num_train, meta.num_test, meta.class_names) == (50, 10, names)
    assert np.array_equal(result.train.images[:10], images.transpose(0, 3, 1, 2))
    assert np.array_equal(result.test.labels, np.arange(9, -1, -1))


def test_cifar100_pickles_use_the_fine_labels(tmp_path):
    names = facts_of("cifar100_32").class_names
    batch = cifar_batch(colour_images(100, 32), list(range(100)), b"fine_labels")
    meta_file = pickle.dumps(
        {b"fine_label_names": [n.encode() for n in names], b"coarse_label_names": [b"a"]}, 2
    )
    source = write_files(tmp_path / "raw", {"train": batch, "test": batch, "meta": meta_file})
    _, meta, _ = prepare_known("cifar100_32", tmp_path / "root", source=source)
    assert (meta.num_train, meta.class_names) == (100, names)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    hostile = pickle.dumps({b"data": Hostile()})
    files = {"data_batch_1": hostile, "test_batch": hostile, "batches.meta": hostile}
    with pytest.raises(UserError, match=r"batches\.meta is not a CIFAR batch"):
        prepare_known("cifar10_32", tmp_path / "root", source=write_files(tmp_path / "raw", files))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", ["NHW", "NHW1", "N1HW", "NHWC", "NCHW", "NCHW of floats"])
def test_npz_layouts_of_images(tmp_path, layout):
    colour = colour_images(14, 8)
    grey = colour[..., 0]
    stored = {
        "NHW": grey,
        "NHW1": grey[..., None],
        "N1HW": grey[:, None],
        "NHWC": colour,
        "NCHW": colour.transpose(0, 3, 1, 2),
        "NCHW of floats": colour.transpose(0, 3, 1, 2) / np.float32(255),
    }
    labels = np.arange(14) % 2
    np.savez(tmp_path / "a.npz", x=stored[layout], y=labels)
    result, _ = prepare_custom(tmp_path, tmp_path / "a.npz", public=True)
    expected = colour.transpose(0, 3, 1, 2) if "C" in layout else grey[:, None]
    assert np.array_equal(result.train.images, expected) and np.array_equal(result.train.labels, labels)
    assert result.test is None


@pytest.mark.parametrize(
    "keys", [("x", "y"), ("images", "labels"), ("x_train", "y_train"), ("arr_0", "arr_1")]
)
def test_npz_key_names(tmp_path, keys):
    np.savez(tmp_path / "a.npz", **{keys[0]: colour_images(14), keys[1]: np.arange(14) % 2})
    np.savez(tmp_path / "b.npz", **{keys[0]: colour_images(6, seed=1), keys[1]: np.arange(6) % 2})
    result, notes = prepare_custom(tmp_path, tmp_path / "a.npz", test_source=tmp_path / "b.npz")
    assert len(result.train) == 14 and np.array_equal(
        result.test.images, colour_images(6, seed=1).transpose(0, 3, 1, 2)
    )
    assert notes == []


def test_of_two_axes_that_may_be_channels_the_first_is_taken():
    assert as_nhwc(np.zeros((5, 1, 8, 3), np.uint8), "").shape == (5, 8, 3)
    assert as_nhwc(np.zeros((5, 3, 8, 1), np.uint8), "").shape == (5, 8, 1, 3)


def test_medmnist_npz_joins_validation_to_training_and_logs_it(tmp_path):
    parts = {"train": 10, "val": 4, "test": 6}
    arrays = {f"{part}_images": colour_images(n, seed=n) for part, n in parts.items()}
    arrays |= {f"{part}_labels": (np.arange(n) % 2)[:, None].astype(np.uint8) for part, n in parts.items()}
    np.savez(tmp_path / "med.npz", **arrays)
    result, notes = prepare_custom(tmp_path, tmp_path / "med.npz")
    assert (len(result.train), len(result.test)) == (14, 6)
    assert any("4 validation" in note for note in notes)


def test_folder_of_train_and_test_npz_keeps_stated_class_names_in_their_order(tmp_path):
    (tmp_path / "raw").mkdir()
    for part, count in (("train", 12), ("test", 6)):
        np.savez(
            tmp_path / "raw" / part, x=colour_images(count), y=np.arange(count) % 3, classes=["z", "m", "a"]
        )
    result, _ = prepare_custom(tmp_path, tmp_path / "raw")
    assert result.meta.class_names == ("z", "m", "a") and (len(result.train), len(result.test)) == (12, 6)


def test_stated_class_names_in_another_order_than_the_published_one_are_mapped_by_name(tmp_path):
    names = facts_of("cifar10_32").class_names
    np.savez(tmp_path / "a.npz", x=colour_images(10, 32), y=np.arange(10), classes=names[::-1])
    folder, _, _ = prepare_known(
        "cifar10_32", tmp_path / "root", source=tmp_path / "a.npz", test_source=tmp_path / "a.npz"
    )
    assert np.array_equal(read_prepared(folder).train.labels, np.arange(9, -1, -1))


def npz_bytes(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing")])
def test_a_validation_npz_joins_training_or_is_the_test_part(tmp_path, names):
    parts = {
        f"{name}.npz": npz_bytes(x=colour_images(count, seed=count), y=np.arange(count) % 2)
        for name, count in zip(names, (10, 4, 6), strict=True)
    }
    result, notes = prepare_custom(tmp_path, write_files(tmp_path / "three", parts))
    assert (len(result.train), len(result.test)) == (14, 6)
    assert any("4 validation" in note for note in notes)
    del parts[f"{names[2]}.npz"]
    result, notes = prepare_custom(tmp_path, write_files(tmp_path / "two", parts), force=True)
    assert (len(result.train), len(result.test)) == (10, 4)
    (note,) = notes
    assert "4 validation images" in note and "test part" in note


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_class_folders_with_train_and_test(tmp_path, kind):
    files = class_files(prefix="top/train/") | class_files(per_class=2, prefix="top/test/")
    files["top/.DS_Store"] = b"litter"
    path = tmp_path / f"raw.{kind}"
    if kind == "folder":
        write_files(path, files)
    elif kind == "zip":
        write_zip(path, files)
    else:
        write_tar(path, files, "w:gz" if kind == "tar.gz" else "w")
    result, notes = prepare_custom(tmp_path, path, resolution=8)
    assert result.meta.class_names == ("cat", "dog") and len(notes) == 1 and ".DS_Store" in notes[0]
    assert np.array_equal(result.train.images, colour_images(6).transpose(0, 3, 1, 2))
    assert np.array_equal(result.test.images, colour_images(4).transpose(0, 3, 1, 2))
    assert np.array_equal(result.train.labels, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("names", [("Train", "Test", "Val"), ("training", "testing", "validation")])
def test_part_folders_under_other_names(tmp_path, names):
    train, test, val = (
        class_files(prefix=f"top/{name}/", per_class=n) for name, n in zip(names, (3, 2, 1), strict=True)
    )
    result, _ = prepare_custom(tmp_path, write_files(tmp_path / "two", train | test), resolution=8)
    assert result.meta.class_names == ("cat", "dog")
    assert (len(result.train), len(result.test)) == (6, 4)
    source = write_files(tmp_path / "three", train | test | val)
    result, notes = prepare_custom(tmp_path, source, resolution=8, force=True)
    assert (len(result.train), len(result.test)) == (8, 4)
    assert any("2 validation" in note for note in notes)


@pytest.mark.parametrize("names", [("train_set", "test_set"), ("Train2017", "val2017"), ("cats", "tests")])
def test_parts_under_names_of_ones_own_do_not_become_classes(tmp_path, names):
    files = {}
    for name in names:
        files |= class_files(prefix=f"top/{name}/")
    with pytest.raises(UserError, match="train, test and val"):
        prepare_custom(tmp_path, write_files(tmp_path / "two", files), resolution=8)
    flat = {f"top/{name}/{i}.png": PICTURE for name in names for i in range(4)}
    assert prepare_custom(tmp_path, write_files(tmp_path / "flat", flat), resolution=8)[
        0
    ].meta.class_names == tuple(sorted(names))


def test_archive_order_does_not_matter(tmp_path):
    files = class_files()
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "b.tar", dict(reversed(files.items())))
    hashes = {
        prepare_custom(tmp_path, tmp_path / f"{n}.tar", resolution=8, force=True)[0].meta.content_hash
        for n in "ab"
    }
    assert len(hashes) == 1


def test_tar_of_tars_is_read_as_class_folders(tmp_path):
    outer = {}
    for name in ("n01", "n02"):
        inner = write_tar(
            tmp_path / f"{name}.tar", {f"{name}_{i}.png": png(colour_images(1)[0]) for i in range(3)}
        )
        outer[f"{name}.tar"] = inner.read_bytes()
    path = write_tar(tmp_path / "ILSVRC2012_img_train.tar", outer)
    folder, meta, _ = prepare("imagenet", tmp_path / "root", source=path, resolution=8)
    assert folder.name == "imagenet_8" and meta.class_names == ("n01", "n02") and meta.num_train == 6


def test_flat_files_take_the_class_from_their_name_and_numbers_sort_by_value(tmp_path):
    files = {f"{label}_{i}.jpg": png(colour_images(1)[0]) for label in ("10", "2", "0") for i in range(2)}
    result, _ = prepare_custom(tmp_path, write_files(tmp_path / "raw", files), public=True, resolution=8)
    assert result.meta.class_names == ("0", "2", "10")
    assert np.array_equal(np.bincount(result.train.labels), [2, 2, 2])


def test_zip_with_dataset_json(tmp_path):
    images = colour_images(4)
    files = {f"00000/img{i:08d}.png": png(image) for i, image in enumerate(images)}
    labels = [[name, i % 2] for i, name in enumerate(files)]
    path = write_zip(
        tmp_path / "train.zip", files | {"dataset.json": json.dumps({"labels": labels}).encode()}
    )
    result, _ = prepare_custom(tmp_path, path, public=True, resolution=8)
    assert np.array_equal(result.train.images, images.transpose(0, 3, 1, 2))
    assert np.array_equal(result.train.labels, [0, 1, 0, 1])


def listed(folder: str, values: list[int]) -> dict[str, bytes]:
    """Grey images of these values in a folder with a dataset.json; their labels are 0 and 1 in turn."""
    names = [f"{value}.png" for value in values]
    files = {
        folder + name: png(np.full((8, 8), value, np.uint8))
        for name, value in zip(names, values, strict=True)
    }
    labels = {"labels": [[name, row % 2] for row, name in enumerate(names)]}
    return files | {f"{folder}dataset.json": json.dumps(labels).encode()}


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing")])
def test_of_several_dataset_json_each_is_of_its_folder(tmp_path, names):
    source = write_zip(tmp_path / "a.zip", listed(f"{names[0]}/", [1, 2, 3]) | listed(f"{names[1]}/", [7, 8]))
    result, _ = prepare_custom(tmp_path, source, resolution=8)
    parts = (result.train, result.test)
    assert [sorted(part.images[:, 0, 0, 0].tolist()) for part in parts] == [[1, 2, 3], [7, 8]]


@pytest.mark.parametrize("form", ["txt", "csv"])
def test_celeba_folder(tmp_path, form):
    """Files 1..6: the official partition is 0 0 0 0 1 2, and Male alternates."""
    names = [f"{number:06d}.jpg" for number in range(1, 7)]
    male, partition = [1, -1, 1, -1, 1, -1], [0, 0, 0, 0, 1, 2]
    if form == "txt":
        attributes = "6\nSmiling Male Young\n" + "".join(
            f"{n}  -1 {m:2d} 1\n" for n, m in zip(names, male, strict=True)
        )
        parts = "".join(f"{n} {p}\n" for n, p in zip(names, partition, strict=True))
    else:
        rows = (f"{n},-1,{m},1\n" for n, m in zip(names, male, strict=True))
        attributes = "image_id,Smiling,Male,Young\n" + "".join(rows)
        parts = "image_id,partition\n" + "".join(f"{n},{p}\n" for n, p in zip(names, partition, strict=True))
    pictures = {
        f"img_align_celeba/{n}": png(np.full((218, 178, 3), 40 * i, np.uint8)) for i, n in enumerate(names)
    }
    raw = tmp_path / "raw"
    write_files(
        raw, {f"list_attr_celeba.{form}": attributes.encode(), f"list_eval_partition.{form}": parts.encode()}
    )
    if form == "txt":
        write_zip(raw / "img_align_celeba.zip", pictures)
    else:
        write_files(raw, pictures)
    folder, meta, notes = prepare_known("celeba_male_32", tmp_path / "root", source=raw)
    result = read_prepared(folder)
    assert (meta.num_train, meta.num_test, meta.class_names) == (4, 1, ("female", "male"))
    assert np.array_equal(result.train.labels, [1, 0, 1, 0]) and np.array_equal(result.test.labels, [0])
    assert (result.train.images[3] == 120).all()
    validation, sizes = notes
    assert "validation" in validation and names[4] in validation
    assert sizes == "celeba_male_32: images of 178x218: cropped to the central square and resized to 32x32"


def test_eurosat_is_split_at_random_by_a_fixed_seed(tmp_path):
    names = facts_of("eurosat_32").class_names
    path = write_zip(tmp_path / "EuroSAT_RGB.zip", class_files(names, 27, "EuroSAT_RGB/", side=4))
    results = [prepare_known("eurosat_32", tmp_path / root, source=path) for root in ("a", "b")]
    assert (results[0][1].num_train, results[0][1].num_test) == (230, 40)
    assert results[0][1].sha256 == results[1][1].sha256
    assert "40 of 270" in results[0][2][0]


def test_emnist_letters_are_picked_turned_upright_and_counted_from_zero(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (52, 28, 28), np.uint8)
    labels = np.arange(52) % 26 + 1
    files = {"gzip/emnist-digits-train-images-idx3-ubyte.gz": b"another split, not to be read"}
    files["gzip/emnist-letters-train-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images))
    files["gzip/emnist-letters-train-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels))
    folder, meta, _ = prepare("emnist", tmp_path / "root", source=write_zip(tmp_path / "gzip.zip", files))
    result = read_prepared(folder)
    assert np.array_equal(result.train.images[:, 0], images.transpose(0, 2, 1))
    assert np.array_equal(result.train.labels, labels - 1) and meta.class_names[0] == "a"


def test_places_classes_are_the_path_below_the_letter(tmp_path):
    picture = png(colour_images(1)[0])
    files = {f"data_256/{p}/1.jpg": picture for p in ("a/airfield", "a/apartment_building/outdoor", "b/bar")}
    _, meta, _ = prepare(
        "places365", tmp_path / "root", source=write_tar(tmp_path / "p.tar", files), resolution=8
    )
    assert meta.class_names == ("airfield", "apartment_building/outdoor", "bar")


# ------------------------------------------------------------------------------------------------ conversion


def test_mixed_sizes_are_cropped_resized_and_reported_once(tmp_path):
    files = class_files(side=16)
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200  # the central square
    files["cat/wide.png"] = png(wide)
    result, notes = prepare_custom(tmp_path, write_files(tmp_path / "raw", files), public=True, resolution=8)
    assert notes == [
        "mine: mixed image sizes (16x16: 6, 48x16: 1): cropped to the central square and resized to 8x8"
    ]
    assert (result.train.images[3] == 200).all()  # cat/0, cat/1, cat/2, cat/wide


def test_grey_follows_pillow(tmp_path):
    images = colour_images(10)
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(10) % 2)
    result, _ = prepare_custom(tmp_path, tmp_path / "a.npz", channels=1, public=True)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    assert np.array_equal(result.train.images[:, 0], expected)


def mixed_files(prefix: str = "") -> dict[str, bytes]:
    """Three grey and three colour images."""
    images = colour_images(6)
    return {
        f"{prefix}{name}/{row}.png": png(images[row][..., 0] if name == "cat" else images[row])
        for row, name in enumerate(["cat"] * 3 + ["dog"] * 3)
    }


def test_grey_and_colour_are_mixed_only_where_channels_are_given(tmp_path):
    for kind, files in (
        ("one part", mixed_files()),
        ("two parts", class_files(prefix="train/") | mixed_files("test/")),
    ):
        source = write_files(tmp_path / kind, files)
        with pytest.raises(
            UserError, match=r"mine: 3 images are grey and \d+ are in colour; give --channels 1 or 3"
        ):
            prepare_custom(tmp_path, source)
        assert not (tmp_path / "root" / "mine").exists()
    result, notes = prepare_custom(tmp_path, tmp_path / "one part", channels=3, public=True, resolution=8)
    assert result.train.images.shape == (6, 3, 8, 8)
    assert notes == ["mine: grey images are converted to colour: 3 of 6"]


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_a_conversion_of_channels_is_logged(tmp_path, form):
    np.savez(tmp_path / "a.npz", x=colour_images(6), y=np.arange(6) % 2)
    source = tmp_path / "a.npz" if form == "npz" else write_files(tmp_path / "raw", class_files())
    _, notes = prepare_custom(tmp_path, source, channels=1, public=True, resolution=8)
    assert notes == [
        "mine: colour images are converted to grey (0.299 red + 0.587 green + 0.114 blue): 6 of 6"
    ]
    assert prepare_custom(tmp_path, source, public=True, resolution=8, force=True)[1] == []


def test_custom_set_without_test_part_gives_a_seventh_of_each_class(tmp_path):
    labels = np.repeat([0, 1, 2], [70, 35, 14])
    images = (
        np.arange(119, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    )  # each image states its row
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    result, notes = prepare_custom(tmp_path, tmp_path / "a.npz")
    assert np.array_equal(np.bincount(result.test.labels), [10, 5, 2])
    rows = [part.images[:, 0, 0, 0] for part in (result.train, result.test)]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(119))
    assert "17 of 119" in notes[0]
    assert notes[0].endswith("test images have no privacy protection")


def test_class_folders_under_other_names_are_taken_in_order_and_logged(tmp_path):
    files = class_files(("0", "1"), prefix="train/") | class_files(("0", "1"), prefix="test/")
    _, meta, notes = prepare_known(
        "camelyon_32", tmp_path / "root", source=write_files(tmp_path / "raw", files)
    )
    assert meta.class_names == ("normal", "tumor")
    (note,) = (note for note in notes if "normal, tumor" in note)
    assert note.index("0, 1") < note.index("normal, tumor")


def fashion(tmp_path, names) -> tuple:
    """Labels and notes of F-MNIST in folders of these names, in the published order, one image in each."""
    files = {
        f"{part}/{name}/0.png": png(np.full((28, 28), label, np.uint8))
        for part in ("train", "test")
        for label, name in enumerate(names)
    }
    source = write_files(tmp_path / "raw", files)
    folder, _, notes = prepare_known("fmnist_28", tmp_path / "root", source=source)
    train = read_prepared(folder).train
    return dict(zip(train.images[:, 0, 0, 0].tolist(), train.labels.tolist(), strict=True)), notes


def test_class_names_are_compared_without_case_and_punctuation(tmp_path):
    names = [name.replace("/", "_").replace(" ", "-").lower() for name in facts_of("fmnist_28").class_names]
    assert fashion(tmp_path, names) == ({label: label for label in range(10)}, [])


def test_class_names_of_which_only_some_match_are_refused(tmp_path):
    names = [name.replace("/", "_") for name in facts_of("fmnist_28").class_names]
    names[1] = "Jeans"
    with pytest.raises(UserError, match=r"Jeans.*Trouser"):
        fashion(tmp_path, names)
    assert not (tmp_path / "root" / "fmnist_28").exists()


def test_names_that_differ_only_in_punctuation_are_distinguished():
    assert places_of(("a-b", "ab"), ["ab", "a-b"]) == {"ab": 1, "a-b": 0}
    assert places_of(("+", "-"), ["-"]) == {"-": 1}
    assert places_of(("cat", "dog"), ["Cat", "cat"]) == {"cat": 0}


# ------------------------------------------------------------------------------------------------ bad input


PICTURE = png(colour_images(1)[0])
IMAGES, LABELS = colour_images(14), np.arange(14) % 2
GREY = idx_bytes(IMAGES[..., 0])


def folder_with(**extra: bytes):
    """A maker of two good class folders and one more file; "/" and "." are written __ and _ in its name."""
    files = {name.replace("__", "/").replace("_", "."): content for name, content in extra.items()}
    return lambda path: write_files(path, class_files() | files)


def folder_of(files: dict[str, bytes]):
    return lambda path: write_files(path, files)


def npz_of(**arrays):
    return lambda path: np.savez(path / "a.npz", **arrays) or path / "a.npz"


def zip_of(dataset_json: bytes):
    return lambda path: write_zip(path / "a.zip", {"a.png": PICTURE, "dataset.json": dataset_json})


def truncated(make, keep: int):
    def make_truncated(path: Path) -> Path:
        whole = make(path)
        whole.write_bytes(whole.read_bytes()[:keep])
        return whole

    return make_truncated


def test_an_empty_class_folder_is_reported(tmp_path):
    source = write_files(tmp_path / "raw", class_files())
    (source / "elk" / "young").mkdir(parents=True)
    _, meta, notes = prepare("pets", tmp_path / "data", source=source)
    assert "elk" not in meta.class_names
    assert [note for note in notes if " elk:" in note]


def test_an_alpha_channel_that_hides_nothing_is_dropped(tmp_path):
    opaque = np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255, np.uint8)])
    source = write_files(tmp_path / "raw", class_files() | {"cat/opaque.png": png(opaque)})
    _, meta, _ = prepare("pets", tmp_path / "data", source=source)
    _, without, _ = prepare("cats", tmp_path / "data", source=write_files(tmp_path / "less", class_files()))
    num_images = [part.num_train + part.num_test for part in (meta, without)]
    assert num_images[0] == num_images[1] + 1


@pytest.mark.parametrize(
    ("entries", "turned"),
    [
        ([], True),
        ([(0x11A, 2, 4, b"abcd")], True),  # a resolution that is a text: TypeError
        ([(0x102, 12, 1, b"")], True),  # a number of bits that is a fraction: struct.error
        (None, False),  # no EXIF at all behind its name
    ],
)
def test_malformed_exif_does_not_hide_the_orientation(entries, turned):
    rows = [(0x112, 3, 1, struct.pack("<H", 6)), *(entries or [])]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(rows))
    exif += b"".join(struct.pack("<HHI4s", *row) for row in rows) + bytes(4)
    buffer = io.BytesIO()
    picture = Image.fromarray(colour_images(1, 8)[0, :6])
    picture.save(buffer, "JPEG", exif=exif if entries is not None else b"Exif\0\0abc")
    assert decode(buffer.getvalue(), "a.jpg").size == ((6, 8) if turned else (8, 6))


def test_an_orientation_that_is_no_whole_number_by_type():
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIf", 8, 1, 0x112, 11, 1, 6.0) + bytes(4)
    buffer = io.BytesIO()
    Image.fromarray(colour_images(1, 8)[0, :6]).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), "a.jpg").size == (6, 8)


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(colour_images(1, 8)[0, :6]).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer))
    assert np.array_equal(np.asarray(decode(buffer.getvalue(), "a.png")), np.asarray(expected))


BAD_SOURCES = {
    "no such path": (lambda path: path / "nothing", "nothing: no such file"),
    "empty folder": (folder_of({}), "empty, there are no images"),
    "one class": (folder_of(class_files(("cat",), prefix="train/")), r"only one class \(cat\)"),
    "corrupt image": (folder_with(cat__x_png=PICTURE[:60]), r"cat/x\.png: not an image"),
    "text file": (folder_with(dog__notes_dat=b"hi"), r"dog/notes\.dat: not an image"),
    "stray image": (folder_with(x_png=PICTURE), r"x\.png.*class folders"),
    "16 bit": (
        folder_with(cat__deep_png=png(np.zeros((8, 8), np.uint16))),
        r"cat/deep\.png: more than 8 bits",
    ),
    "see-through": (
        folder_with(cat__hole_png=png(np.full((8, 8, 4), 254, np.uint8))),
        r"cat/hole\.png: has transparent pixels",
    ),
    "no class": (folder_of({"a.png": PICTURE, "b.png": PICTURE}), r"a\.png.*class folder"),
    "new test class": (
        folder_of(class_files(prefix="train/") | class_files(("cow",), prefix="test/")),
        "'cow'",
    ),
    "not an archive": (lambda path: write_files(path, {"a.zip": b"?"}) / "a.zip", "neither a folder nor"),
    "truncated zip": (truncated(zip_of(b"{}"), 200), r"a\.zip: corrupt or truncated"),
    "truncated tar": (
        truncated(lambda path: write_tar(path / "a.tar", class_files()), 2000),
        r"a\.tar: corrupt",
    ),
    "truncated npz": (truncated(npz_of(x=IMAGES, y=LABELS), 99), r"a\.npz: corrupt, truncated"),
    "no known keys": (npz_of(pictures=IMAGES, y=LABELS), "holds y and no images"),
    "pickled array": (npz_of(x=np.array([{}], object), y=LABELS), "not an npz of plain arrays"),
    "float images": (npz_of(x=IMAGES / 1.0, y=LABELS), "floats must be in .* be uint8"),
    "image shape": (npz_of(x=IMAGES[..., :2], y=LABELS), r"shape \(14, 8, 8, 2\)"),
    "no images": (npz_of(x=IMAGES[:0], y=LABELS[:0]), "no images"),
    "label counts": (npz_of(x=IMAGES, y=LABELS[:9]), "9 labels for 14 images"),
    "negative label": (npz_of(x=IMAGES, y=LABELS - 1), "labels run from -1 to 0"),
    "label gap": (npz_of(x=IMAGES, y=LABELS * 2), r"class 1 \(1\) has no training image"),
    "huge label": (npz_of(x=IMAGES, y=LABELS * 10**9), "label 1000000000 among"),
    "label beyond names": (npz_of(x=IMAGES, y=LABELS * 2, classes=["a", "b"]), "allowed are 0 to 1"),
    "several labels": (npz_of(x=IMAGES, y=np.zeros((14, 3), int)), "one integer or class name per image"),
    "null labels": (zip_of(b'{"labels": null}'), "no list 'labels'"),
    "vector label": (zip_of(b'{"labels": [["a.png", [0, 1]]]}'), r"labels a\.png with \[0, 1\]"),
    "listed, missing": (zip_of(b'{"labels": [["b.png", 0]]}'), r"dataset\.json lists b\.png"),
    "truncated idx": (folder_of({"train-images-idx3-ubyte": GREY[:-5]}), "truncated, 891 bytes"),
    "not idx": (folder_of({"train-images-idx3-ubyte": b"<html>"}), "not an idx file"),
    "truncated gzip": (
        folder_of({"train-images-idx3-ubyte.gz": gzip.compress(GREY)[:-50]}),
        "truncated gzip",
    ),
    "two listings": (
        folder_of(listed("a/", [1, 2]) | listed("b/", [3, 4])),
        r"a/dataset\.json, b/dataset\.json; allowed: ",
    ),
    "listings without training": (
        folder_of(listed("test/", [1, 2]) | listed("val/", [3, 4])),
        r"holds test/dataset\.json, val/dataset\.json",
    ),
    "parts without training": (
        folder_of(class_files(prefix="val/") | class_files(prefix="Test/")),
        "test and val.*train",
    ),
    "npz in an archive": (
        lambda path: write_zip(path / "a.zip", {"train.npz": npz_bytes(x=IMAGES, y=LABELS)}),
        r"a\.zip: .*train\.npz.*unpack",
    ),
    "another npz beside training": (
        folder_of({f"{name}.npz": npz_bytes(x=IMAGES, y=LABELS) for name in ("train", "more")}),
        r"more\.npz is not one of train\.npz, test\.npz and val\.npz",
    ),
    "npz of parts beside another": (
        folder_of(
            {
                "train.npz": npz_bytes(x=IMAGES, y=LABELS, x_test=IMAGES, y_test=LABELS),
                "test.npz": npz_bytes(x=IMAGES, y=LABELS),
            }
        ),
        r"train\.npz: has several parts itself",
    ),
    "validation of another size": (
        npz_of(
            train_images=IMAGES,
            train_labels=LABELS,
            test_images=IMAGES,
            test_labels=LABELS,
            val_images=IMAGES[:, 1:],
            val_labels=LABELS,
        ),
        r"\(8, 8, 3\).*\(7, 8, 3\)",
    ),
    "npy by the name of npz": (
        lambda path: (np.save(path / "a.npy", IMAGES), (path / "a.npy").rename(path / "a.npz"))[1],
        r"a\.npz: one array, not an npz",
    ),
    "scalar image": (npz_of(x=np.float32(0.5), y=LABELS), r"x: shape \(\); allowed"),
    "scalar class": (npz_of(x=IMAGES, y=LABELS, classes="cat"), r"classes: shape \(\); allowed: one name"),
    "no pixels": (
        npz_of(x=IMAGES[:, :0, :0], y=LABELS),
        r"x: shape \(14, 0, 0, 3\); images have at least one",
    ),
    "no rows": (npz_of(x=IMAGES[:, :0, :, 0] / 1.0, y=LABELS), r"x: shape \(14, 0, 8\)"),
    "idx of no pixels": (
        folder_of(
            {
                "train-images-idx3-ubyte": idx_bytes(IMAGES[:, :0, :, 0]),
                "train-labels-idx1-ubyte": idx_bytes(LABELS),
            }
        ),
        r"shape \(14, 0, 8\); images have at least one",
    ),
    "no test image": (
        npz_of(x=IMAGES, y=LABELS, x_test=IMAGES[:0], y_test=LABELS[:0]),
        "no images in its training or test part",
    ),
    "no label file": (folder_of({"train-images-idx3-ubyte": GREY}), "train-labels"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source_is_named_and_leaves_nothing_behind(tmp_path, name):
    make, message = BAD_SOURCES[name]
    (tmp_path / "raw").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        prepare("mine", tmp_path / "root", source=make(tmp_path / "raw"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(data_name="digits_8"), "digits_8 is embedded"),
        (dict(data_name="cifar10_23"), "did you mean 'cifar10_32'"),
        (dict(data_name="../x", source=Path("a")), r"'\.\./x' is not allowed"),
        (dict(data_name="imagenet"), "imagenet.*image-net.org"),
        (dict(data_name="CELEBA_male_64"), "celeba_male_64.*--source"),
        (dict(data_name="cifar10_32", resolution=64), "--resolution: cifar10_32 has 32"),
        (dict(data_name="mine", channels=2), "--channels: 2 is not allowed"),
        (dict(data_name="mine", resolution=2), "--resolution: 2 is not allowed"),
        (dict(data_name="mnist_28"), "mnist_28: .*--test_source"),
        (dict(data_name="cifar10_32", test_source=True), "2 classes .*10.*airplane"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    source = write_files(tmp_path / "raw", class_files())
    options = {**options, **({"test_source": source} if options.get("test_source") else {})}
    needs_source = options["data_name"] in ("mine", "mnist_28", "cifar10_32")
    with pytest.raises(UserError, match=message):
        prepare(
            **{
                "source": source if needs_source else None,
                "data_root": tmp_path / "root",
                "facts": facts_of(options["data_name"]),
                **options,
            }
        )


def test_a_folder_that_is_not_prepared_data_is_not_replaced(tmp_path):
    keep = write_files(tmp_path / "root" / "mine", {"precious.txt": b"1"})
    with pytest.raises(UserError, match="is not prepared data"):
        prepare("mine", tmp_path / "root", source=write_files(tmp_path / "raw", class_files()))
    assert (keep / "precious.txt").read_bytes() == b"1"


def test_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(prepared_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="disk full"):
        prepare("mine", tmp_path / "root", source=write_files(tmp_path / "raw", class_files()))
    assert list((tmp_path / "root").iterdir()) == []


def test_a_prepared_set_is_replaced_only_with_force(tmp_path):
    names = set()
    for count, force in ((14, False), (28, True), (28, True)):
        np.savez(tmp_path / "a.npz", x=colour_images(count), y=np.arange(count) % 2)
        folder, meta, _ = prepare("mine", tmp_path / "root", source=tmp_path / "a.npz", force=force)
        assert meta.num_train + meta.num_test == count
        names.add(meta.identity)
        with pytest.raises(UserError, match=f"{folder} .*{tmp_path / 'a.npz'}.*--force"):
            prepare("mine", tmp_path / "root", source=tmp_path / "a.npz")
        assert read_meta(folder) == meta
    assert len(names) == 3, "the random name of the same images made again"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["mine"]


def test_a_published_set_that_is_already_prepared_is_kept(tmp_path):
    """No second download: the command may stand in a script that is started again."""
    files = {"train-images-idx3-ubyte": idx_bytes(np.zeros((20, 28, 28), np.uint8))}
    files["train-labels-idx1-ubyte"] = idx_bytes(np.arange(20) % 10)
    files |= {name.replace("train", "t10k"): content for name, content in files.items()}
    folder, meta, _ = prepare_known(
        "mnist_28", tmp_path / "root", source=write_files(tmp_path / "raw", files)
    )
    assert prepare_known("mnist_28", tmp_path / "root") == (folder, meta, [ANY])
    with pytest.raises(UserError, match="--channels"):
        prepare_known("mnist_28", tmp_path / "root", channels=3)


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        ({"resolution": 3}, "--resolution: 3"),
        ({"channels": 2}, "--channels: 2"),
        ({"source": Path("nowhere")}, "--source: nowhere"),
        ({"test_source": Path("nowhere")}, "--test_source"),
        ({"images_per_person": 2}, "--groups"),
        ({"images_per_person": 0, "groups": "folder"}, "--images_per_person: 0"),
        ({"groups": "("}, "--groups"),
        ({"groups": "nowhere.csv:patient"}, r"nowhere\.csv"),
        ({"groups": "folder", "public": True}, "--groups"),
    ],
)
def test_a_prepared_set_does_not_hide_a_mistake(tmp_path, more, flag):
    np.savez(tmp_path / "a.npz", x=colour_images(28)[..., 0], y=np.arange(28) % 2)
    prepare("mine", tmp_path / "root", source=tmp_path / "a.npz")
    with pytest.raises(UserError, match=flag):
        prepare("mine", tmp_path / "root", **more)


def test_script_prints_what_it_did_and_exits_with_2_on_bad_input(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=colour_images(28)[..., 0], y=np.arange(28) % 2)
    arguments = ["--data_name", "mine", "--data_root", str(tmp_path / "root"), "--source"]
    assert main([*arguments, str(tmp_path / "a.npz")]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("24 training", "4 test", "2 classes", "8x8", "grey"))
    assert "use it: python run.py --data_name mine" in text
    assert main([*arguments, str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("inside", ["", "pneumonia/"])
def test_folders_of_patients_that_become_classes_are_reported(tmp_path, inside):
    files = class_files(("patient-00",), 1, prefix=inside)
    files |= class_files([f"patient-{number:02}" for number in range(1, 12)], 9, prefix=inside)
    (warning,) = class_notes(tmp_path, write_files(tmp_path / "scans", files))
    assert "12 of 12 classes" in warning and "(patient-00)" in warning
    assert f"each folder in scans/{inside}".rstrip("/") + " is" in warning
    assert "--groups folder" in warning and "\n" not in warning


def test_many_classes_without_a_test_image_are_not_all_listed(tmp_path):
    files = class_files([f"c{number:02}" for number in range(20)], 1) | class_files(["dog"], 7)
    (warning,) = class_notes(tmp_path, write_files(tmp_path / "scans", files))
    assert "20 classes" in warning and "c00" in warning and "c19" not in warning


@pytest.mark.parametrize(("layout", "remedy"), [("flat", "underscore"), ("npz", "labels")])
def test_the_likely_cause_of_tiny_classes_fits_the_layout(tmp_path, layout, remedy):
    images, labels = colour_images(40), np.arange(40) % 20
    if layout == "npz":
        source = tmp_path / "a.npz"
        np.savez(source, x=images, y=labels.astype(str))
    else:
        files = {f"{labels[row]}_{row}.png": png(image) for row, image in enumerate(images)}
        source = write_files(tmp_path / "raw", files)
    (warning,) = class_notes(tmp_path, source)
    assert "20 of 20 classes" in warning and remedy in warning and "each folder" not in warning


@pytest.mark.parametrize("public", [False, True])
def test_usual_classes_cause_no_warning(tmp_path, public):
    source = write_files(tmp_path / "raw", class_files(per_class=10))
    assert class_notes(tmp_path, source, public=public) == []


@pytest.mark.parametrize(("side", "hinted"), [(28, True), (64, False)])
def test_how_to_keep_small_images_as_they_are_is_reported(tmp_path, side, hinted):
    _, notes = prepare_custom(tmp_path, write_files(tmp_path / "raw", class_files(per_class=7, side=side)))
    assert any("32x32" in note for note in notes)
    assert any("--resolution 28" in note for note in notes) == hinted


@pytest.mark.parametrize(
    ("content", "kind"), [(bytes(128) + b"DICM" + bytes(9), "DICOM"), (b"\0\0\0\x18ftypheic\0", "HEIC")]
)
def test_image_files_of_other_kinds_are_named(tmp_path, content, kind):
    source = write_files(tmp_path / "raw", class_files() | {"cat/scan": content})
    with pytest.raises(UserError, match=f"cat/scan: {kind}.*PNG"):
        prepare_custom(tmp_path, source)


@pytest.mark.parametrize(
    ("name", "allowed"), [("\xfcbersicht", True), ("_a", False), (".a", False), ("a/b", False)]
)
def test_names_of_sets_begin_with_a_letter_or_a_digit(tmp_path, name, allowed):
    source = write_files(tmp_path / "raw", class_files())
    if allowed:
        assert prepare(name, tmp_path / "root", source=source)[1].name == name
        return
    with pytest.raises(UserError, match="--data_name"):
        prepare(name, tmp_path / "root", source=source)


def test_a_given_test_part_without_a_class_is_reported(tmp_path):
    files = class_files(per_class=12, prefix="train/") | class_files(("dog",), 12, prefix="test/")
    (warning,) = class_notes(tmp_path, write_files(tmp_path / "raw", files))
    assert "(cat)" in warning


@pytest.mark.parametrize("named", ["nowhere", "in the file", "on the command line"])
def test_how_to_name_the_classes_is_reported_if_they_have_no_names(tmp_path, named):
    arrays = {"x": colour_images(60), "y": np.arange(60) % 2}
    if named == "in the file":
        arrays["class_names"] = ["cat", "dog"]
    np.savez(tmp_path / "a.npz", **arrays)
    names = ("cat", "dog") if named == "on the command line" else None
    notes = class_notes(tmp_path, tmp_path / "a.npz", class_names=names)
    assert sum("--class_names" in note for note in notes) == (named == "nowhere")


def test_every_known_set_can_be_downloaded_or_names_its_source():
    for name in known_names():
        known = known_set(name)
        assert known.downloads or known.advice, name
        assert all(len(remote.md5) == 32 and remote.urls for remote in known.downloads), name


def test_digests_and_first_mirrors_are_those_of_torchvision():
    from torchvision import datasets

    expected = {
        "mnist_28": [(datasets.MNIST.mirrors[0] + name, md5) for name, md5 in datasets.MNIST.resources],
        "fmnist_28": [
            (datasets.FashionMNIST.mirrors[0] + name, md5) for name, md5 in datasets.FashionMNIST.resources
        ],
        "cifar10_32": [(datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5)],
        "cifar100_32": [(datasets.CIFAR100.url, datasets.CIFAR100.tgz_md5)],
        "emnist": [(datasets.EMNIST.url, datasets.EMNIST.md5)],
    }
    for name, files in expected.items():
        assert [(file.urls[0], file.md5) for file in known_set(name).downloads] == files, name


def test_facts_of_a_published_set_are_those_of_its_configuration():
    facts = facts_of("MNIST_28")
    assert (facts.resolution, facts.channels, facts.class_names) == (28, 1, tuple("0123456789"))
    assert facts_of("emnist") is None and facts_of("mine") is None


@pytest.mark.parametrize("change", [{"resolution": 16}, {"channels": 3}])
def test_prepared_set_of_another_size_is_not_kept_without_a_message(tmp_path, change):
    source = write_files(tmp_path / "raw", class_files())
    prepare("mine", tmp_path / "root", source=source, resolution=8, channels=1)
    with pytest.raises(UserError, match="--force"):
        prepare("mine", tmp_path / "root", **change)
    assert prepare("mine", tmp_path / "root", resolution=8, channels=1)[1].resolution == 8


def test_published_public_set_at_another_resolution_does_not_stand_for_the_usual_one(tmp_path):
    source = write_files(tmp_path / "raw", class_files())
    prepare("imagenet", tmp_path / "root", source=source)
    with pytest.raises(UserError, match="cannot be downloaded"):
        prepare("imagenet", tmp_path / "root", resolution=16)


# ------------------------------------------------------------------------------------------------ downloads

CONTENT = np.random.default_rng(1).integers(0, 256, 300_000, np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Mirror(http.server.BaseHTTPRequestHandler):
    """/good resumes; /whole ignores Range; /html, /wrong and /missing misbehave; /cut breaks off once, then resumes."""

    requests: list[tuple[str, str | None]]  # (path, Range header) of this test

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        if self.path == "/missing":
            return self.send_error(404)
        body = {"/html": b"<!DOCTYPE html><p>Please log in", "/wrong": CONTENT[::-1]}.get(self.path, CONTENT)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.path != "/whole" else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = start + 100_000 if self.path == "/cut" and start == 0 else len(body)
        self.wfile.write(body[start:stop])

    def log_message(self, *_):
        """Keep the output of the tests clean."""


@pytest.fixture
def mirror():
    handler = type("Handler", (Mirror,), {"requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.requests
    server.shutdown()
    thread.join()
    server.server_close()


def remote(base: str, *paths: str) -> RemoteFile:
    return RemoteFile("file.bin", tuple(base + path for path in paths), MD5)


def test_download_fails_over_to_the_next_mirror(tmp_path, mirror):
    base, requests = mirror
    path = download(remote(base, "/missing", "/html", "/wrong", "/good"), tmp_path)
    assert path.read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    assert [request[0] for request in requests] == ["/missing", "/html", "/wrong", "/good"]


def test_download_lists_what_is_wrong_with_every_mirror(tmp_path, mirror):
    base, _ = mirror
    with pytest.raises(UserError) as raised:
        download(remote(base, "/missing", "/html", "/wrong"), tmp_path)
    for reason in ("HTTP 404", "HTML page", "wrong content", str(tmp_path)):
        assert reason in str(raised.value)
    assert not (tmp_path / "file.bin").exists()


def test_download_resumes_a_partial_file(tmp_path, mirror):
    base, requests = mirror
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:50_000])
    assert download(remote(base, "/good"), tmp_path).read_bytes() == CONTENT
    assert requests == [("/good", "bytes=50000-")]


def test_download_resumes_after_the_connection_broke(tmp_path, mirror):
    base, requests = mirror
    assert download(remote(base, "/cut"), tmp_path).read_bytes() == CONTENT
    assert requests == [("/cut", None), ("/cut", "bytes=100000-")]


def test_download_starts_over_where_the_server_cannot_resume(tmp_path, mirror):
    base, _ = mirror
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:50_000])
    assert download(remote(base, "/whole"), tmp_path).read_bytes() == CONTENT


def test_download_discards_a_partial_file_of_something_else(tmp_path, mirror):
    base, requests = mirror
    (tmp_path / "file.bin.part").write_bytes(b"x" * 50_000)
    assert download(remote(base, "/good"), tmp_path).read_bytes() == CONTENT
    assert requests == [("/good", "bytes=50000-"), ("/good", None)]


def test_a_complete_partial_file_and_a_finished_file_are_kept(tmp_path, mirror):
    base, requests = mirror
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download(remote(base, "/good"), tmp_path).read_bytes() == CONTENT
    download(remote(base, "/good"), tmp_path)
    assert requests == [("/good", f"bytes={len(CONTENT)}-")]


def test_known_set_is_downloaded_into_the_cache_and_prepared(tmp_path, mirror, monkeypatch):
    base, _ = mirror
    archive = write_zip(tmp_path / "e.zip", class_files(facts_of("eurosat_32").class_names, 14, "E/", side=4))
    monkeypatch.setitem(globals(), "CONTENT", archive.read_bytes())
    file = RemoteFile("EuroSAT_RGB.zip", (f"{base}/good",), hashlib.md5(archive.read_bytes()).hexdigest())
    known = known_set("eurosat_32")
    monkeypatch.setattr(
        "data.prepare.known_set", lambda name: type(known)(**{**vars(known), "downloads": (file,)})
    )
    folder, meta, _ = prepare_known("eurosat_32", tmp_path / "root")
    assert meta.num_train + meta.num_test == 140 and folder == tmp_path / "root" / "eurosat_32"
    assert (tmp_path / "root" / ".cache" / "downloads" / "eurosat_32" / "EuroSAT_RGB.zip").is_file()


def test_a_test_folder_passed_on_its_own_is_not_taken_for_a_class(tmp_path):
    source = open_source(write_files(tmp_path / "raw", class_files(prefix="test/")))
    assert set(source.train.labels.tolist()) == {"cat", "dog"}


def test_the_images_of_every_class_are_counted(tmp_path):
    from data.odd_classes import counts_line

    labels, tested = np.array([0, 0, 0, 1]), np.array([0, 1, 1])
    assert counts_line(labels, tested, ("cat", "dog")).endswith("cat: 3 + 1, dog: 1 + 2")
    assert counts_line(labels, None, ("cat", "dog")).endswith("cat: 3, dog: 1")
