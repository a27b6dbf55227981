"""DP-Distill: the features of its one release, the images that are fitted to it, and what it delivers."""

import math

import numpy as np
import pytest
import torch

from data.spec import DataSpec, PublicData, Samples
from models.distillation.augmentation import AugmentConfig, augmented
from models.embedding.random_networks import RandomNetworkConfig, RandomNetworkEmbedding
from opacus_ext.accounting import Release
from utils.errors import UserError
from utils.runtime import Runtime

MASS = 0.2
STILL = AugmentConfig(shift=0.0, rotation=0.0, zoom=0.0, flip=False)


def embedding_of(channels=1, resolution=28, **changes) -> RandomNetworkEmbedding:
    settings = {
        "d_rff": 200, "class_mass": MASS, "features": "networks", "num_networks": 2, "width": 4,
        "squared_bandwidth": 0.3,
    }  # fmt: skip
    spec = DataSpec("toy", resolution, channels, 2, 10, ("a", "b"))
    return RandomNetworkEmbedding(RandomNetworkConfig(**(settings | changes)), spec, Runtime())


EXTREMES = {
    "black": lambda shape: torch.full(shape, -1.0),
    "white": lambda shape: torch.ones(shape),
    "noise": lambda shape: 2 * torch.rand(shape) - 1,
    "one pixel": lambda shape: (
        torch.nn.functional.one_hot(torch.tensor(0), math.prod(shape)).float().view(shape)
    ),
    "out of range": lambda shape: 1e4 * torch.randn(shape),
}


@pytest.mark.parametrize("image", EXTREMES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"squared_bandwidth": None}, {"features": "pixels"}, {"channels": 3, "resolution": 8}],
    ids=["kernel", "features", "pixels", "colour"],
)
def test_no_record_is_longer_than_the_bound_that_the_noise_is_scaled_for(image, changes):
    embedding = embedding_of(**changes)
    shape = (2, changes.get("channels", 1), *[changes.get("resolution", 28)] * 2)
    norms = embedding.features(EXTREMES[image](shape)).norm(dim=1)
    assert (norms <= math.hypot(1, MASS) * (1 + 1e-5)).all()


def test_pixels_without_a_kernel_are_within_the_bound():
    embedding = embedding_of(features="pixels", squared_bandwidth=None)
    assert embedding.features(torch.ones(1, 1, 28, 28)).norm().item() == pytest.approx(math.hypot(1, MASS))


def test_a_record_moves_the_release_by_the_bound_and_another_label_by_root_two_of_it(make_trial, samples):
    """Worst cases under both relations, without noise: the record leaves, or changes class."""
    moved = []
    relabelled = samples.labels.copy()
    relabelled[-1] = (relabelled[-1] + 1) % 3
    for records in (samples, samples.take(np.arange(59)), Samples(samples.images, relabelled)):
        trial = make_trial("DP-Distill", epsilon=math.inf, records=records)
        trial.run()
        moved.append(60 * trial.synthesizer.noisy_embedding)
    bound = math.hypot(1, MASS)
    assert (moved[1] - moved[0]).norm().item() == pytest.approx(bound, rel=1e-4)
    assert (moved[2] - moved[0]).norm().item() == pytest.approx(math.sqrt(2) * bound, rel=1e-4)


def test_the_noise_has_the_planned_size(make_trial, samples):
    without = make_trial("DP-Distill", "model.d_rff=4000", epsilon=math.inf)
    with_noise = make_trial("DP-Distill", "model.d_rff=4000", epsilon=1, noise_seed=3)
    for trial in (without, with_noise):
        trial.run()
    noise = 60 * (with_noise.synthesizer.noisy_embedding - without.synthesizer.noisy_embedding)
    multiplier = with_noise.private.ledger.planned("mean embedding").noise_multiplier
    assert noise.std().item() == pytest.approx(multiplier * math.hypot(1, MASS), rel=0.03)


def test_the_plan_is_one_release_over_all_records(make_method):
    assert make_method("DP-Distill").privacy_plan() == [Release("mean embedding", None)]


def test_the_kernel_is_that_of_the_features():
    """4 standard errors of a mean of 20,000 cosines, whose variance is at most 1/2."""
    plain, kernel = embedding_of(squared_bandwidth=None), embedding_of(d_rff=40_000)
    images = 2 * torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)) - 1
    rows, phi = plain.features(images)[:, :-1], kernel.features(images)[:, :-1]
    expected = torch.exp(-(torch.cdist(rows, rows) ** 2) / 0.6)
    torch.testing.assert_close(phi @ phi.T, expected, rtol=0, atol=4 * (0.5 / 20_000) ** 0.5)


@pytest.mark.parametrize("changes", [{}, {"squared_bandwidth": None}, {"features": "pixels"}])
def test_the_parts_together_are_the_features(changes):
    embedding = embedding_of(**changes)
    images = 2 * torch.rand(3, 1, 28, 28) - 1
    whole = embedding.features(images)[:, :-1]
    parts = torch.full_like(whole, math.nan)
    for index in range(embedding.num_parts):
        rows, columns = embedding.part(images, index)
        parts[:, columns] = rows
    torch.testing.assert_close(parts, whole)


def test_the_images_come_nearer_to_the_target(make_trial):
    settings = ["train.num_steps=60", "train.augment=0", "model.d_rff=400", "train.images_per_class=4"]
    trial = make_trial("DP-Distill", *settings, epsilon=math.inf)
    trial.run()
    method = trial.synthesizer
    target = method.noisy_embedding

    def distance(images: torch.Tensor) -> float:
        labels = torch.arange(3).repeat_interleave(4)
        return (method.embedding.mean(images, labels, 3) - target).norm().item()

    rng = torch.Generator().manual_seed(1)
    at_random = distance(2 * torch.rand(12, *method.spec.image_shape, generator=rng) - 1)
    assert distance(method.distilled.set.images()) < 0.7 * at_random


def test_images_unlike_their_class_are_replaced_by_others_of_it(make_trial):
    settings = [
        "train.images_per_class=4",
        "train.revive=0.5",
        "model.features=pixels",
        "model.squared_bandwidth=0.01",
    ]
    trial = make_trial("DP-Distill", *settings, epsilon=math.inf)
    trial.run()
    distilled = trial.synthesizer.distilled
    first = distilled.set.classes[0]
    with torch.no_grad():
        first[:] = first[:1].clone()
        first[1] = -first[0]
    before = first.detach().clone()
    means = distilled.embedding.features(before[:1]).expand(3, -1).clone()
    distilled._revive(means)
    changed = (first.detach() != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]
    assert (first[1] - before[0]).abs().mean() < (before[1] - before[0]).abs().mean()


def public_set(images: np.ndarray) -> PublicData:
    return PublicData("toy", Samples(images, np.zeros(len(images), np.int64)), ("x",))


def test_a_public_start_takes_the_images_whose_mean_is_nearest(make_trial, samples):
    """The private images of each class are among the public ones: without noise they are found again."""
    rng = np.random.default_rng(0)
    others = rng.integers(0, 256, (40, *samples.images.shape[1:]), dtype=np.uint8)
    public = public_set(np.concatenate([others, samples.images]))
    settings = ["train.start=public", "train.num_steps=0", "model.d_rff=4000", "train.images_per_class=20"]
    settings += ["public_data.name=glyphs", "model.squared_bandwidth=0.05"]
    trial = make_trial("DP-Distill", *settings, epsilon=math.inf)
    trial.synthesizer.pretrain(public, trial.private)
    trial.synthesizer.train(trial.private)
    drawn = trial.synthesizer.generate(60)
    private = {(image.tobytes(), label) for image, label in zip(samples.images, samples.labels, strict=True)}
    found = [(i.tobytes(), k) in private for i, k in zip(drawn.images, drawn.labels, strict=True)]
    assert np.mean(found) > 0.9


def test_a_public_start_survives_a_restart_before_the_release(make_trial, samples):
    """The public images are in the checkpoint until they are chosen from, and not afterwards."""
    settings = ["train.start=public", "train.num_steps=0", "public_data.name=glyphs"]
    first, second = (make_trial("DP-Distill", *settings, epsilon=math.inf) for _ in range(2))
    first.synthesizer.pretrain(public_set(samples.images), first.private)
    state = first.synthesizer.state_dict()
    assert len(state["public"]) == 60
    second.synthesizer.load_state_dict(state)
    for trial in (first, second):
        trial.synthesizer.train(trial.private)
    assert (first.synthesizer.generate(9).images == second.synthesizer.generate(9).images).all()
    assert second.synthesizer.state_dict()["public"] is None


def test_a_public_start_needs_enough_public_images(make_trial, samples):
    trial = make_trial("DP-Distill", "train.start=public", "train.images_per_class=50")
    with pytest.raises(UserError, match=r"train\.start.*50.*public_data\.name"):
        trial.synthesizer.pretrain(public_set(samples.images[:49]), trial.private)
    with pytest.raises(UserError, match=r"train\.start.*train\.start=noise"):
        trial.synthesizer.pretrain(None, trial.private)


def test_samples_are_the_images_first_and_augmented_repetitions_then(make_trial):
    trial = make_trial("DP-Distill", "augment.shift=0.3")
    trial.run()
    drawn, distinct = trial.synthesizer.generate(30), 6
    first = {image.tobytes() for image in drawn.images[:distinct]}
    assert len(first) == distinct
    assert not any(image.tobytes() in first for image in drawn.images[distinct:])
    assert np.bincount(drawn.labels).tolist() == [10, 10, 10]
    assert (trial.synthesizer.generate(30).images == drawn.images).all()


@pytest.mark.parametrize(
    "setting",
    ["model.features=pixel", "model.width=0", "model.squared_bandwidth=0", "train.start=privat",
     "train.images_per_class=0", "augment.shift=0.6", "augment.zoom=-0.1", "train.augment=1.1"],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named(make_method, setting):
    key, value = setting.split("=")
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        make_method("DP-Distill", setting)


# ------------------------------------------------------------------------------------------------- augmentation


def test_without_strength_an_image_stays():
    images = torch.rand(5, 3, 9, 9)
    config = AugmentConfig(shift=0.2, rotation=30.0, zoom=0.3, flip=False)
    torch.testing.assert_close(augmented(images, config, 0.0, torch.Generator()), images, atol=1e-5, rtol=0)


def test_a_mirror_image_is_one_only_with_flip():
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(shift=0.0, rotation=0.0, zoom=0.0, flip=True)
    moved = augmented(images, config, 1.0, torch.Generator().manual_seed(1))
    mirrored = (moved - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    same = (moved - images).abs().amax((1, 2, 3)) < 1e-4
    assert (mirrored | same).all()
    assert 60 < int(mirrored.sum()) < 140
    assert not ((augmented(images, STILL, 1.0, torch.Generator()) - images).abs() > 1e-4).any()


def test_shifts_stay_within_their_share_of_the_side():
    dot = torch.full((300, 1, 21, 21), -1.0)
    dot[:, :, 10, 10] = 1.0
    config = AugmentConfig(shift=0.1, rotation=0.0, zoom=0.0, flip=False)
    moved = augmented(dot, config, 1.0, torch.Generator().manual_seed(0)) + 1
    place = (moved.sum((1, 2)) * torch.arange(21)).sum(1) / moved.sum((1, 2, 3))
    assert 1.5 < (place - 10).abs().max().item() <= 2.1 + 1e-3


def test_gradients_reach_the_images():
    images = torch.rand(2, 1, 28, 28, requires_grad=True)
    config = AugmentConfig(shift=0.1, rotation=10.0, zoom=0.1, flip=False)
    embedding_of().features(augmented(images, config, 1.0, torch.Generator())).sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
