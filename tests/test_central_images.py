"""Central images: the question, its result without and with noise, post-processing and augmentation."""

import math

import numpy as np
import pytest
import torch

from data.spec import DataSpec, Samples
from models.public.central_images import CENTRAL_IMAGES, MEAN, MODE, CentralImages
from models.public.config import CentralConfig
from opacus_ext.accounting import Release
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils.draws import Draws
from utils.errors import UserError
from utils.runtime import Runtime


def config(**changes) -> CentralConfig:
    values = {
        "sample_num": 1, "sigma": 5.0, "batch_size": 1000, "downscale": 1, "max_norm": None, "bins": None,
        "smooth": False, "num_ops": 2, "max_magnitude": 9,
    }  # fmt: skip
    return CentralConfig(**{**values, **changes})


def spec_of(num_train=60, resolution=8, channels=1, num_classes=3) -> DataSpec:
    return DataSpec("toy", resolution, channels, num_classes, num_train, tuple("abcdefghij"[:num_classes]))


def central_of(kind=MEAN, spec=None, **changes) -> CentralImages:
    return CentralImages(kind, config(**changes), spec or spec_of(), Runtime())


def private_of(central: CentralImages, samples: Samples, epsilon=math.inf, noise_seed=0) -> PrivateData:
    ledger = Ledger(Budget(epsilon, 1e-5))
    ledger.adopt([central.release()])
    return PrivateData(samples, central.spec, ledger, NoiseSource(noise_seed))


def random_samples(num=60, resolution=8, channels=1, num_classes=3, seed=0) -> Samples:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, channels, resolution, resolution), dtype=np.uint8)
    return Samples(images, np.arange(num, dtype=np.int64) % num_classes)


def coarse(central: CentralImages, samples: Samples, **options) -> torch.Tensor:
    """The result of one query, before post-processing."""
    return central._query_once(private_of(central, samples, **options)).double()


# ------------------------------------------------------------------------------------------ plan


def test_the_plan_is_one_sampled_release():
    central = central_of(spec=spec_of(num_train=6000), sample_num=7, sigma=3.0, batch_size=600)
    assert central.release() == Release(CENTRAL_IMAGES, 3.0, 0.1, 7)


def test_a_batch_above_the_number_of_records_takes_all():
    assert central_of(batch_size=6000).release().sample_rate == 1.0


@pytest.mark.parametrize(("resolution", "side"), [(8, 4), (28, 14), (32, 16), (48, 12), (64, 16), (128, 16)])
def test_queries_see_at_most_16_pixels_a_side(resolution, side):
    """As published: half of 28 and 32 px, a quarter of 64, an eighth of 128."""
    assert central_of(spec=spec_of(resolution=resolution), downscale=None).side == side


# ------------------------------------------------------------------------------------------ means


def test_without_noise_and_sampling_a_result_is_the_class_sum_over_the_public_count():
    """Also for a class of another size: it comes out darker or brighter, for its own count is private."""
    samples = random_samples().take(np.arange(60)[np.arange(60) % 3 != 1])
    found = coarse(central_of(), samples)
    assert found.shape == (3, 1, 8, 8)
    for label in range(3):
        expected = samples.images[samples.labels == label].astype(float).sum(0) / 255 / 20
        torch.testing.assert_close(found[label], torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert not found[1].any()


def test_the_divisor_is_the_expected_count_of_the_sample():
    """Half of the records are sampled, so half of N / classes is what a class is divided by."""
    white = Samples(np.full((600, 1, 8, 8), 255, np.uint8), np.arange(600) % 3)
    central = central_of(spec=spec_of(600), batch_size=300, sample_num=20)
    private = private_of(central, white)
    results = torch.stack([central._query_once(private) for _ in range(20)])
    assert results.mean().item() == pytest.approx(1.0, abs=0.05)
    assert results.std(0).max().item() > 0.01  # the samples differ, and nothing divides by their size


def test_every_second_pixel_is_seen():
    samples = random_samples()
    found = coarse(central_of(downscale=2), samples)
    expected = samples.images[samples.labels == 0][:, :, ::2, ::2].astype(float).sum(0) / 255 / 20
    torch.testing.assert_close(found[0], torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [MEAN, MODE])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_record_moves_the_released_sums_by_at_most_the_bound(kind, channels, monkeypatch):
    """Black, white and random records, in the units in which the noise is scaled: the mechanism clips nothing off."""
    spec = spec_of(channels=channels)
    sums, bounds = [], []
    ask = PrivateData.sampled_noisy_sum

    def watched(self, name, fn, bound, by_class):
        bounds.append(bound)
        sums.append(ask(self, name, fn, bound, by_class=by_class))
        return sums[-1]

    monkeypatch.setattr(PrivateData, "sampled_noisy_sum", watched)
    whole = random_samples(channels=channels)
    for value in (0, 255, None):
        images = whole.images.copy()
        images[-1] = images[-1] if value is None else value
        for kept in (60, 59):
            coarse(central_of(kind, spec), Samples(images, whole.labels).take(np.arange(kept)))
        moved = (sums[-2].double() - sums[-1].double()).flatten(1).norm(dim=1)
        assert moved.max() <= bounds[-1] * (1 + 1e-5)
        assert (moved > 1e-6).sum() <= 1  # one class alone
        if kind == MODE or value == 255:
            assert moved.max().item() == pytest.approx(bounds[-1], rel=1e-5)  # no larger than it has to be
    assert set(bounds) == {math.sqrt(64 * channels)}


@pytest.mark.parametrize(("max_norm", "bound"), [(None, 8.0), (2.0, 2.0)])
def test_noise_of_a_mean(max_norm, bound):
    """std = sigma * bound / (N q / classes); an empty class has the same."""
    central = central_of(max_norm=max_norm, sample_num=40, sigma=7.0)
    black = Samples(np.zeros((30, 1, 8, 8), np.uint8), np.zeros(30, np.int64))
    private = private_of(central, black, epsilon=50.0)
    results = torch.stack([central._query_once(private) for _ in range(40)])
    for label in (0, 1, 2):
        assert results[:, label].std().item() == pytest.approx(7.0 * bound / 20, rel=0.06)
    assert private.ledger.complete


def test_a_smaller_norm_darkens_bright_records():
    white = Samples(np.full((60, 1, 8, 8), 255, np.uint8), np.arange(60) % 3)
    assert coarse(central_of(max_norm=2.0), white).mean().item() == pytest.approx(0.25, rel=1e-4)


# ------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize(("bins", "levels"), [(None, [0, 1]), (3, [0, 0.5, 1])])
def test_a_mode_is_the_most_frequent_grey_level(bins, levels):
    samples = random_samples(120)
    central = central_of(MODE, spec_of(120), bins=bins)
    found = coarse(central, samples)
    assert found.unique().tolist() == levels
    grey = samples.images[samples.labels == 2, 0, 3, 5] / 255
    votes = [np.sum(np.abs(grey - level) < 0.5 / (len(levels) - 1)) for level in levels]
    assert found[2, 0, 3, 5].item() == levels[int(np.argmax(votes))]


def test_noise_of_a_mode_covers_every_bin(monkeypatch):
    central = central_of(MODE, spec_of(num_classes=2), sigma=9.0, bins=16)
    sums, ask = [], PrivateData.sampled_noisy_sum
    monkeypatch.setattr(
        PrivateData, "sampled_noisy_sum", lambda *args, **kw: sums.append(ask(*args, **kw)) or sums[-1]
    )
    coarse(central, random_samples(0, num_classes=2), epsilon=50.0)
    assert sums[0].shape == (2, 64 * 16)
    assert sums[0].std().item() == pytest.approx(9.0 * 8, rel=0.06)


# ------------------------------------------------------------------------------------------ results


def test_a_result_has_sample_num_images_of_every_class():
    central = central_of(spec=spec_of(channels=3), sample_num=4, downscale=2, smooth=True)
    private = private_of(central, random_samples(channels=3))
    result = central.query(private)
    assert result.images.shape == (12, 3, 8, 8) and result.images.dtype == np.uint8
    assert np.bincount(result.labels).tolist() == [4, 4, 4]
    assert private.ledger.executed(CENTRAL_IMAGES) == 4


def test_labels_belong_to_their_images():
    images = np.zeros((60, 1, 8, 8), np.uint8)
    labels = np.arange(60, dtype=np.int64) % 3
    images[labels == 1] = 128
    images[labels == 2] = 255
    result = central_of(sample_num=2).query(private_of(central_of(sample_num=2), Samples(images, labels)))
    brightness = result.images.mean((1, 2, 3))
    assert brightness == pytest.approx(np.array([0, 128, 255])[result.labels], abs=1)


def test_the_query_runs_once_and_survives_a_checkpoint():
    central = central_of()
    private = private_of(central, random_samples())
    result = central.query(private)
    assert central.query(private) is result
    other = central_of()
    other.load_state_dict(central.state_dict())
    kept = other.query(private_of(other, random_samples(seed=9)))
    assert np.array_equal(kept.images, result.images) and np.array_equal(kept.labels, result.labels)
    empty = central_of()
    empty.load_state_dict(central_of().state_dict())
    assert empty.result is None


def test_without_private_data_there_is_no_result():
    with pytest.raises(UserError, match=r"sensitive_data\.name is null"):
        central_of().query(None)


# ------------------------------------------------------------------------------------------ post-processing


def finished(image, **changes) -> np.ndarray:
    values = torch.as_tensor(image, dtype=torch.float32)
    channels, side = values.shape[-3], values.shape[-1] * changes.get("downscale", 1)
    return central_of(spec=spec_of(resolution=side, channels=channels), **changes)._postprocess(values)


def test_noise_beyond_black_and_white_is_clamped_before_it_is_enlarged():
    bright = finished(torch.tensor([[[[-3.0, 7.0], [0.5, 0.25]]]]), downscale=2)
    assert bright.shape == (1, 1, 4, 4) and bright.dtype == np.uint8
    assert bright[0, 0, 0, 0] == 0 and bright[0, 0, 0, 3] == 255
    assert bright[0, 0, 3].tolist() == [128, 112, 80, 64]  # bilinear between 0.5 and 0.25


def test_smoothing_removes_single_pixels_and_keeps_edges():
    image = torch.zeros(1, 3, 6, 6)
    image[..., 3:] = 1.0
    image[:, :, 2, 1] = 1.0
    expected = np.zeros((1, 3, 6, 6), np.uint8)
    expected[..., 3:] = 255
    assert np.array_equal(finished(image, smooth=True), expected)


def test_smoothing_takes_the_median_of_nine_with_the_border_repeated():
    image = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = finished(image, smooth=True)
    pixels = np.pad((image.numpy() * 255).round(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for row in range(5):
        for column in range(5):
            window = pixels[:, :, row : row + 3, column : column + 3].reshape(2, 3, 9)
            assert np.array_equal(found[:, :, row, column], np.median(window, axis=2))


def test_grey_images_are_sharpened():
    ramp = (torch.arange(6.0) ** 2 / 50).expand(1, 1, 6, 6)  # monotone: the median changes its border alone
    found = finished(ramp, smooth=True)[0, 0, 2].astype(int)
    pixels = (ramp[0, 0, 0] * 255).round().numpy()
    for column in (2, 3):
        assert found[column] == 3 * pixels[column] - pixels[column - 1] - pixels[column + 1]


# ------------------------------------------------------------------------------------------ augmentation


def dealt(num: int, key: int = 0) -> Draws:
    return Draws(bytes([key]) * 32, 0, num)


def test_every_access_is_augmented_differently():
    central, images = central_of(), random_samples(40).images
    kept = images.copy()
    one, other = central.augment(images, dealt(40)), central.augment(images, dealt(40, key=1))
    assert one.shape == images.shape and one.dtype == np.uint8
    assert not np.array_equal(one, other)
    changed = (one != images).any((1, 2, 3)).mean()
    assert changed > 0.5
    assert np.array_equal(images, kept)


def test_augmentation_is_repeatable_by_position_and_leaves_the_global_generator_alone():
    central, images = central_of(spec=spec_of(channels=3)), random_samples(10, channels=3).images
    state = torch.random.get_rng_state()
    whole = central.augment(images, dealt(10))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(whole[4:7], central.augment(images[4:7], dealt(10)[4:7]))


def test_magnitudes_run_from_one_to_the_largest(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "models.public.central_images._rand_augment",
        lambda num, size: seen.append((num, size)) or (lambda x: x),
    )
    central = central_of(num_ops=3, max_magnitude=4)
    seen.clear()
    central.augment(random_samples(200).images, dealt(200))
    assert {num for num, _ in seen} == {3}
    assert {size for _, size in seen} == {1, 2, 3, 4}


def test_without_operations_images_stay_and_torchvision_is_not_needed(monkeypatch):
    monkeypatch.setattr(
        "models.public.central_images._rand_augment", lambda *_: pytest.fail("torchvision was asked")
    )
    images = random_samples(3).images
    assert central_of(num_ops=0).augment(images, dealt(3)) is images


def test_a_missing_torchvision_is_reported_before_any_query(monkeypatch):
    import builtins

    load = builtins.__import__

    def broken(name, *rest):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(
        UserError, match=r"num_ops: 2 needs torchvision, which does not load \(operator torch"
    ):
        central_of()


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "wrong",
    ["sample_num=0", "sigma=0.0", "batch_size=0", "downscale=0", "bins=1", "max_norm=0.0", "num_ops=-1",
     "max_magnitude=0", "max_magnitude=31"],
)  # fmt: skip
def test_bad_settings_are_refused(make_method, wrong):
    with pytest.raises(UserError, match=rf"public_data\.central\.{wrong.split('=')[0]}"):
        make_method("DP-FETA", f"public_data.central.{wrong}")


# ------------------------------------------------------------------------------------------ the checks catch mutants


def test_a_divisor_that_counts_is_caught(monkeypatch):
    def by_count(self, private):
        total = private.sampled_noisy_sum(CENTRAL_IMAGES, self._pixels, self._pixel_bound, by_class=True)
        count = np.bincount(private._records._labels.numpy(), minlength=3)[:, None].clip(1)
        return (total / torch.from_numpy(count)).view(3, 1, 8, 8)

    monkeypatch.setattr(CentralImages, "_query_once", by_count)
    with pytest.raises(AssertionError):
        test_the_divisor_is_the_expected_count_of_the_sample()


def test_a_bound_per_pixel_is_caught(monkeypatch):
    """Noise scaled for one pixel instead of all of them."""
    monkeypatch.setattr(CentralImages, "_vote_bound", property(lambda self: 1.0))
    with pytest.raises(AssertionError):
        test_noise_of_a_mean(None, 8.0)


def test_votes_for_two_levels_are_caught(monkeypatch):
    def twice(self, images, labels):
        return torch.ones(len(images), 64 * self.bins)

    monkeypatch.setattr(CentralImages, "_votes", twice)
    with pytest.raises(AssertionError):
        test_a_mode_is_the_most_frequent_grey_level(None, [0, 1])


@pytest.mark.parametrize("name", ["DPGAN", "GS-WGAN"])
def test_gans_see_central_images_changed_a_little_at_every_look(name, make_trial, monkeypatch):
    """As published, and as the diffusion methods do."""
    looks, augment = [], CentralImages.augment
    monkeypatch.setattr(
        CentralImages,
        "augment",
        lambda self, images, rng: looks.append(len(images)) or augment(self, images, rng),
    )
    length = "n_epochs" if name == "DPGAN" else "iterations"
    settings = ("public_data.name=central_mean", f"pretrain.{length}=3", "pretrain.batch_size=3")
    trial = make_trial(
        name, *settings, "public_data.central.batch_size=60", "public_data.central.sample_num=1"
    )
    trial.synthesizer.pretrain(None, trial.private)
    assert set(looks) == {3} and len(looks) >= 3


@pytest.mark.parametrize("name", ["DPGAN", "GS-WGAN", "DP-MERF", "DP-FETA"])
def test_central_images_are_never_mirrored(name, make_method):
    method = make_method(name, "public_data.name=central_mean", "public_data.flip=true")
    assert not method.pretraining.flip and "public_data.flip" in method.settings_without_effect()


def test_mean_embeddings_report_that_they_change_no_central_image(make_method):
    idle = make_method("DP-MERF", "public_data.name=central_mean").settings_without_effect()
    assert {"public_data.central.num_ops", "public_data.central.max_magnitude"} <= set(idle)
    assert "public_data.central.num_ops" not in make_method("DP-MERF").settings_without_effect()
