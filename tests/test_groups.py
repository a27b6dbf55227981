"""Groups of images, such as those of one patient, and the splits that keep them together."""

import dataclasses
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.groups import group_numbers, grouped_rows
from data.prepare import prepare
from data.prepared import read_groups
from data.sensitive import load_sensitive, spec_of
from data.spec import DataSpec
from data.splits import validation_split
from models import METHODS
from opacus_ext.accounting import Release
from opacus_ext.card import privacy_card
from opacus_ext.ledger import Budget, Ledger
from pipeline.planning import plan_lines
from scripts import prepare_data
from utils.config import load_config
from utils.errors import UserError

PATIENTS, PER_PATIENT = 14, 3


@pytest.fixture
def patients(tmp_path) -> Path:
    """<class>/<patient>/<file>.png; every third patient has images of both classes. An image's grey level is its
    patient's number times 10."""
    folder = tmp_path / "source"
    for patient in range(PATIENTS):
        for number in range(PER_PATIENT):
            label = "ill" if (patient + number * (patient % 3 == 0)) % 2 else "well"
            place = folder / label / f"patient-{patient}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 10 * patient).save(place / f"{number}.png")
    return folder


def prepared(source: Path, **more):
    folder, meta, notes = prepare(
        "scans", source.parent / "data", source=source, resolution=8, force=True, **more
    )
    return folder, meta, " ".join(notes)


def patients_of(samples) -> set[int]:
    return {int(image.flat[0]) // 10 for image in samples.images}


def of_csv(source: Path) -> str:
    lines = [f"{path.relative_to(source)},{path.parent.name}" for path in source.rglob("*.png")]
    table = source.parent / "patients.csv"
    table.write_text("\n".join(["path,who", *lines]))
    return f"{table}:who"


FORMS = {"folder": lambda _: "folder", "pattern": lambda _: r"patient-(\d+)/", "csv": of_csv}


def section_of(source: Path, *more: str):
    argv = ["--method", "Noise", "--data_name", "scans", "--data_root", str(source.parent / "data"), *more]
    return load_config(argv, METHODS).sensitive_data


@pytest.mark.parametrize("form", FORMS)
def test_a_group_is_on_one_side_of_every_split(form, patients):
    _, meta, notes = prepared(patients, groups=FORMS[form](patients))
    root, section = patients.parent / "data", section_of(patients, "sensitive_data.num_val=9")
    data = load_sensitive(section, "val", root)
    sides = [patients_of(part) for part in (data.train, data.validation, data.test)]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == PATIENTS
    assert spec_of(section, "val", root)[0].num_train == len(data.train)
    assert (meta.images_per_person, meta.images_per_person_is) == (PER_PATIENT, "observed")
    assert str(PER_PATIENT) in re.findall(r"\d+", notes)


def test_without_groups_patients_are_split_and_the_fix_is_logged(patients):
    folder, meta, notes = prepared(patients)
    assert "--groups folder" in notes and meta.images_per_person is None
    assert read_groups(folder, meta) is None
    data = load_sensitive(section_of(patients), "syn", patients.parent / "data")
    assert patients_of(data.train) & patients_of(data.test)


def test_names_of_groups_are_not_kept(patients):
    folder, meta, _ = prepared(patients, groups="folder")
    groups = read_groups(folder, meta)
    assert groups.shape == (meta.num_train,) and len(set(groups)) == meta.num_train // PER_PATIENT
    assert "patient" not in (folder / "meta.json").read_text()


def test_a_declared_bound_is_checked_and_kept(patients):
    with pytest.raises(UserError, match=r"images_per_person: 2.* 3 images"):
        prepared(patients, groups="folder", images_per_person=2)
    _, meta, _ = prepared(patients, groups="folder", images_per_person=5)
    assert (meta.images_per_person, meta.images_per_person_is) == (5, "declared")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"groups": r"nurse-(\d+)"}, r"42 of 42 .*nurse"),
        ({"groups": "("}, "regular expression"),
        ({"groups": r"(\d)(\d)"}, "2 groups"),
        ({"groups": "absent.csv:who"}, "absent.csv"),
        ({"images_per_person": 3}, "--groups"),
        ({"groups": "folder", "public": True}, "public"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(more, told, patients):
    with pytest.raises(UserError, match=told):
        prepared(patients, **more)
    assert not (patients.parent / "data").exists()


def test_a_csv_file_with_a_missing_image_or_column_is_reported(patients):
    how = of_csv(patients)
    with pytest.raises(UserError, match=r"'doctor'.*path, who"):
        prepared(patients, groups=how.replace(":who", ":doctor"))
    table = Path(how.rpartition(":")[0])
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="1 of 42 images"):
        prepared(patients, groups=how)


MALFORMED = {  # lines or bytes of the table -> what the message names
    b"": ["empty"],
    b"\xff\xfep\x00": ["UTF-8"],
    "path,who\nill/a.png,J\xfcrgen".encode("cp1252"): ["UTF-8"],
    b"path;who\nill/a.png;anna": ["'who'", "path;who", "commas"],
    b"path,who\nill/a.png,anna\n\nill/b.png,": ["line 4", "'who'"],
    b"path,who\nill/a.png,  ": ["line 2", "'who'"],
    b"path,who\nill/a.png": ["line 2", "'who'"],
    b"path,who\n,anna": ["line 2", "'path'"],
    b"path,who\nill/a.png,Smith, Anna": ["line 2", "3 values", "quotes"],
    b'path,who\nill/a.png,"anna': ["line 2", "quotation"],
    b"path,who\nill/a.png,anna\nill/a.png,bob": ["ill/a.png", "anna", "bob"],
    b"path,who,who\nill/a.png,anna,bob": ["2 columns 'who'"],
    b"who,age\nanna,3": ["'who'", "names the files"],
}


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_table_is_reported_by_its_place(content, patients):
    table = patients.parent / "patients.csv"
    table.write_bytes(content)
    with pytest.raises(UserError) as error:
        prepared(patients, groups=f"{table}:who")
    text = str(error.value)
    assert all(words in text for words in ["--groups", "patients.csv", *MALFORMED[content]])
    assert "\n" not in text and "codec" not in text and "Errno" not in text
    assert not (patients.parent / "data").exists()


@pytest.mark.parametrize(
    ("how", "told"), [("a.csv", "column"), ("a.csv:", "column"), ("none.CSV:who", "No such")]
)
def test_a_table_without_a_column_or_a_file_is_reported(how, told, patients):
    with pytest.raises(UserError, match=told) as error:
        prepared(patients, groups=how)
    assert "Errno" not in str(error.value)


def test_a_file_name_of_several_images_needs_a_path(patients):
    table = patients.parent / "patients.csv"
    table.write_text("file,who\n0.png,anna\n1.png,bob\n2.png,eve")
    with pytest.raises(UserError, match=r"0\.png.*ill/patient-\d+/0\.png"):
        prepared(patients, groups=f"{table}:who")


def test_paths_of_a_table_may_be_written_by_other_programs(patients):
    (patients / "ill" / "patient-1").rename(patients / "ill" / "M\xfcller")  # composed
    how = of_csv(patients)
    table = Path(how.rpartition(":")[0])
    text = unicodedata.normalize("NFD", table.read_text(encoding="utf-8")).replace("/", "\\")
    table.write_text(text.replace("ill\\", ".\\ill\\"), encoding="utf-8-sig")
    _, meta, _ = prepared(patients, groups=how)
    assert meta.images_per_person == PER_PATIENT


def test_groups_are_below_class_folders_in_any_form_of_unicode(patients):
    (patients / "ill").rename(patients / unicodedata.normalize("NFD", "verg\xf6\xdfert"))
    _, meta, _ = prepared(patients, groups="folder")
    assert meta.images_per_person == PER_PATIENT and "verg\xf6\xdfert" in meta.class_names


def test_images_outside_a_group_folder_and_arrays_are_reported(patients, tmp_path):
    Image.new("L", (8, 8)).save(patients / "ill" / "stray.png")
    with pytest.raises(UserError, match=r"ill/stray.png"):
        prepared(patients, groups="folder")
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20) % 2)
    with pytest.raises(UserError, match=r"--groups.*paths"):
        prepared(tmp_path / "a.npz", groups="folder")


def test_a_given_test_part_must_not_share_a_group(patients, tmp_path):
    for part, chosen in (("train", range(10)), ("test", range(9, PATIENTS))):
        for path in patients.rglob("*.png"):
            patient = path.parent.name
            if int(patient.rpartition("-")[2]) in chosen:
                place = tmp_path / "parts" / part / path.parent.parent.name / patient
                place.mkdir(parents=True, exist_ok=True)
                (place / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="patient-9"):
        prepared(tmp_path / "parts", groups="folder")


def test_the_program_takes_the_flags(patients, capsys):
    root = str(patients.parent / "data")
    argv = ["--data_name", "scans", "--source", str(patients), "--data_root", root, "--groups", "folder"]
    assert prepare_data.main([*argv, "--images_per_person", "2"]) == 2
    assert "images_per_person" in capsys.readouterr().err
    assert prepare_data.main([*argv, "--images_per_person", "4"]) == 0
    assert "groups" in capsys.readouterr().out


# --- the splits themselves -------------------------------------------------------------------------------------------


def test_whole_groups_of_about_the_wanted_size_are_chosen():
    groups = np.repeat(np.arange(100), np.arange(100) % 5 + 1)
    rows = grouped_rows(groups, 60, "a test")
    assert abs(len(rows) - 60) <= 2 and not set(groups[rows]) & set(np.delete(groups, rows))
    assert np.array_equal(rows, grouped_rows(groups, 60, "a test"))


def test_no_class_loses_its_last_record():
    groups = np.repeat(np.arange(8), 4)
    labels = np.where(groups == 0, 1, 0)  # class 1 has one group
    for count in range(1, 28):
        assert 1 in np.delete(labels, grouped_rows(groups, count, f"try {count}", labels))


def test_a_single_group_cannot_be_split():
    assert len(grouped_rows(np.zeros(10, int), 5, "one")) == 0
    train, validation = validation_split(10, 5, np.zeros(10, int))
    assert len(train) == 10 and len(validation) == 0


def test_too_few_validation_images_for_any_group_are_reported(patients):
    prepared(patients, groups="folder")
    section = section_of(patients, "sensitive_data.num_val=1")
    with pytest.raises(UserError, match=r"sensitive_data.num_val: 1 "):
        spec_of(section, "val", patients.parent / "data")


def test_groups_are_numbered_consistently():
    numbers = group_numbers(["b", "a", "b", "c"])
    assert numbers[0] == numbers[2] and sorted(set(numbers)) == [0, 1, 2]


# --- the card ---------------------------------------------------------------------------------------------------------


def card_of(make_private, count: int | None, origin: str, epsilon: float) -> str:
    from opacus_ext.accounting import Release

    private = make_private([Release("sum", None)], epsilon)
    private.spec = dataclasses.replace(private.spec, images_per_person=count, images_per_person_is=origin)
    private.ledger.book("sum")
    return privacy_card({**private.report(), "selection": []})


def lines_for_a_person(card: str) -> list[str]:
    return [line for line in card.splitlines() if re.match(r"- \*\*[^*]* person\*\*", line)]


def test_the_card_states_the_guarantee_for_a_person(make_private):
    card = card_of(make_private, 3, "declared", 0.5)
    (line,) = lines_for_a_person(card)
    assert "3" in line and "(1.5" in line and "-differentially private" in line  # k times epsilon
    assert any("declared" in other and "3" in other for other in card.splitlines())


def test_the_card_states_that_nothing_is_guaranteed_for_a_person(make_private):
    card = card_of(make_private, 5, "observed", 10)
    (line,) = lines_for_a_person(card)
    assert "-differentially private" not in line


def test_without_groups_the_card_assumes_nothing_about_persons(make_private):
    card = card_of(make_private, None, "", 1)
    assert not lines_for_a_person(card) and "declared" not in card and "observed" not in card


@pytest.mark.parametrize(
    ("count", "epsilon", "expected"),
    [
        (3, 0.5, ["3 images", "(1.5,"]),
        (5, 10, ["5 images", "nothing is guaranteed"]),
        (1, 10, []),
        (None, 10, []),
    ],
)
def test_the_plan_states_the_guarantee_for_a_person(count, epsilon, expected):
    spec = DataSpec(
        "scans", 8, 1, 2, 1000, ("a", "b"), images_per_person=count, images_per_person_is="observed"
    )
    ledger = Ledger(Budget(epsilon, 1e-5))
    ledger.adopt([Release("sum", None)])
    lines = [line for line in plan_lines(ledger, spec) if "person" in line]
    assert len(lines) == bool(expected) and all(part in lines[0] for part in expected)
