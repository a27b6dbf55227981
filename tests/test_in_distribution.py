"""In-distribution public data: sensitive_data.num_public records leave the private set; methods pretrain on them."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from test_data_loading import own_section, public_section, sensitive_section, write_set
from tiny_runs import arguments, call, data_root, strict_json

import eval as eval_program
import run as run_program
from data.apart import require_apart
from data.in_distribution import public_part
from data.prepare import prepare
from data.sensitive import load_sensitive, spec_of
from data.spec import DataSpec
from data.splits import public_share
from models import METHODS
from opacus_ext.card import privacy_card
from opacus_ext.ledger import Budget, Ledger, default_delta
from opacus_ext.private_data import PrivateData, records_of
from pipeline.compose import compose, has_checkpoint_of_public_share
from pipeline.training import load_images
from utils.artefacts import CARD
from utils.config import load_config
from utils.errors import FieldError, UserError
from utils.images import to_uint8

SHARE = ("public_data.name=in_distribution", "sensitive_data.num_public=60")
STARTS = {  # methods that pretrain, with what they need for it
    "PDP-Diffusion": (),
    "DP-LDM": (),
    "DP-LoRA": (),
    "DP-MERF": ("pretrain.epochs=1",),
    "DPDM": ("pretrain.n_epochs=1",),
}


def numbers(samples) -> list[int]:
    """The numbers that write_set gave the images."""
    return samples.images[:, 0, 0, 0].tolist()


def composed(method: str, *more: str, epsilon: str = "10"):
    argv = ["--method", method, "--data_name", "digits_8", "--epsilon", epsilon, "preset=quick", *more]
    return compose(load_config([*argv, "--data_root", str(data_root())], METHODS))


# ------------------------------------------------------------------------------------------------ the split


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("mode", "num_train", "num_private"),
    [("syn", None, 28), ("val", None, 20), ("syn", 30, 18), ("val", 30, 10)],
)
def test_public_records_leave_the_private_set(tmp_path, mode, num_train, num_private, mapped, monkeypatch):
    write_set(tmp_path / "mine", num_train=40, classes=4)
    if mapped:
        monkeypatch.setattr("data.prepared.MEMORY_MAP_ABOVE", 0)
    section = own_section(num_public=12, num_train=num_train)
    spec, notes = spec_of(section, mode, tmp_path)
    assert (spec.num_train, spec.num_public, spec.public_seed) == (num_private, 12, 0)
    assert "12" in notes[-1] and f"N = {num_private}" in notes[-1]
    first, again = (load_sensitive(section, mode, tmp_path) for _ in range(2))
    parts = [first.train, first.public, *([first.validation] if mode == "val" else [])]
    assert [len(part) for part in parts] == [num_private, 12, 8][: len(parts)]
    rows = [row for part in parts for row in numbers(part)]
    assert len(set(rows)) == len(rows) == (num_train or 40)
    assert np.bincount(first.public.labels).tolist() == [3, 3, 3, 3]
    assert numbers(first.public) == numbers(again.public) and numbers(first.train) == numbers(again.train)


def test_the_share_is_the_same_in_every_mode_and_another_for_another_seed(tmp_path):
    write_set(tmp_path / "mine", num_train=40)
    shares = {
        (mode, seed): numbers(
            load_sensitive(own_section(num_public=10, public_seed=seed), mode, tmp_path).public
        )
        for mode in ("syn", "val")
        for seed in (0, 1)
    }
    assert shares["syn", 0] == shares["val", 0] != shares["syn", 1] == shares["val", 1]


def test_mapped_copies_of_two_shares_are_kept_apart(tmp_path, monkeypatch):
    write_set(tmp_path / "mine", num_train=40)
    monkeypatch.setattr("data.prepared.MEMORY_MAP_ABOVE", 0)
    for seed in (0, 1):
        data = load_sensitive(own_section(num_public=10, public_seed=seed), "syn", tmp_path)
        assert not set(numbers(data.train)) & set(numbers(data.public))


def test_content_has_no_part_in_the_choice():
    """Labels decide only to which class a record counts: two records of a class exchange places, and nothing else."""
    labels = np.arange(40) % 2
    chosen = public_share(labels, 10, 2, 0)
    swapped = labels.copy()
    outside = [int(np.setdiff1d(np.flatnonzero(labels == label), chosen)[0]) for label in (0, 1)]
    swapped[outside] = swapped[outside[::-1]]
    moved = set(public_share(swapped, 10, 2, 0)) ^ set(chosen)
    assert len(moved) <= 4  # at most one record of each class gives way to another
    assert np.array_equal(chosen, public_share(labels, 10, 2, 0))


def test_digits_follow_through_the_ledger():
    with_share, without = composed("PDP-Diffusion", *SHARE), composed("PDP-Diffusion")
    assert (with_share.spec.num_train, without.spec.num_train) == (1377, 1437)
    assert with_share.ledger.budget.delta == default_delta(1377) > without.ledger.budget.delta
    assert with_share.synthesizer.config.public_data.n_classes == 10
    batched = composed("PDP-Diffusion", *SHARE, "train.batch_size=459").ledger.releases()[-1]
    assert batched.sample_rate == pytest.approx(1 / 3)


def test_the_share_is_no_breach_but_its_name_hides_no_path(tmp_path):
    write_set(tmp_path / "mine")
    section = own_section(num_public=10)
    require_apart(public_section("in_distribution"), section, tmp_path)
    hidden = public_section("in_distribution", train_path=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="private images"):
        require_apart(hidden, section, tmp_path)
    with pytest.raises(UserError, match="in_distribution"):
        prepare("in_distribution", tmp_path, source=tmp_path)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_public=10), ["10", "4 classes", "num_public=12"]),
        (dict(num_public=40), ["40", "multiple of 4"]),  # sizes of classes are private
        (dict(num_public=400), ["400", "multiple of 4"]),
        (dict(num_public=28, num_val=12), ["num_val", "12", "11"]),
    ],
)
def test_counts_that_the_set_does_not_allow(tmp_path, changes, words):
    write_set(tmp_path / "mine", num_train=40, classes=4)
    with pytest.raises(UserError) as refusal:
        spec_of(own_section(**changes), "val", tmp_path)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_negative_numbers():
    for field in ("num_public", "public_seed"):
        with pytest.raises(FieldError, match=f"{field}: -1 .* 0 or more"):
            sensitive_section("digits_8", **{field: -1})


def test_sets_with_groups_are_refused(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "mine")
    meta = folder / "meta.json"
    meta.write_text(meta.read_text().replace('"images_per_person": null', '"images_per_person": 2'))
    with pytest.raises(UserError, match=r"num_public: 10 .*--groups"):
        spec_of(own_section(num_public=10), "syn", tmp_path)


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        (
            "PDP-Diffusion",
            ["sensitive_data.num_public=65", SHARE[0]],
            ["num_public", "65", "10 classes", "70"],
        ),
        ("PDP-Diffusion", ["sensitive_data.num_public=1430", SHARE[0]], ["num_public", "1430", "class"]),
        ("PDP-Diffusion", ["sensitive_data.num_public=-10", SHARE[0]], ["num_public", "-10"]),
        ("PDP-Diffusion", [SHARE[0]], ["num_public", "0", "in_distribution"]),
        ("PDP-Diffusion", [SHARE[1]], ["num_public", "60", "glyphs", "in_distribution"]),
        ("PDP-Diffusion", [*SHARE, "pretrain.n_epochs=0"], ["num_public", "60", "PDP-Diffusion"]),
        ("PDP-Diffusion", [*SHARE, "public_data.train_path=."], ["train_path", "in_distribution"]),
        ("PDP-Diffusion", [*SHARE, "public_data.n_classes=9"], ["n_classes", "9", "10"]),
        ("PDP-Diffusion", [*SHARE, "sensitive_data.name=null"], ["in_distribution", "null"]),
        ("DP-MERF", [*SHARE, "pretrain.epochs=0"], ["num_public", "60", "DP-MERF"]),
        ("DP-FETA", [SHARE[1]], ["num_public", "60", "central_mean"]),
        ("PrivImage", SHARE, ["selective.ratio", "0.17", "PDP-Diffusion"]),
        ("Noise", [SHARE[1]], ["num_public", "60", "Noise"]),
        ("PE", [*SHARE], ["num_public", "60", "PE"]),
    ],
)
def test_a_share_for_nothing_is_refused(tmp_path, method, more, words):
    exp_root = tmp_path / "exp"
    refusal = call(run_program.main, arguments(method, exp_root, *more)).refusal
    assert all(word in refusal for word in words), refusal
    assert not list(exp_root.glob("*/*"))


def test_settings_without_effect_are_named(caplog):
    with caplog.at_level("INFO"):
        composed("PDP-Diffusion", *SHARE, "public_data.per_class=3")
        composed("PDP-Diffusion", "sensitive_data.public_seed=3")
    named = {line.partition(":")[0] for line in caplog.messages if ": no effect: " in line}
    assert named == {"public_data.per_class", "sensitive_data.public_seed"}


# ------------------------------------------------------------------------------------------------ methods and runs


@pytest.mark.parametrize("method", STARTS)
def test_methods_pretrain_on_the_share_and_never_see_it_as_private(
    method, make_method, make_private, samples, spec
):
    """The toy set of conftest.py: 12 of its 60 records are declared public."""
    rows = public_share(samples.labels, 12, 3, 0)
    public = public_part(samples.take(rows), spec)
    rest = samples.take(np.setdiff1d(np.arange(60), rows))
    smaller = dataclasses.replace(spec, num_train=48, num_public=12)
    made = make_method(method, *SHARE, "train.batch_size=48", *STARTS[method])
    section = dataclasses.replace(made.config.public_data, n_classes=3)
    synthesizer = type(made)(dataclasses.replace(made.config, public_data=section), smaller, made.runtime)
    assert synthesizer.learns_from_public_images
    ledger = Ledger(Budget(10.0, 1e-4))
    ledger.adopt(synthesizer.privacy_plan())
    private = PrivateData(rest, smaller, ledger)
    synthesizer.pretrain(public, private)
    assert not any(ledger.executed(release.name) for release in ledger.releases())
    synthesizer.train(private)
    ledger.require_complete()
    assert len(synthesizer.generate(6)) == 6


def test_a_run_trains_on_the_rest_alone():
    """The public images and those behind the ledger are together the training part, each once."""
    parts = composed("PDP-Diffusion", *SHARE)
    images = load_images(parts)
    everything = load_sensitive(sensitive_section("digits_8"), "syn", data_root()).train
    batches = [batch for batch, _ in records_of(images.private).batches(slice(0, 1437))]
    rest = to_uint8(torch.cat(batches))
    assert (len(rest), len(images.public), parts.spec.num_train) == (1377, 60, 1377)
    found = Counter(image.tobytes() for part in (rest, images.public.samples.images) for image in part)
    assert found == Counter(image.tobytes() for image in everything.images)
    assert np.bincount(images.public.samples.labels).tolist() == [6] * 10


def test_a_run_records_its_share_and_resumes_with_no_other(tmp_path):
    more = [
        *SHARE,
        "eval.metrics=[accuracy]",
        "eval.classifiers=[logistic_regression]",
        "pretrain.epochs=1",
    ]
    argv = arguments("DP-MERF", tmp_path, *more)
    done = call(run_program.main, argv)
    assert done.code == 0, done.err
    privacy = strict_json(done.folder / "privacy.json")
    assert privacy["num_records"] == 1377
    public = privacy["public_data"]
    assert (public["name"], public["images"], public["classes"]) == ("in_distribution", 60, 10)
    assert (public["of_private_set"], public["public_seed"]) == ("digits_8", 0)
    assert any("60" in line and "public_seed=0" in line for line in privacy["assumptions"])
    card = (done.folder / CARD).read_text()
    (line,) = (line for line in card.splitlines() if "public_seed=0" in line and "**60 " in line)
    assert "digits_8" in line and "distinct" in line
    for other in ("sensitive_data.num_public=70", "sensitive_data.public_seed=1"):
        name = other.partition("=")[0]
        resume = [word for word in argv if not word.startswith(f"{name}=")]
        refusal = call(run_program.main, [*resume, other, "--resume_exp", done.folder.name]).refusal
        assert other in refusal or name in refusal
        refusal = call(eval_program.main, ["--exp_path", str(done.folder), other]).refusal
        assert name in refusal
    again = call(eval_program.main, ["--exp_path", str(done.folder), "--data_root", str(data_root())])
    assert again.code == 0, again.err
    assert strict_json(done.folder / "privacy.json")["num_records"] == 1377


def test_a_checkpoint_that_learned_from_public_records_binds_the_next_run(tmp_path):
    """Otherwise they would count as private, although the weights of the checkpoint hold them."""
    folder = tmp_path / "before"
    (folder / "pretrain" / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "sensitive_data: {name: digits_8, num_public: 60, public_seed: 0, num_train: 1437}\n"
    )
    path = folder / "pretrain" / "checkpoints" / "final_checkpoint.pth"
    (folder / "environment.json").write_text('{"data_identity": ""}')  # the embedded set has none
    more = [f"model.ckpt={path}", "sensitive_data.num_public=70", SHARE[0]]
    for other in (more, more[:1]):
        refusal = call(run_program.main, arguments("PDP-Diffusion", tmp_path, *other)).refusal
        assert "model.ckpt" in refusal and "num_public=60" in refusal
    same = load_config(arguments("PDP-Diffusion", tmp_path, more[0], *SHARE), METHODS)
    assert has_checkpoint_of_public_share(same, "")
    with pytest.raises(UserError, match="prepared again"):
        has_checkpoint_of_public_share(same, "second")
    assert not has_checkpoint_of_public_share(load_config(arguments("PDP-Diffusion", tmp_path), METHODS), "")


def test_dry_run_counts_the_share(tmp_path):
    out = call(run_program.main, [*arguments("PDP-Diffusion", tmp_path, *SHARE), "--dry_run"]).out
    assert "x 60 images" in out and "N = 1,377" in out and "missing" not in out


def test_presets_of_own_images_count_the_private_records(tmp_path):
    write_set(tmp_path / "scans", num_train=70)
    argv = ["--method", "PDP-Diffusion", "--data_name", "scans", "--data_root", str(tmp_path), "preset=quick"]
    config = load_config([*argv, SHARE[0], "sensitive_data.num_public=40"], METHODS)
    assert config.method_config.train.batch_size == 30


def test_the_card_of_a_run_without_a_share_is_silent():
    spec = DataSpec("any", 8, 1, 2, 100, ("a", "b"))
    ledger = Ledger(Budget(1.0, 1e-4))
    ledger.adopt([])
    samples = load_sensitive(sensitive_section("digits_8"), "syn", data_root()).train
    assert "declared public" not in privacy_card(PrivateData(samples, spec, ledger).report())
