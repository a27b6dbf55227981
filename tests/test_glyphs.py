"""The rendered public set: deterministic, balanced, legible, and of the brightness of real digits."""

import numpy as np
import pytest

from data.glyphs import CHARACTERS, render
from utils.errors import UserError


def test_classes_shapes_and_order():
    glyphs = render(8, per_class=3)
    assert glyphs.class_names == tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    assert glyphs.samples.images.shape == (62 * 3, 1, 8, 8) and glyphs.samples.images.dtype == np.uint8
    assert np.array_equal(glyphs.samples.labels, np.repeat(np.arange(62), 3))


def test_same_seed_same_pictures_and_another_seed_others():
    first, again, other = (render(8, 4, seed).samples.images for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).mean() > 0.95


def test_more_images_per_class_begin_with_the_same_ones():
    few, many = render(8, 2).samples, render(8, 5).samples
    assert np.array_equal(few.images.reshape(62, 2, -1), many.images.reshape(62, 5, -1)[:, :2])


def test_ink_is_like_that_of_scikit_learns_digits():
    from sklearn.datasets import load_digits

    glyphs = render(8, 40).samples
    digits = glyphs.images[glyphs.labels < 10] / 255
    real = load_digits().images / 16
    assert abs(digits.mean() - real.mean()) < 0.03
    assert abs((digits == 0).mean() - (real == 0).mean()) < 0.08
    # The characters fill the height of the box and leave its sides free, in both.
    for images in (digits[:, 0], real):
        assert images.mean((0, 2)).min() > 0.1 and images.mean((0, 1))[[0, -1]].max() < 0.1


def test_a_margin_is_left_at_28_pixels_as_in_mnist():
    images = render(28, 10).samples.images[:, 0] / 255
    assert 0.10 < images.mean() < 0.17  # MNIST: 0.13
    border = np.ones((28, 28), bool)
    border[2:-2, 2:-2] = False
    assert images[:, border].mean() < 0.02


def test_rendered_digits_teach_something_about_real_ones():
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    glyphs = render(8, 60).samples
    digits = glyphs.labels < 10
    model = KNeighborsClassifier(3).fit(glyphs.images[digits].reshape(-1, 64) / 255, glyphs.labels[digits])
    real = load_digits()
    assert model.score(real.data / 16, real.target) > 0.55


def test_every_character_is_drawn_in_every_image():
    for resolution in (8, 28, 64):
        images = render(resolution, 2).samples.images
        assert images.max(axis=(1, 2, 3)).min() > 120, resolution
    assert len(CHARACTERS) == 62


@pytest.mark.parametrize(("resolution", "per_class"), [(3, 10), (8, 0)])
def test_impossible_requests_are_named(resolution, per_class):
    with pytest.raises(UserError, match=f"{per_class} images per class at {resolution} px"):
        render(resolution, per_class)
