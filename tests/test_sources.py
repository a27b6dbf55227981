"""Every image of a source is used, or a line names what is left out; a damaged container is an error."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data_loading import public_section
from test_prepare import (
    cifar_batch,
    class_files,
    colour_images,
    idx_bytes,
    npz_bytes,
    png,
    write_files,
    write_tar,
    write_zip,
)

import eval as eval_program
import run
from data.prepare import prepare
from data.prepared import read_meta
from data.public import load_public
from data.readers.layouts import open_source
from data.spec import DataSpec
from data.trees import folder as folder_module
from data.trees.opening import open_tree
from evaluation.images import read_images
from scripts import prepare_data
from utils.errors import UserError

PICTURE = png(colour_images(1)[0])


def members(source) -> list[str]:
    return sorted(source.train.names)


def contents(tree) -> dict[str, bytes]:
    return dict(tree.read(tree.names))


def refused(path: Path) -> str:
    """The one line that says why `path` is not read to its end."""
    with pytest.raises(UserError) as raised:
        source = open_source(path)
        for part in (source.train, source.test):
            for _, item in part.items() if part is not None else ():
                part.convert(item, 8, 3)
    assert "\n" not in str(raised.value) and path.name in str(raised.value)
    return str(raised.value)


def has_note(source, *words: str) -> bool:
    return any(all(word in note for word in words) for note in source.notes)


# ------------------------------------------------------------------------------------------------ damaged archives

FILES = class_files(per_class=6)
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def tar_bytes(files: dict[str, bytes], mode: str = "w", form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # a fraction of a second makes pax headers
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


WHOLE = {
    "tar": tar_bytes(FILES),
    "pax.tar": tar_bytes(FILES, form=tarfile.PAX_FORMAT),
    "tar.gz": tar_bytes(FILES, "w:gz"),
    "tar.bz2": tar_bytes(FILES, "w:bz2"),
    "tar.xz": tar_bytes(FILES, "w:xz"),
    "zip": zip_bytes(FILES),
    "zip of stored files": zip_bytes(FILES, zipfile.ZIP_STORED),
    "npz": npz_bytes(x=colour_images(12), y=np.arange(12) % 2),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_no_truncation_loses_an_image(tmp_path, kind):
    """Cuts at random places and at all block boundaries of a tar: an error, or all images."""
    whole = WHOLE[kind]
    path = tmp_path / ("a.npz" if kind == "npz" else "a")
    path.write_bytes(whole)
    expected = len(open_source(path).train)
    cuts = set(np.random.default_rng(0).integers(0, len(whole), 100).tolist())
    cuts |= set(range(0, len(whole), 512)) if kind.endswith("tar") else set()
    complete = 0
    for cut in cuts:
        path.write_bytes(whole[:cut])
        try:
            source = open_source(path)
            found = sum(1 for _ in source.train.items())
        except UserError:
            continue
        assert found == len(source.train) == expected, f"{found} of {expected} images of {cut} bytes"
        complete += 1
    assert complete < len(cuts) / 2


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip", "npz"])
def test_no_changed_byte_loses_an_image(tmp_path, kind):
    """A change in a header or in compressed data is an error, or changes nothing that is read."""
    path = tmp_path / ("a.npz" if kind == "npz" else "a")
    path.write_bytes(WHOLE[kind])
    expected = len(open_source(path).train)
    for place in np.random.default_rng(1).integers(0, len(WHOLE[kind]), 100).tolist():
        changed = bytearray(WHOLE[kind])
        changed[place] ^= 0x55
        path.write_bytes(changed)
        try:
            source = open_source(path)
            found = sum(1 for _ in source.train.items())
        except UserError:
            continue
        assert found == len(source.train) == expected, f"byte {place}"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_header_in_the_middle_of_a_tar_is_an_error(tmp_path, form, mode):
    content = bytearray(tar_bytes(FILES, form=FORMATS[form]))
    content[content.index(b"dog/0.png")] ^= 1
    if mode == "w:gz":
        content = gzip.compress(bytes(content))
    (tmp_path / "a.tar").write_bytes(content)
    assert "damaged header" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "change", [(b" path=", b"9path="), (b"cat/\xc3\xa9_0.png\n", b"cat/\xc3\xa9_0.png?")]
)
def test_a_damaged_record_of_a_pax_header_is_an_error(tmp_path, mode, change):
    """The record holds a name that does not fit into the header: without it another name is taken."""
    content = tar_bytes({f"{name}/\xe9_{i}.png": PICTURE for name in ("cat", "dog") for i in range(2)},
                        form=tarfile.PAX_FORMAT)  # fmt: skip
    assert content.count(change[0])
    (tmp_path / "a.tar").write_bytes(content)
    assert len(open_source(tmp_path / "a.tar").train) == 4
    content = content.replace(*change, 1)
    (tmp_path / "a.tar").write_bytes(content if mode == "w" else gzip.compress(content))
    assert "pax record" in refused(tmp_path / "a.tar")


def test_a_wrong_checksum_of_gzip_is_an_error(tmp_path):
    content = bytearray(WHOLE["tar.gz"])
    content[-6] ^= 1  # in the CRC, behind all data
    (tmp_path / "a.tar.gz").write_bytes(content)
    assert "a.tar.gz: corrupt" in refused(tmp_path / "a.tar.gz")


def test_a_hole_of_an_unfinished_download_is_an_error(tmp_path):
    first = 512 + 512 * -(-len(FILES["cat/0.png"]) // 512)  # header and data of the first member
    (tmp_path / "a.tar").write_bytes(WHOLE["tar"][:first] + bytes(4 << 20))
    assert "zeros" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_concatenated_tars_are_all_read(tmp_path, mode):
    parts = [tar_bytes(class_files((name,)), mode) for name in ("cat", "dog")]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    assert members(open_source(tmp_path / "a.tar")) == sorted(class_files(("cat", "dog")))
    if mode != "w":  # the second stream is damaged at its start: not the end of the first
        (tmp_path / "a.tar").write_bytes(parts[0] + b"?" + parts[1])
        refused(tmp_path / "a.tar")


@pytest.mark.parametrize("other", ["zip", "tar", "bytes behind"])
def test_a_zip_with_something_before_or_behind_it_is_an_error(tmp_path, other):
    before = {"zip": zip_bytes(class_files(("cow",))), "tar": WHOLE["tar"]}.get(other, b"")
    (tmp_path / "a.zip").write_bytes(before + WHOLE["zip"] + (b"" if before else b"more"))
    refused(tmp_path / "a.zip")


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    write_tar(tmp_path / "a.tar", FILES | {"cat/inner.zip": WHOLE["zip of stored files"]})
    assert "inner.zip" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_corrupt_member_of_a_zip_is_named(tmp_path, compression):
    content = bytearray(zip_bytes(FILES, compression))
    start = content.index(b"dog/3.png") + len(b"dog/3.png")
    content[start + 8 : start + 40] = b"?" * 32
    (tmp_path / "a.zip").write_bytes(content)
    assert "dog/3.png" in refused(tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["cat/1.png", "cat/.0.pn", "cat/0.pn/"])
def test_a_damaged_name_in_the_table_of_a_zip_hides_no_image(tmp_path, name):
    """It reads like another member, a hidden file or a folder then."""
    content = bytearray(WHOLE["zip"])
    place = content.index(b"cat/0.png", content.index(b"PK\1\2"))
    content[place : place + 9] = name.encode()
    (tmp_path / "a.zip").write_bytes(content)
    refused(tmp_path / "a.zip")


def test_an_unknown_compression_of_a_zip_is_named(tmp_path):
    content = WHOLE["zip"].replace(b"PK\1\2\x14\x03\x14\0\0\0\x08\0", b"PK\1\2\x14\x03\x14\0\0\0\x5f\0")
    (tmp_path / "a.zip").write_bytes(content)
    assert "method 95" in refused(tmp_path / "a.zip")


def test_a_name_that_is_marked_as_utf8_and_is_not_is_an_error(tmp_path):
    content = zip_bytes(class_files(("caf\xe9", "dog"))).replace("\xe9".encode(), b"\xe9\xe9")
    (tmp_path / "a.zip").write_bytes(content)
    assert "UTF-8" in refused(tmp_path / "a.zip")


def test_utf8_names_without_the_mark_are_read_as_utf8(tmp_path):
    content = zip_bytes(class_files(("caf\xe9", "dog")))
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        parts = content.split(signature)
        parts[1:] = [
            part[: place - 4] + struct.pack("<H", struct.unpack("<H", part[place - 4 : place - 2])[0] & ~0x800)
            + part[place - 2 :]
            for part in parts[1:]
        ]  # fmt: skip
        content = signature.join(parts)
    (tmp_path / "a.zip").write_bytes(content)
    assert set(open_source(tmp_path / "a.zip").train.labels) == {"caf\xe9", "dog"}


@pytest.mark.parametrize("prefix", ["", "top/"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_backslashes_separate_folders(tmp_path, write, prefix):
    files = class_files(prefix=f"{prefix}train/") | class_files(prefix=f"{prefix}test/", per_class=2)
    path = write(tmp_path / "a", {name.replace("/", "\\"): content for name, content in files.items()})
    source = open_source(path)
    assert set(source.train.labels) == {"cat", "dog"} and (len(source.train), len(source.test)) == (6, 4)
    assert has_note(source, "backslash")


# ------------------------------------------------------------------------------------------------ links, repetitions


def add_link(archive: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    archive.addfile(info)


@pytest.mark.parametrize("mode", ["", ":gz"])
def test_links_in_a_tar_are_the_files_that_they_lead_to(tmp_path, mode):
    """Hard links name their target from the top, symbolic links from their folder; a link may lead to a folder."""
    store = {f".store/{index}": png(image) for index, image in enumerate(colour_images(4))}
    with tarfile.open(tmp_path / "a.tar", f"w{mode}") as archive:
        add_link(archive, "top/cat/soft.png", "../../.store/0", tarfile.SYMTYPE)  # before its target
        for name, content in (store | class_files(("cat",), prefix="top/")).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        add_link(archive, "top/cat/hard.png", ".store/1", tarfile.LNKTYPE)
        add_link(archive, "top/dog", "../.store", tarfile.SYMTYPE)
    source = open_source(tmp_path / "a.tar")
    dogs = [f"top/dog/{index}" for index in range(4)]
    assert members(source) == sorted(
        ["top/cat/soft.png", "top/cat/hard.png", *class_files(("cat",), prefix="top/"), *dogs]
    )
    read = contents(source.train.tree)
    assert read["top/cat/soft.png"] == store[".store/0"] == read["top/dog/0"]
    assert read["top/cat/hard.png"] == store[".store/1"]
    assert has_note(source, "2 names", "epsilon"), "two files are read twice"


@pytest.mark.parametrize("target", ["nothing.png", "../../../etc/passwd", "/etc/passwd", "loop.png"])
def test_links_to_nothing_in_a_tar_are_named(tmp_path, target):
    write_tar(tmp_path / "a.tar", class_files())
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        add_link(archive, "cat/loop.png", target, tarfile.SYMTYPE)
    assert "cat/loop.png" in refused(tmp_path / "a.tar")


def test_a_link_to_its_own_folder_in_a_tar_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", class_files())
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        add_link(archive, "cat/all", "..", tarfile.SYMTYPE)
    source = open_source(tmp_path / "a.tar")
    assert members(source) == sorted(class_files()) and has_note(source, "not followed", "cat/all")


def test_a_link_in_a_zip_is_the_file_that_it_leads_to(tmp_path):
    write_zip(tmp_path / "a.zip", class_files())
    link = zipfile.ZipInfo("cat/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr(link, "../dog/0.png")
    read = contents(open_source(tmp_path / "a.zip").train.tree)
    assert len(read) == 7 and read["cat/link.png"] == read["dog/0.png"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_member_that_is_there_twice_the_last_counts(tmp_path, kind):
    path = (write_tar if kind == "tar" else write_zip)(tmp_path / "a", class_files())
    newer = png(np.full((8, 8, 3), 7, np.uint8))
    if kind == "tar":
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo("cat/1.png")
            info.size = len(newer)
            archive.addfile(info, io.BytesIO(newer))
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("cat/1.png", newer)
    source = open_source(path)
    assert len(source.train) == 6 and has_note(source, "cat/1.png", "last")
    assert contents(source.train.tree)["cat/1.png"] == newer


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("linked", ["cat", "train", "test", "train/dog", "train/cat/0.png"])
def test_links_in_a_folder_are_followed(tmp_path, linked):
    files = class_files(prefix="train/") | class_files(prefix="test/", per_class=2)
    if linked == "cat":
        files = class_files()
    source = write_files(tmp_path / "raw", files)
    before = open_source(source)
    (source / linked).rename(tmp_path / "elsewhere")
    (source / linked).symlink_to(tmp_path / "elsewhere")
    after = open_source(source)
    assert members(after) == members(before) and after.notes == before.notes
    assert (after.test is None) == (before.test is None)


def test_a_link_back_to_its_own_folder_is_named_and_not_followed(tmp_path):
    source = write_files(tmp_path / "raw", class_files())
    (source / "cat" / "all").symlink_to(source)
    found = open_source(source)
    assert members(found) == sorted(class_files()) and has_note(found, "not followed", "cat/all")


def test_dangling_links_and_unreadable_files_are_named_in_one_line(tmp_path, monkeypatch):
    source = write_files(tmp_path / "raw", class_files(("cat", "dog", "elk", "fox")))
    (source / "cat" / "annexed.png").symlink_to("../.git/annex/objects/x")
    closed = {str(source / "dog"), str(source / "elk" / "1.png")}
    scandir, access = os.scandir, os.access

    def scan(path):
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_module.os, "scandir", scan)
    monkeypatch.setattr(
        folder_module.os, "access", lambda path, mode: str(path) not in closed and access(path, mode)
    )
    text = refused(source)
    for name in ("cat/annexed.png", "annex/objects/x", "dog/", "elk/1.png"):
        assert name in text


def test_a_file_that_is_linked_twice_is_reported(tmp_path):
    source = write_files(tmp_path / "raw", class_files())
    os.link(source / "cat" / "0.png", source / "cat" / "again.png")
    (source / "dog" / "again.png").symlink_to("0.png")
    found = open_source(source)
    assert len(found.train) == 8 and has_note(found, "2 names", "epsilon")


def test_a_pipe_is_named(tmp_path):
    source = write_files(tmp_path / "raw", class_files())
    os.mkfifo(source / "cat" / "pipe.png")
    assert has_note(open_source(source), "cat/pipe.png", "neither a file")


LEFT_OUT = {
    "README.md": "README.md", "LICENSE": "LICENSE", ".gitattributes": ".gitattributes", "thumbs.db": "thumbs.db",
    "@eaDir/1.png": "@eaDir", "$RECYCLE.BIN/1.png": "$RECYCLE.BIN", "cat/notes.txt": "cat/notes.txt",
    "cat/._0.png": "cat/._0.png", "labels.csv": "labels.csv", "__MACOSX/cat/._0.png": "__MACOSX",
    "Report.DOCX": "Report.DOCX", "cat/ages.xlsx": "cat/ages.xlsx", "talk.pptx": "talk.pptx", "a.ods": "a.ods",
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_that_accompany_images_are_skipped_and_named(tmp_path, kind, name):
    write = {"folder": write_files, "zip": write_zip, "tar": write_tar}[kind]
    source = open_source(write(tmp_path / "raw", class_files() | {name: PICTURE}))
    assert members(source) == sorted(class_files())
    assert has_note(source, "left out", LEFT_OUT[name]) and len(source.notes) == 1


def test_a_text_does_not_hide_the_archive_next_to_it(tmp_path):
    source = write_files(tmp_path / "raw", {"README.md": b"hi", "a.zip": WHOLE["zip"]})
    found = open_source(source)
    assert len(found.train) == 12 and has_note(found, "README.md")


def test_several_archives_in_a_folder_are_named(tmp_path):
    text = refused(write_files(tmp_path / "raw", {"train.zip": WHOLE["zip"], "test.tar": WHOLE["tar"]}))
    assert "train.zip" in text and "--test_source" in text


def test_an_idx_file_that_nobody_reads_is_named(tmp_path):
    images = idx_bytes(np.zeros((4, 8, 8), np.uint8))
    files = {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": idx_bytes(np.arange(4) % 2)}
    files |= {"val-images-idx3-ubyte": images}
    assert has_note(open_source(write_files(tmp_path / "raw", files)), "left out", "val-images")


# ------------------------------------------------------------------------------------------------ dataset.json


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        ([["a.png", 0], ["b.png", 1]], "c.png"),
        ([["a.png", 0], ["b.png", 1], ["c.png", 0], ["a.png", 1]], "a.png more than once"),
        ([["a.png", 0], ["b.png", 1], ["c.png", 0], ["./a.png", 0]], "a.png more than once"),
        ([["a.png", 0], ["b.png", 1], ["c.png", 10**30]], "c.png with 1000"),
        ([["a.png", 0], ["b.png", 1], ["c.png", None]], "c.png with None"),
        ([["a.png", 0], ["b.png", 1], ["c.png", 0], ["d.png", 0]], "d.png"),
        ([[3, 0]], "no list"),
    ],
)
def test_a_dataset_json_lists_every_image_once(tmp_path, labels, word):
    files = dict.fromkeys(("a.png", "b.png", "c.png"), PICTURE)
    listing = {"dataset.json": json.dumps({"labels": labels}).encode()}
    assert word in refused(write_zip(tmp_path / "a.zip", files | listing))


def test_a_dataset_json_of_deep_lists_is_an_error(tmp_path):
    files = {"a.png": PICTURE, "dataset.json": b'{"labels": ' + b"[" * 200_000}
    assert "dataset.json" in refused(write_zip(tmp_path / "a.zip", files))


def test_images_outside_of_the_folders_with_a_listing_are_an_error(tmp_path):
    listing = json.dumps({"labels": [["a.png", 0], ["b.png", 1]]}).encode()
    files = {"train/a.png": PICTURE, "train/b.png": PICTURE, "train/dataset.json": listing}
    assert "more/c.png" in refused(write_zip(tmp_path / "a.zip", files | {"more/c.png": PICTURE}))


# ------------------------------------------------------------------------------------------------ npz

X, Y = colour_images(12), np.arange(12) % 2


@pytest.mark.parametrize(
    "part",
    ["x_val y_val", "valid_images valid_labels", "X_test Y_test", "Test_images Test_labels", "images_test labels_test"],
)  # fmt: skip
def test_parts_of_an_npz_are_known_by_their_usual_names(tmp_path, part):
    images, labels = part.split()
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y, **{images: X[:4], labels: Y[:4]})
    source = open_source(tmp_path / "a.npz")
    assert (len(source.train), len(source.test)) == (12, 4)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"x_test": X}, "x_test"),
        ({"test_labels": Y}, "test_labels"),
        ({"images": X, "labels": Y}, "images"),
        ({"X": X, "Y": Y}, "X"),
        ({"arr_2": X}, "arr_2"),
        ({"classes": np.array([b"a", b"\xff"])}, "UTF-8"),
        ({"classes": ["cat", "cat"]}, "cat"),
        ({"classes": ["cafe\u0301", "caf\xe9"]}, "caf"),
    ],
)
def test_an_npz_that_is_not_clear_is_an_error(tmp_path, more, word):
    np.savez(tmp_path / "a.npz", x=X, y=Y, **more)
    assert word in refused(tmp_path / "a.npz")


def test_arrays_of_an_npz_that_nobody_reads_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y, holdout_scans=X, patient=np.arange(12))
    assert has_note(open_source(tmp_path / "a.npz"), "left out", "holdout_scans", "patient")


@pytest.mark.parametrize("key", ["classes", "class_names", "Class_Names"])
def test_class_names_of_an_npz_may_be_bytes(tmp_path, key):
    np.savez(tmp_path / "a.npz", x=X, y=Y, **{key: np.array([b"cat", "\xe9lan".encode()])})
    assert open_source(tmp_path / "a.npz").class_names == ("cat", "\xe9lan")


def test_labels_of_an_npz_may_be_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=np.array([b"cat", b"dog"])[Y])
    assert set(open_source(tmp_path / "a.npz").train.labels) == {"cat", "dog"}


@pytest.mark.parametrize("place", ["file", "folder"])
def test_the_ending_of_an_npz_may_be_in_capitals(tmp_path, place):
    path = write_files(tmp_path / "raw", {"A.NPZ": npz_bytes(x=X, y=Y)})
    assert len(open_source(path / "A.NPZ" if place == "file" else path).train) == 12


def test_a_member_of_an_npz_that_is_no_array_is_an_error(tmp_path):
    write_zip(tmp_path / "a.npz", {"x.npy": b"text", "y.npy": b"text"})
    refused(tmp_path / "a.npz")


# ------------------------------------------------------------------------------------------------ CelebA, CIFAR


def celeba(path: Path, **changes: bytes) -> Path:
    names = [f"{number:06d}.jpg" for number in range(1, 7)]
    lines = [f"{name} -1 {1 if row % 2 else -1} 1\n" for row, name in enumerate(names)]
    files = {
        "attr": f"6\nSmiling Male Young\n{''.join(lines)}".encode(),
        "part": "".join(
            f"{name} {part}\n" for name, part in zip(names, (0, 0, 0, 0, 1, 2), strict=True)
        ).encode(),
    } | changes
    write_files(path, {f"img_align_celeba/{name}": PICTURE for name in names})
    return write_files(
        path, {"list_attr_celeba.txt": files["attr"], "list_eval_partition.txt": files["part"]}
    )


def test_a_whole_celeba_is_read(tmp_path):
    source = open_source(celeba(tmp_path / "raw"))
    assert source.train.labels.tolist() == [0, 1, 0, 1] and source.test.labels.tolist() == [1]
    assert has_note(source, "left out", "000005.jpg")


ATTRIBUTES = b"6\nSmiling Male Young\n" + b"".join(b"%06d.jpg -1 1 1\n" % number for number in range(1, 7))
PARTITION = b"".join(b"%06d.jpg %d\n" % (number, number // 6 * 2) for number in range(1, 7))


@pytest.mark.parametrize(
    ("which", "content", "word"),
    [
        ("attr", ATTRIBUTES[:-3], "line 8"),  # the last value is missing
        ("attr", ATTRIBUTES[:-5], "line 8"),
        ("attr", ATTRIBUTES[: ATTRIBUTES.index(b"000006")], "5 images and states 6"),
        ("attr", ATTRIBUTES.replace(b"000003.jpg -1", b"000003.jpg -1.0"), "line 5"),
        ("attr", ATTRIBUTES.replace(b"Young", b"\xe9"), "UTF-8"),
        ("attr", ATTRIBUTES.replace(b"000003", b"000002"), "000002.jpg again"),
        ("attr", b"", "Male"),
        ("part", PARTITION[:-3], "line 6"),
        ("part", PARTITION[:-5], "line 6"),
        ("part", PARTITION[: PARTITION.index(b"000006")], "000006.jpg"),
        ("part", PARTITION.replace(b"000003.jpg 0", b"000003.jpg 0.0"), "line 3"),
        ("part", PARTITION.replace(b"000003.jpg 0", b"000003.jpg 7"), "line 3"),
    ],
)
def test_a_damaged_list_of_celeba_is_an_error(tmp_path, which, content, word):
    assert word in refused(celeba(tmp_path / "raw", **{which: content}))


def test_an_image_that_no_list_of_celeba_names_is_an_error(tmp_path):
    write_files(celeba(tmp_path / "raw"), {"img_align_celeba/000007.jpg": PICTURE})
    assert "000007.jpg" in refused(tmp_path / "raw")


def cifar(path: Path, numbers, label: bytes | None = None) -> Path:
    images = colour_images(4, 32)
    batch = pickle.loads(cifar_batch(images, [0, 1, 0, 1]), encoding="bytes")
    batch |= {} if label is None else {b"batch_label": label}
    files = {f"data_batch_{number}": pickle.dumps(batch, 2) for number in numbers}
    files["test_batch"] = cifar_batch(images, [0, 1, 0, 1])
    files["batches.meta"] = pickle.dumps({b"label_names": [b"cat", b"dog"]}, 2)
    return write_files(path, files)


@pytest.mark.parametrize(
    ("numbers", "label", "missing"),
    [
        ((1, 2), None, "data_batch_3, data_batch_4, data_batch_5"),
        ((2, 3, 4, 5), None, "data_batch_1"),
        ((1, 2, 4), b"training batch 1 of 4", "data_batch_3"),
        ((1, 2, 3, 4, 5, 7), None, "data_batch_6"),
    ],
)
def test_missing_batches_of_cifar_are_named(tmp_path, numbers, label, missing):
    assert missing in refused(cifar(tmp_path / "raw", numbers, label))


def test_cifar_batches_may_state_their_number(tmp_path):
    assert len(open_source(cifar(tmp_path / "raw", (1, 2), b"training batch 1 of 2")).train) == 8


@pytest.mark.parametrize(
    "batch",
    [{b"labels": 3}, {b"labels": [10**30] * 4}, {b"labels": [b"cat"] * 4}, {b"labels": [[0]] * 4}, {}],
)
def test_labels_of_cifar_that_are_no_whole_numbers_are_an_error(tmp_path, batch):
    path = cifar(tmp_path / "raw", range(1, 6))
    rows = np.zeros((4, 3072), np.uint8)
    write_files(path, {"data_batch_3": pickle.dumps({b"data": rows} | batch, 2)})
    assert "data_batch_3" in refused(path)


# ------------------------------------------------------------------------------------------------ class names


def test_two_forms_of_one_class_name_are_one_class(tmp_path):
    files = {"cafe\u0301/0.png": PICTURE, "caf\xe9/1.png": PICTURE, "dog/0.png": PICTURE}
    source = open_source(write_zip(tmp_path / "a.zip", files))
    assert sorted(source.train.labels.tolist()) == ["caf\xe9", "caf\xe9", "dog"]
    assert has_note(source, "caf\xe9", "two forms")


def test_the_parts_may_write_a_class_in_different_forms(tmp_path):
    files = class_files(("cafe\u0301", "dog"), prefix="train/") | class_files(
        ("caf\xe9", "dog"), prefix="test/"
    )
    source = open_source(write_zip(tmp_path / "a.zip", files))
    assert set(source.train.labels) == set(source.test.labels) == {"caf\xe9", "dog"} and not source.notes


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("cat", "cat "), ("cat", "c\u200bat"), ("cat", "\uff43at")]
)
def test_classes_that_look_alike_are_reported(tmp_path, names):
    source = open_source(write_zip(tmp_path / "a.zip", class_files((*names, "dog"))))
    assert len(set(source.train.labels)) == 3 and has_note(source, "look alike", names[0], names[1])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_are_not_utf8_are_named_before_anything_else(tmp_path, kind):
    files = class_files(("caf\udce9", "dog"))
    source = (write_files if kind == "folder" else write_tar)(tmp_path / "raw", files)
    text = refused(source)
    assert r"caf\xe9" in text and "UTF-8" in text
    text.encode("utf-8")


def test_every_member_is_read_once_and_by_any_order(tmp_path):
    for kind, content in WHOLE.items():
        if kind == "npz":
            continue
        (tmp_path / "a").write_bytes(content)
        tree = open_tree(tmp_path / "a")
        assert contents(tree) == FILES, kind
        assert dict(tree.read(tree.names[::-5])) == {name: FILES[name] for name in tree.names[::-5]}, kind


# ------------------------------------------------------------------------------------------------ programs


def arguments_of(tmp_path: Path, source: Path, *more: str) -> list[str]:
    root = str(tmp_path / "root")
    return ["--data_name", "mine", "--data_root", root, "--source", str(source), *more]


def test_class_names_of_an_npz_can_be_given(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    assert prepare_data.main(arguments_of(tmp_path, tmp_path / "a.npz", "--class_names", "caf\xe9, dog")) == 0
    assert read_meta(tmp_path / "root" / "mine").class_names == ("caf\xe9", "dog")


@pytest.mark.parametrize(
    ("names", "arrays", "word"),
    [
        ("a,b,c", {}, "3 names"),
        ("a", {}, "1 names"),
        ("a,a", {}, "a,a"),
        ("a,", {}, "a,"),
        ("a,b", {"class_names": ["cat", "dog"]}, "cat, dog"),
        ("a,b", {"y": np.array(["cat", "dog"])[Y]}, "cat, dog"),
    ],
)
def test_class_names_that_do_not_fit_are_an_error(tmp_path, capsys, names, arrays, word):
    np.savez(tmp_path / "a.npz", **({"x": X, "y": Y} | arrays))
    assert prepare_data.main(arguments_of(tmp_path, tmp_path / "a.npz", "--class_names", names)) == 2
    error = capsys.readouterr().err
    assert "--class_names" in error and word in error and error.count("\n") == 1
    assert not (tmp_path / "root").exists()


def test_arguments_that_are_not_utf8_are_refused_before_anything_is_read(tmp_path, capsys):
    source = write_files(tmp_path / "caf\udce9", class_files())
    assert prepare_data.main(arguments_of(tmp_path, source)) == 2
    assert r"caf\xe9" in capsys.readouterr().err
    for program in (run.main, eval_program.main):
        assert program(["--exp_description", "caf\udce9"]) == 2
        assert r"caf\xe9" in capsys.readouterr().err


def test_a_folder_that_is_not_utf8_is_refused_where_a_relative_path_leads_there(tmp_path, monkeypatch):
    write_files(tmp_path / "caf\udce9" / "raw", class_files())
    monkeypatch.chdir(tmp_path / "caf\udce9")
    with pytest.raises(UserError, match="UTF-8"):
        prepare("mine", tmp_path / "root", source=Path("raw"))


def test_notes_of_both_sources_are_reported(tmp_path):
    train = write_files(tmp_path / "a", class_files(prefix="train/") | {"train/README.md": b"hi"})
    test = class_files(prefix="test/") | class_files(prefix="train/") | {"test/LICENSE": b"hi"}
    _, meta, notes = prepare(
        "mine", tmp_path / "root", source=train, test_source=write_files(tmp_path / "b", test)
    )
    assert (meta.num_train, meta.num_test) == (6, 6)
    for word in ("README.md", "LICENSE", "6 images of its training part"):
        assert any(word in note for note in notes), word
    with pytest.raises(UserError, match="--test_source"):
        prepare("other", tmp_path / "root", source=tmp_path / "b", test_source=tmp_path / "a")


def test_a_test_part_that_a_public_set_leaves_out_is_reported(tmp_path):
    files = class_files(prefix="train/") | class_files(prefix="test/", per_class=2)
    source = write_files(tmp_path / "raw", files)
    _, meta, notes = prepare("mine", tmp_path / "root", source=source, public=True)
    assert meta.num_test == 0 and any("left out" in note and "4 images" in note for note in notes)


def test_a_public_source_reports_skipped_files_and_detects_changes_behind_links(tmp_path, caplog):
    images = write_files(tmp_path / "store", class_files())
    source = write_files(tmp_path / "raw", {"README.md": b"hi"})
    for name in ("cat", "dog"):
        (source / name).symlink_to(images / name)
    section = public_section("imagenet", train_path=str(source), n_classes=2)
    spec = DataSpec("own", 8, 1, 2, 10, ("a", "b"))
    caplog.set_level("INFO", "dpib")
    assert len(load_public(section, spec, tmp_path / "root").samples) == 6
    assert "README.md" in caplog.text
    (images / "cat" / "more.png").write_bytes(PICTURE)
    assert len(load_public(section, spec, tmp_path / "root").samples) == 7


def test_images_to_evaluate_report_skipped_files(tmp_path):
    source = write_files(tmp_path / "raw", class_files(("a", "b")) | {"README.md": b"hi", "a/._0.png": b"?"})
    spec = DataSpec("own", 8, 3, 2, 10, ("a", "b"))
    samples, notes = read_images(source, spec)
    assert len(samples) == 6
    assert all(any(word in note for note in notes) for word in ("README.md", "a/._0.png"))


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP"])
def test_a_file_of_several_images_is_named(tmp_path, form):
    pages = [Image.fromarray(image) for image in colour_images(3)]
    buffer = io.BytesIO()
    pages[0].save(buffer, form, save_all=True, append_images=pages[1:])
    name = f"cat/stack.{form.lower()}"
    text = refused(write_files(tmp_path / "raw", class_files() | {name: buffer.getvalue()}))
    assert name in text and "3 images" in text


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    assert "git lfs pull" in refused(write_files(tmp_path / "raw", class_files() | {"cat/x.png": pointer}))
