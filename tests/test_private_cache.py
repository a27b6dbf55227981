"""What derives from private images without noise: where it lies, who can read it, what its name says, how it goes."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ROOT, arguments, call

import eval as eval_program
import run as run_program
from data import cache as cache_module
from data import prepared as prepared_module
from data.cache import CACHE_NAME, PrivateCache, private_places, public_cache
from data.prepare import prepare
from data.public import load_public
from data.sensitive import load_sensitive
from data.spec import DataSpec
from evaluation.features import extract
from extractors.random_conv import RandomConvExtractor
from pipeline.folder import create, working_in
from scripts import prepare_data
from utils import private_files
from utils.config_files import read_yaml
from utils.files import atomic, write_text
from utils.runtime import log
from utils.sections import PublicSetConfig, SensitiveDataConfig

SPEC = DataSpec("mine", 8, 1, 2, 24, ("a", "b"))
IMAGES = np.random.default_rng(0).integers(0, 256, (28, 1, 8, 8), dtype=np.uint8)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, in which the user's own cache lies."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def captured(monkeypatch, caplog):
    """The lines of the log."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO")
    return caplog


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def rights_below(folder: Path) -> dict[Path, int]:
    return {path: rights(path) for path in [folder, *folder.rglob("*")]}


def require_private(folder: Path) -> None:
    """Every folder is 0700 and every file 0600."""
    for path, found in rights_below(folder).items():
        assert found == (0o700 if path.is_dir() else 0o600), (path, oct(found))


def features(cache: PrivateCache | None, images: np.ndarray = IMAGES) -> np.ndarray:
    extractor = RandomConvExtractor(SPEC, Path(), "cpu")
    return extract(extractor, images, batch_size=16, description="features", cache=cache).features


def prepared(data_root: Path, name: str = "mine", **options) -> Path:
    data_root.parent.mkdir(parents=True, exist_ok=True)
    source = data_root.parent / f"{name}.npz"
    np.savez(source, x=IMAGES, y=np.arange(28) % 2)
    return prepare(name, data_root, source=source, **options)[0]


def section(**changes) -> SensitiveDataConfig:
    fields = read_yaml(ROOT / "configs" / "data" / "custom.yaml")
    return SensitiveDataConfig(
        **fields | {"name": "mine", "resolution": 8, "num_channels": 1, "num_val": 8} | changes
    )


def run_noise(tmp_path: Path, folder: Path, *more: str):
    """A Noise run on the set in `folder`, which lies outside the data root."""
    words = ["--data_name", "mine", f"sensitive_data.path={folder}", "--data_root", str(tmp_path / "root")]
    return call(run_program.main, arguments("Noise", tmp_path / "exp", *words, "--epsilon", "1", *more))


# ------------------------------------------------------------------------------------------------- rights


def test_cached_features_are_readable_by_their_owner_only(tmp_path, umask):
    cache = PrivateCache(tmp_path / "set" / CACHE_NAME)
    found = features(cache)
    require_private(cache.folder)
    assert len(list(cache.folder.glob("*.npz"))) == 1
    assert np.array_equal(features(PrivateCache(cache.folder)), found)


def test_a_private_file_never_has_wider_permissions(tmp_path, umask):
    """Not while it is written either: whoever opened it then could read on."""
    with atomic(tmp_path / "place" / "file", private=True) as temporary:
        require_private(temporary.parent)
        with temporary.open("wb"):
            assert rights(temporary) == 0o600
    require_private(tmp_path / "place")


def test_wider_rights_of_a_folder_are_taken_away(tmp_path):
    (tmp_path / "set").mkdir(mode=0o777)
    (tmp_path / "set").chmod(0o777)
    assert PrivateCache(tmp_path / "set").folder == tmp_path / "set"
    require_private(tmp_path / "set")


@pytest.mark.parametrize("public", [False, True])
def test_a_prepared_private_set_is_readable_by_its_owner_only(tmp_path, umask, public):
    folder = prepared(tmp_path / "root", public=public)
    if public:
        expected = {0o777 & ~umask, 0o666 & ~umask}
        assert set(rights_below(folder).values()) == expected
    else:
        require_private(folder)


def test_a_file_system_without_permissions_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.readable_by_others", lambda path: True)
    source = tmp_path / "a.npz"
    np.savez(source, x=IMAGES, y=np.arange(28) % 2)
    assert [note for note in prepare("mine", tmp_path, source=source)[2] if "warning" in note]
    assert not [
        note for note in prepare("open", tmp_path, source=source, public=True)[2] if "warning" in note
    ]


def test_a_run_folder_is_readable_by_its_owner_only(tmp_path, umask):
    folder = create(tmp_path / "exp", "DPDM", "mine", 1.0, "")
    assert rights(folder) == 0o700
    write_text(folder / "private" / "nearest.html", "", private=True)
    require_private(folder / "private")


# ------------------------------------------------------------------------------------------------- names


def test_the_name_of_cached_features_reveals_nothing_without_the_key(tmp_path):
    caches = [PrivateCache(tmp_path / name) for name in ("one", "other")]
    for cache in caches:
        features(cache)
        features(cache, IMAGES[:-1])
    names = [{path.name for path in cache.folder.glob("*.npz")} for cache in caches]
    assert [len(found) for found in names] == [2, 2], "other images, another name"
    assert not names[0] & names[1], "the same images have the same name in two caches: it is a hash of them"


def test_a_damaged_key_is_replaced(tmp_path):
    cache = PrivateCache(tmp_path)
    found = features(cache)
    (cache.folder / "key").write_bytes(b"")
    assert np.array_equal(features(PrivateCache(tmp_path)), found)
    assert (cache.folder / "key").stat().st_size == 32


# ------------------------------------------------------------------------------------------------- places


def test_another_private_folder_is_used_if_the_one_next_to_the_images_cannot_be(tmp_path, home, captured):
    (tmp_path / "set").write_text("no folder")
    places = private_places(tmp_path / "set")
    cache = PrivateCache(*places)
    features(cache)
    assert cache.folder == places[1] and cache.folder.is_relative_to(home)
    require_private(cache.folder)
    (line,) = set(captured.messages)
    assert str(places[0]) in line and str(places[1]) in line


def test_a_folder_that_others_can_read_is_never_used(tmp_path, monkeypatch, captured):
    monkeypatch.setattr(private_files.Path, "chmod", lambda *_: None)  # as on file systems without rights
    for name in ("one", "other"):
        (tmp_path / name).mkdir(mode=0o755)
    cache = PrivateCache(tmp_path / "one", tmp_path / "other")
    assert np.array_equal(features(cache), features(None))
    assert cache.folder is None and not list(tmp_path.rglob("*/*"))
    (line,) = set(captured.messages)
    assert str(tmp_path / "one") in line and str(tmp_path / "other") in line


def test_a_folder_of_another_user_is_never_used(tmp_path, monkeypatch, captured):
    """Root may write to it; its owner has made it first, and would read what root writes."""
    (tmp_path / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(private_files.os, "geteuid", lambda: os.getuid() + 1)
    cache = PrivateCache(tmp_path / "theirs")
    assert cache.folder is None and not list((tmp_path / "theirs").iterdir())
    assert str(tmp_path / "theirs") in captured.text


def test_public_results_have_another_place_where_the_data_root_is_read_only(
    tmp_path, home, monkeypatch, captured
):
    root, access = tmp_path / "root", os.access
    root.mkdir()
    monkeypatch.setattr(cache_module.os, "access", lambda path, mode: path != root and access(path, mode))
    assert public_cache(root / CACHE_NAME, "made").is_relative_to(home)
    folder = ROOT / "configs" / "public_data"
    fields = read_yaml(folder / "_defaults.yaml") | read_yaml(folder / "glyphs.yaml")
    for key in ("defaults", "selective", "central"):
        del fields[key]
    glyphs = PublicSetConfig(**fields | {"per_class": 1})
    first = load_public(glyphs, SPEC, root)
    assert len(first) == 62 and not list(root.iterdir())
    assert any(str(root) in line and str(home) in line for line in captured.messages)
    monkeypatch.setattr("data.public.EMBEDDED_PUBLIC", {"glyphs": None})  # nothing to render with
    assert np.array_equal(load_public(glyphs, SPEC, root).samples.images, first.samples.images)


def test_what_a_read_only_data_root_holds_is_used(tmp_path, home, monkeypatch):
    (tmp_path / CACHE_NAME / "made").mkdir(parents=True)
    monkeypatch.setattr(cache_module.os, "access", lambda *_: False)
    assert public_cache(tmp_path / CACHE_NAME, "made") == tmp_path / CACHE_NAME / "made"


# ------------------------------------------------------------------------------------------------- data and runs


def test_the_copy_for_validation_is_in_the_private_cache(tmp_path, monkeypatch):
    folder = prepared(tmp_path / "secure")
    monkeypatch.setattr(prepared_module, "MEMORY_MAP_ABOVE", 0)
    root = tmp_path / "root"
    data = load_sensitive(section(path=str(folder)), "val", root)
    assert Path(data.train.images.filename).is_relative_to(folder / CACHE_NAME)
    require_private(folder)
    assert not root.exists()
    before = rights_below(folder).keys()
    load_sensitive(section(path=str(folder)), "val", root)
    assert rights_below(folder).keys() == before, "a second copy of the same split"
    load_sensitive(section(path=str(folder), num_val=4), "val", root)
    assert len(list((folder / CACHE_NAME).glob("train-*"))) == 2
    prepared(tmp_path / "secure", force=True)
    assert not (folder / CACHE_NAME).exists(), "copies of images that were replaced"


def test_without_a_private_place_the_split_is_held_in_memory(tmp_path, monkeypatch):
    folder = prepared(tmp_path / "root")
    monkeypatch.setattr(prepared_module, "MEMORY_MAP_ABOVE", 0)
    monkeypatch.setattr("data.sensitive.private_places", lambda _: [])
    data = load_sensitive(section(), "val", tmp_path / "root")
    assert not isinstance(data.train.images, np.memmap) and len(data.train) == 16
    assert not (folder / CACHE_NAME).exists()


def test_programs_leave_private_results_next_to_the_images_alone(tmp_path, home):
    folder = prepared(tmp_path / "secure")
    samples = ["gen.data_num=20", "eval.metrics=[fid]", "eval.extractor=random_conv"]
    assert run_noise(tmp_path, folder, *samples).code == 0
    assert len(list((folder / CACHE_NAME).glob("*.npz"))) == 3
    words = ["--images", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "out"), "--metrics", "fid"]
    words += ["--data_name", "mine", f"sensitive_data.path={folder}", "--data_root", str(tmp_path / "root")]
    outcome = call(eval_program.main, [*words, "eval.extractor=random_conv"])
    assert outcome.code == 0, outcome.err
    assert len(list((folder / CACHE_NAME).glob("*.npz"))) == 4
    require_private(folder)
    assert rights(tmp_path / "out") == 0o700
    assert not (tmp_path / "root").exists() and not home.exists()


def test_all_files_of_a_run_and_of_its_evaluation_are_for_the_owner_only(tmp_path, home):
    root, before = tmp_path / "secure", os.umask(0o022)
    try:
        folder = prepared(root)
        run = run_noise(tmp_path, folder, "gen.data_num=20", "eval=none").folder
        require_private(run)
        out = tmp_path / "out"
        out.mkdir(mode=0o755)
        words = ["--images", str(tmp_path / "mine.npz"), "--out", str(out), "--metrics", "authpct"]
        words += [
            "--data_name",
            "mine",
            f"sensitive_data.path={folder}",
            "--data_root",
            str(tmp_path / "root"),
        ]
        more = ["eval.extractor=random_conv", "eval.gallery=report"]
        outcome = call(eval_program.main, [*words, *more])
        assert outcome.code == 0, outcome.err
        files = [path for path in out.rglob("*") if path.is_file()]
        assert files and all(rights(path) == 0o600 for path in files)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_public_results_keep_the_usual_permissions_in_a_run(tmp_path, umask):
    with private_files.only_for_owner():
        write_text(tmp_path / "private", "")
        with private_files.for_everyone():
            write_text(tmp_path / "public", "")
        write_text(tmp_path / "again", "")
    found = [rights(tmp_path / name) for name in ("private", "public", "again")]
    assert found == [0o600, 0o666 & ~umask, 0o600]


@pytest.mark.parametrize(("mode", "warns"), [(0o777, True), (0o1777, False), (0o755, False), (0o775, False)])
def test_a_parent_in_which_everyone_can_replace_the_run_is_reported(tmp_path, captured, mode, warns):
    folder = create(tmp_path / "exp", "DPDM", "mine", 1.0, "")
    (tmp_path / "exp").chmod(mode)
    with working_in(folder):
        assert any(str(tmp_path / "exp") in line for line in captured.messages) == warns


def test_a_run_that_computes_nothing_from_private_images_keeps_nothing(tmp_path, home):
    folder = prepared(tmp_path / "secure")
    assert run_noise(tmp_path, folder, "gen.data_num=20", "eval=none").code == 0
    assert not (folder / CACHE_NAME).exists() and not (tmp_path / "root").exists() and not home.exists()


# ------------------------------------------------------------------------------------------------- forgetting


def forget(*words: str):
    return call(prepare_data.main, ["--forget", *words])


def test_forgetting_removes_set_cache_and_copies_and_nothing_else(tmp_path, home):
    root = tmp_path / "root"
    folder, other = prepared(root), prepared(root, "mine-2")
    gone = [
        folder,
        private_places(folder)[1],  # of a time when the folder was read-only
        root / ".mine-ab12cd_3",  # of a preparation that was killed
        root / CACHE_NAME / "mine-16-0123456789abcdef",
        root / CACHE_NAME / "downloads" / "mine",
    ]
    stay = [
        other,
        private_places(other)[0],
        root / ".mine-2-ab12cd_3",
        root / CACHE_NAME / "mine-2-16-0123456789abcdef",
        tmp_path / "exp" / "noop" / "other",
    ]
    runs = [tmp_path / "exp" / "dpdm" / "run", tmp_path / "exp" / "images" / "judged"]
    for path in (*gone, *stay, *runs, folder / CACHE_NAME):
        path.mkdir(parents=True, exist_ok=True)
        (path / "file").write_text("")
    (runs[0] / "config.yaml").write_text("sensitive_data: {name: mine}")
    (runs[1] / "results.json").write_text('{"data": "mine"}')
    outcome = forget("mine", "--data_root", str(root), "--exp_root", str(tmp_path / "exp"))
    assert outcome.code == 0, outcome.err
    assert not [path for path in gone if path.exists()]
    assert all((path / "file").exists() for path in (*stay, *runs))
    lines = outcome.out.splitlines()
    assert all(f"removed: {path}" in lines for path in (*gone, folder / CACHE_NAME))
    kept = [line for line in lines if line.startswith("not removed: ")]
    assert len(kept) == 3 and all(
        any(str(path) in line for line in kept) for path in (*runs, tmp_path / "mine.npz")
    )


def test_forgetting_a_set_behind_a_link(tmp_path, home):
    folder = prepared(tmp_path / "secure")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mine").symlink_to(folder)
    assert forget("mine", "--data_root", str(tmp_path / "root")).code == 0
    assert not folder.exists() and not (tmp_path / "root" / "mine").is_symlink()


def test_forgetting_that_was_stopped_can_be_repeated(tmp_path, home, monkeypatch):
    folder = prepared(tmp_path / "root")
    (folder / CACHE_NAME).mkdir()
    words = ["mine", "--data_root", str(tmp_path / "root")]
    with monkeypatch.context() as patched:

        def refuse(path, *_, **__):
            raise PermissionError(13, "Permission denied", str(path))

        patched.setattr("data.forget.shutil.rmtree", refuse)
        assert "Permission denied" in forget(*words).refusal
    (folder / "train_images.npy").unlink(missing_ok=True)
    assert forget(*words).code == 0 and not folder.exists()


def test_a_damaged_set_can_be_forgotten(tmp_path, home):
    folder = prepared(tmp_path / "root")
    (folder / "meta.json").write_text("{")
    assert forget("mine", "--data_root", str(tmp_path / "root")).code == 0
    assert not folder.exists()


def test_forgetting_an_embedded_set_removes_its_cache(tmp_path, home):
    features(PrivateCache(*private_places(tmp_path / "digits_8")))
    assert forget("digits_8", "--data_root", str(tmp_path)).code == 0
    assert not (tmp_path / "digits_8").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("min", ["min", "mine"]), ("photos", ["photos", "not prepared"]), ("../root", ["--forget", "../root"])],
)
def test_only_a_prepared_set_is_removed(tmp_path, home, name, words):
    prepared(tmp_path / "root")
    (tmp_path / "root" / "photos").mkdir()
    (tmp_path / "root" / "photos" / "cat.png").write_text("")
    before = rights_below(tmp_path)
    refusal = forget(name, "--data_root", str(tmp_path / "root")).refusal
    assert all(word in refusal for word in words), refusal
    assert rights_below(tmp_path) == before


def test_forgetting_where_nothing_is_prepared_names_the_place(tmp_path, home):
    refusal = forget("mine", "--data_root", str(tmp_path / "root")).refusal
    assert "--data_root" in refusal and str(tmp_path / "root") in refusal


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--forget", "mine", "--force"], ["--force", "--forget"]),
        (["--forget", "mine", "--source", "x"], ["--source", "--forget"]),
        (["--forget", "mine", "--data_name", "mine"], ["--data_name", "--forget"]),
        (["--data_name", "mine", "--exp_root", "exp"], ["--exp_root", "--forget"]),
        ([], ["--data_name", "--forget"]),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, named):
    refusal = call(prepare_data.main, words).refusal
    assert all(name in refusal for name in named), refusal


def test_a_mistyped_name_to_forget_suggests_no_other_set(tmp_path, home):
    prepared(tmp_path / "root")
    assert "did you mean" not in forget("min", "--data_root", str(tmp_path / "root")).refusal


def test_forgetting_a_built_in_set_reports_what_is_stored(tmp_path, home):
    outcome = forget("digits_8", "--data_root", str(tmp_path))
    assert outcome.code == 0 and "built in" in outcome.out and "nothing" in outcome.out
