"""What every method promises, for every name in the table, on a toy data set."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUERIED
from influence import record_influence
from torch import nn

from models import METHODS
from models.diffusion.autoencoder_training import AutoencoderTraining
from models.diffusion.ddpm import NoiseLoss
from models.diffusion.latent import LatentDiffusion
from models.diffusion.loss import EDMLoss
from models.diffusion.synthesizer import DiffusionSynthesizer
from models.public.semantic_query import QUERY, SemanticQuery
from opacus_ext import dpsgd
from opacus_ext.accounting import Release
from opacus_ext.errors import BudgetExceeded, UnplannedRelease
from opacus_ext.ledger import Ledger
from opacus_ext.noise import GridNoise
from opacus_ext.private_data import PrivateData
from opacus_ext.records import RecordAccess
from pipeline.checkpoints import Checkpoints
from utils.runtime import Runtime

NAMES = sorted(METHODS)
DIFFUSION = [name for name in NAMES if issubclass(METHODS.resolve(name), DiffusionSynthesizer)]
LATENT = [name for name in NAMES if issubclass(METHODS.resolve(name), LatentDiffusion)]
PRIVATE = [name for name in NAMES if name != "Noise"]
# Methods other than diffusion that can pretrain on the public classes that the semantic query selects.
GENERATORS = [
    name for name in NAMES if METHODS.resolve(name).selects_public_classes and name not in DIFFUSION
]


@pytest.fixture
def reads(monkeypatch):
    """Watches every read of private records: `reads.forbidden` counts those while no release was open.

    A release is open from its booking until its sum has met its noise.
    """

    @dataclasses.dataclass
    class Reads:
        open: bool = False
        allowed: int = 0
        forbidden: int = 0

    watch = Reads()

    def before(owner, name, note):
        original = getattr(owner, name)

        def wrapped(self, *args, **kwargs):
            note()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    def after(owner, name, note):
        original = getattr(owner, name)

        def wrapped(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            note()
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def book():
        watch.open = True

    def close():
        watch.open = False

    def read():
        watch.allowed += watch.open
        watch.forbidden += not watch.open

    before(Ledger, "book", book)
    before(RecordAccess, "take", read)
    after(GridNoise, "add_to", close)
    return watch


def tensors(value, path="") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: found for name, part in items for key, found in tensors(part, f"{path}/{name}").items()}


def assert_same_samples(one, other):
    assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)


# ------------------------------------------------------------------------------------------ construction and plan


@pytest.mark.parametrize("name", NAMES)
def test_constructing_and_planning_read_no_data(name, make_method, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("data was read")

    for target in (
        "data.sensitive.load_sensitive",
        "data.public.load_public",
        "data.digits.load_digits_8",
        "opacus_ext.private_data.PrivateData.__init__",
        "numpy.load",
        "torch.load",
    ):
        monkeypatch.setattr(target, forbidden)
    synthesizer = make_method(name)
    synthesizer.privacy_plan()
    synthesizer.parameter_counts()


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_depends_on_configuration_and_spec_alone(name, make_method, make_trial):
    plan = make_method(name).privacy_plan()
    assert all(isinstance(release, Release) for release in plan)
    assert sum(release.noise_multiplier is None for release in plan) <= 1
    assert make_method(name, runtime=Runtime(seed=7)).privacy_plan() == plan
    trial = make_trial(name)
    trial.run()
    assert trial.synthesizer.privacy_plan() == plan


def test_the_plan_follows_the_spec(make_method, spec):
    method = make_method("DPDM", "train.batch_size=30", "train.n_epochs=4")
    assert method.privacy_plan() == [Release("dp-sgd", None, 0.5, 8)]
    larger = type(method)(method.config, dataclasses.replace(spec, num_train=91), Runtime())
    assert larger.privacy_plan() == [Release("dp-sgd", None, 0.25, 16)]


# ------------------------------------------------------------------------------------------ a whole run


@pytest.mark.parametrize("epsilon", [1, 10, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run(name, epsilon, make_trial, reads, spec):
    """Plans, spends what it planned and no more, reads only while a release is open, delivers valid samples."""
    trial = make_trial(name, epsilon=epsilon)
    planned = trial.private.ledger.releases()
    trial.run()
    report = trial.private.report()
    assert [r["executed"] for r in report["releases"]] == [r.num_steps for r in planned]
    assert trial.private.ledger.complete
    if not planned:
        assert report["spent"] == 0
    elif epsilon == math.inf:
        assert report["spent"] == math.inf and not report["private"]
    else:
        assert epsilon * (1 - 1e-3) < report["spent"] <= epsilon
    assert reads.forbidden == 0
    assert (reads.allowed > 0) == bool(planned)
    before = reads.allowed
    samples = trial.synthesizer.generate(10)
    assert reads.allowed == before and reads.forbidden == 0
    assert samples.images.shape == (10, *spec.image_shape) and samples.images.dtype == np.uint8
    assert np.bincount(samples.labels, minlength=3).tolist() == [4, 3, 3]
    assert samples.images.std() > 0
    assert report["revealed"] == []


def test_a_sampled_run_meets_its_budget(make_trial, reads):
    trial = make_trial("PrivImage", "train.batch_size=20", "train.n_epochs=2", epsilon=1)
    assert trial.private.ledger.planned("dp-sgd").sample_rate == pytest.approx(1 / 3)
    trial.run()
    assert 1 - 1e-3 < trial.private.ledger.spent() <= 1
    assert reads.forbidden == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_samples", [1, 3, 17])
def test_exactly_the_requested_samples(name, num_samples, make_method):
    """More than one batch, and a last one that is not full; also without training."""
    samples = make_method(name).generate(num_samples)
    assert len(samples) == num_samples
    counts = np.bincount(samples.labels, minlength=3)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_generating_twice_gives_the_same(name, make_method):
    method = make_method(name)
    assert_same_samples(method.generate(5), method.generate(5))


@pytest.mark.parametrize("name", PRIVATE)
def test_another_records_count_changes_no_shape(name, make_trial, samples):
    """A state is sized by configuration and spec; nothing in it can be counted back to the records."""

    def shapes(records):
        trial = make_trial(name, epsilon=10, noise_seed=1, records=records)
        trial.run()
        return {path: found.shape for path, found in tensors(trial.synthesizer.state_dict()).items()}

    assert shapes(samples) == shapes(samples.take(np.arange(50)))


@pytest.mark.parametrize("name", PRIVATE)
def test_private_noise_differs_from_run_to_run(name, make_trial):
    """Same experiment seed, same data: what was learnt under noise must not repeat."""

    def learnt():
        trial = make_trial(name, epsilon=1)
        trial.synthesizer.pretrain(trial.public, trial.private)
        trial.synthesizer.train(trial.private)
        return trial.synthesizer.state_dict()

    one, other = tensors(learnt()), tensors(learnt())
    assert any(not torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_plan_no_method_gets_a_result(name, make_trial, make_private, reads):
    trial = make_trial(name, epsilon=math.inf)
    trial.private = make_private([])
    with pytest.raises(UnplannedRelease):
        trial.run()
    assert reads.allowed == reads.forbidden == 0


def test_a_budget_below_the_fixed_query_is_refused(make_method, make_private):
    with pytest.raises(BudgetExceeded, match="semantic query"):
        make_private(make_method("PrivImage").privacy_plan(), epsilon=0.001)


@pytest.mark.parametrize("name", DIFFUSION)
def test_networks_trained_with_dpsgd_mix_no_examples(name, make_method):
    method = make_method(name)
    network = method.network
    mixing = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.Dropout)
    assert not [kind for kind in network.modules() if isinstance(kind, mixing)]
    rows = [torch.randn(4, *method.network_shape), torch.rand(4), torch.tensor([0, 1, 2, 0])]
    changed = [row.clone() for row in rows]
    changed[0][0] += 1.0
    for parameter in network.parameters():  # layers that start at nothing would hide a leak
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before, after = network(*rows), network(*changed)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_record_moves_the_clipped_sum_by_at_most_the_bound(name, make_trial, monkeypatch):
    """On the network and the loss as the method trains them, in the middle of its private training."""
    original, found = dpsgd.clipped_sum, []

    def checked(network, per_example_loss, images, labels, max_grad_norm, rng, **options):
        if len(labels) > 1 and len(found) < 3:
            part = slice(0, 4)
            batch = (images[part], labels[part], max_grad_norm, rng[part])
            found.append(record_influence(network, per_example_loss, *batch))
        return original(network, per_example_loss, images, labels, max_grad_norm, rng, **options)

    monkeypatch.setattr(dpsgd, "clipped_sum", checked)
    trial = make_trial(name)
    trial.synthesizer.pretrain(trial.public, trial.private)
    trial.synthesizer.train(trial.private)
    if name in DIFFUSION:
        assert len(found) == 3
        assert max(found) > 0.5  # the records are there, and gradients are clipped
    assert all(moved <= 1 + 1e-4 for moved in found)


@pytest.mark.parametrize("name", DIFFUSION)
def test_loss_randomness_in_private_training_is_secret(name, make_trial, monkeypatch):
    loss = loss_of(name)
    draws, evaluate = [], loss.__call__

    def watched(self, network, images, labels, rng):
        draws.append(rng[:].normal().tolist())
        return evaluate(self, network, images, labels, rng)

    monkeypatch.setattr(loss, "__call__", watched)
    for _ in range(2):
        trial = make_trial(name, "train.n_epochs=1", epsilon=math.inf)
        trial.synthesizer.pretrain(trial.public, trial.private)
        draws.append("train")
        trial.synthesizer.train(trial.private)
        draws.append("end")
    first, second = (
        draws[i + 1 : j] for i, j in zip(positions(draws, "train"), positions(draws, "end"), strict=True)
    )
    assert len(first) == len(second) > 0
    assert first != second


def loss_of(name: str) -> type:
    return NoiseLoss if name in LATENT else EDMLoss


def positions(items: list, wanted: object) -> list[int]:
    return [i for i, item in enumerate(items) if item == wanted]


# ------------------------------------------------------------------------------------------ checkpoints


def checkpoints_of(trial, folder: Path) -> Checkpoints:
    kept = Checkpoints(folder, trial.name, trial.synthesizer, trial.private.ledger)
    trial.synthesizer.runtime.snapshot = lambda stage: kept.save(stage, "snapshot")
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_restores_the_samples_and_the_account(name, make_trial, tmp_path):
    """Through a real file, which loads tensors and plain containers only."""
    trial = make_trial(name, epsilon=10)
    trial.run()
    checkpoints_of(trial, tmp_path).save("train", "final")
    torch.load(tmp_path / "train" / "checkpoints" / "final_checkpoint.pth", weights_only=True)
    other = make_trial(name, epsilon=10)
    assert checkpoints_of(other, tmp_path).restore() == "train (final)"
    assert_same_samples(other.synthesizer.generate(10), trial.synthesizer.generate(10))
    assert other.private.ledger.report() == trial.private.ledger.report()
    if other.private.ledger.releases():
        with pytest.raises(BudgetExceeded):
            other.private.ledger.book(other.private.ledger.releases()[-1].name)


class Killed(BaseException):
    pass


def kill_at_booking(monkeypatch, name: str, number: int):
    """The program dies at the `number`-th booking of a release, before its result."""
    book = Ledger.book

    def dying(self, booked, *args):
        if booked == name and self.executed(name) == number:
            raise Killed
        return book(self, booked, *args)

    monkeypatch.setattr(Ledger, "book", dying)


def resumed_run(make_trial, folder: Path, name: str, *settings):
    """What run.py does with --resume_exp: restore, then the remaining stages."""
    trial = make_trial(name, *settings, epsilon=10, noise_seed=5, runtime=Runtime(folder=folder))
    kept = checkpoints_of(trial, folder)
    restored = kept.restore() or ""
    if not (kept.finished("pretrain") or restored.startswith("train")):
        trial.synthesizer.pretrain(trial.public, trial.private)
        kept.save("pretrain", "final")
    trial.synthesizer.train(trial.private)
    return trial, restored


@pytest.mark.parametrize("name", DIFFUSION)
@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_run_killed_in_private_training_continues_as_if_nothing_happened(
    name, killed_at, make_trial, tmp_path, monkeypatch
):
    """With seeded noise, which tests have, to the last bit; snapshots are taken after every second step."""
    whole = make_trial(name, epsilon=10, noise_seed=5, runtime=Runtime(folder=tmp_path / "whole"))
    whole.run()
    with monkeypatch.context() as patch:
        kill_at_booking(patch, "dp-sgd", killed_at)
        with pytest.raises(Killed):
            resumed_run(make_trial, tmp_path / "run", name)
    trial, restored = resumed_run(make_trial, tmp_path / "run", name)
    assert restored == ("train (snapshot)" if killed_at == 3 else "pretrain (final)")
    one, other = (tensors(run.synthesizer.state_dict()) for run in (whole, trial))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[path], other[path]) for path in one)
    assert_same_samples(whole.synthesizer.generate(7), trial.synthesizer.generate(7))
    assert trial.private.ledger.report() == whole.private.ledger.report()


def kill_in(monkeypatch, owner, method: str, call: int):
    """The program dies at the `call`-th call (from 1) of a method."""
    original, calls = getattr(owner, method), []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, dying)


@pytest.mark.parametrize("name", ["PDP-Diffusion", "PrivImage", "DP-FETA", "DP-FETA-Pro", *LATENT])
def test_a_run_killed_in_pretraining_continues_as_if_nothing_happened(
    name, make_trial, tmp_path, monkeypatch
):
    whole = make_trial(name, epsilon=10, noise_seed=5, runtime=Runtime(folder=tmp_path / "whole"))
    whole.run()
    with monkeypatch.context() as patch:
        kill_in(patch, loss_of(name), "__call__", 3)  # the second step was followed by a snapshot
        with pytest.raises(Killed):
            resumed_run(make_trial, tmp_path / "run", name, "pretrain.batch_size=8")
    trial, restored = resumed_run(make_trial, tmp_path / "run", name, "pretrain.batch_size=8")
    assert restored == "pretrain (snapshot)"
    assert trial.private.ledger.complete


@pytest.mark.parametrize("name", LATENT)
def test_a_run_killed_in_autoencoder_training_continues_as_if_nothing_happened(
    name, make_trial, tmp_path, monkeypatch
):
    settings = ["pretrain.autoencoder.batch_size=8", "pretrain.autoencoder.adversarial_weight=0.5"]
    whole = make_trial(name, *settings, noise_seed=5, runtime=Runtime(folder=tmp_path / "whole"))
    whole.run()
    with monkeypatch.context() as patch:
        kill_in(patch, AutoencoderTraining, "losses", 5)  # the fourth step was followed by a snapshot
        with pytest.raises(Killed):
            resumed_run(make_trial, tmp_path / "run", name, *settings)
    trial, restored = resumed_run(make_trial, tmp_path / "run", name, *settings)
    assert restored == "pretrain (snapshot)"
    one, other = (tensors(run.synthesizer.state_dict()) for run in (whole, trial))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[path], other[path]) for path in one)


def test_dpmerf_killed_after_its_release_does_not_query_again(make_trial, tmp_path, monkeypatch):
    from models.embedding.mean_embedding import EmbeddingGenerator

    whole = make_trial("DP-MERF", epsilon=10, noise_seed=5)
    whole.run()
    with monkeypatch.context() as patch:
        kill_in(patch, EmbeddingGenerator, "fit", 1)
        with pytest.raises(Killed):
            resumed_run(make_trial, tmp_path, "DP-MERF")
    with monkeypatch.context() as patch:
        patch.setattr(PrivateData, "noisy_sum", lambda *_, **__: pytest.fail("queried again"))
        trial, restored = resumed_run(make_trial, tmp_path, "DP-MERF")
    assert restored == "train (snapshot)"
    assert_same_samples(trial.synthesizer.generate(7), whole.synthesizer.generate(7))


PRETRAINING_LENGTH = ("n_epochs", "epochs", "iterations", "n_iter")  # keys of `pretrain`, by method


def pretraining(method, count: int, *settings: str) -> list[str]:
    """Settings for a pretraining of `count` epochs or steps on the selected public classes."""
    fields = {field.name for field in dataclasses.fields(method.config.pretrain)}
    (length,) = fields & set(PRETRAINING_LENGTH)
    sizes = [f"pretrain.{key}=10" for key in ("batch_size", "g_batch_size") if key in fields]
    return [*QUERIED, f"pretrain.{length}={count}", *sizes, *settings]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_may_pretrain_on_the_public_classes_that_a_query_selects(
    name, make_method, make_trial, tmp_path, monkeypatch
):
    """The query is planned and booked; its result alone labels the public images. A restart does not query again."""
    selected = []

    def select(self, public, private):
        selected.append(original(self, public, private))
        return selected[-1]

    original = SemanticQuery.select
    monkeypatch.setattr(SemanticQuery, "select", select)
    settings = pretraining(make_method(name), 2)
    trial = make_trial(name, *settings, epsilon=math.inf, noise_seed=5, runtime=Runtime(folder=tmp_path))
    assert trial.synthesizer.privacy_plan()[0] == Release(QUERY, 100.0)
    assert trial.synthesizer.pretraining_plan() == [Release(QUERY, 100.0)]
    trial.run()
    assert trial.private.ledger.complete and trial.private.ledger.executed(QUERY) == 1
    assert len(selected) == 1 and len(selected[0]) == 24  # half of 48 images
    assert set(selected[0].samples.labels) == {0, 1, 2}
    monkeypatch.setattr(PrivateData, "noisy_histogram", lambda *_, **__: pytest.fail("queried again"))
    again = make_trial(name, *settings, epsilon=math.inf, noise_seed=5, runtime=Runtime(folder=tmp_path))
    again.synthesizer.pretrain(again.public, again.private)
    assert again.private.ledger.executed(QUERY) == 1
    assert np.array_equal(selected[1].samples.images, selected[0].samples.images)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_without_pretraining_plans_no_query(name, make_method):
    assert make_method(name, *pretraining(make_method(name), 0)).pretraining_plan() == []


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_state_of_another_architecture_is_refused(name, make_method):
    from utils.errors import UserError

    with pytest.raises(UserError, match="architecture"):
        make_method(name).load_state_dict(make_method(name, "model.network.nf=12").state_dict())


# ------------------------------------------------------------------------------------------ the checks catch mutants


def test_an_unbooked_read_is_caught(make_trial, reads, monkeypatch):
    """A method that peeks between two steps, as a logger of the training loss would."""
    trial = make_trial("DPDM", epsilon=10)
    finish = DiffusionSynthesizer._finish_step

    def peeking(self, *args):
        trial.private._records.take(slice(0, 4))
        return finish(self, *args)

    monkeypatch.setattr(DiffusionSynthesizer, "_finish_step", peeking)
    trial.run()
    assert reads.forbidden == 4


def test_mapping_reads_nothing_and_what_is_mapped_no_more_than_the_rest(make_private, reads):
    """`map` waits for the first release to read; without one the mapped records are as closed as the others."""
    mapped = make_private([Release("sum", 1.0)]).map(lambda images: images / 2)
    assert mapped._records.image_shape() == (1, 8, 8)
    assert reads.forbidden == reads.allowed == 0
    mapped._records.take(slice(0, 4))
    # The call itself, and behind it the one batch of all; whether the function mixes records is tried on public images.
    assert reads.forbidden == 2
