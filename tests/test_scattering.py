"""Scattering features: the filters, the transform against its definition, and what one image may depend on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.spec import DataSpec
from extractors import EXTRACTORS
from extractors.scattering import ANGLES, NUM_CHANNELS, SCALES, STEP, filter_bank
from utils.images import to_float


def extractor(resolution=28, channels=1):
    spec = DataSpec("toy", resolution, channels, 2, 10, ("0", "1"))
    return EXTRACTORS.resolve("scattering")(spec, Path(), "cpu")


def images(number=2, channels=1, resolution=28):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (number, channels, resolution, resolution), np.uint8)
    )


@pytest.mark.parametrize(
    ("resolution", "channels", "expected"), [(28, 1, 3969), (32, 3, 15552), (30, 1, 5184), (8, 1, 324)]
)
def test_number_of_features(resolution, channels, expected):
    features, logits = extractor(resolution, channels)(images(2, channels, resolution))
    assert features.shape == (2, expected) and logits is None


def test_wavelets_have_mean_zero_and_the_low_pass_filter_has_mean_one():
    lowpass, bands = filter_bank(36)
    assert np.abs(bands[:, :, 0, 0]).max() < 1e-9 and lowpass[0, 0] == pytest.approx(1)
    # Together they let every frequency pass, and amplify none by much (a frame).
    energy = lowpass**2 + ((bands**2).sum((0, 1)) + (bands**2).sum((0, 1))[::-1, ::-1]) / 2
    assert energy.max() < 1.5


def convolved(image, response):
    """Circular convolution by its definition, one shift at a time."""
    kernel = np.fft.ifft2(response)
    shifts = [(i, j) for i in range(len(kernel)) for j in range(len(kernel))]
    return sum(kernel[i, j] * np.roll(image, (i, j), (0, 1)) for i, j in shifts)


def test_coefficients_follow_their_definition():
    picture = images(1, 1, 8)
    padded = np.pad(to_float(picture)[0, 0].numpy(), STEP, mode="reflect").astype(np.float64)
    lowpass, bands = filter_bank(len(padded))
    first = [[np.abs(convolved(padded, band)) for band in bands[scale]] for scale in range(SCALES)]
    second = [np.abs(convolved(one, band)) for one in first[0] for band in bands[1]]
    # Layers of the coarser wavelets are kept at every other pixel, and averaged with the filter at these pixels.
    half = np.fft.fft2(4 * np.fft.ifft2(lowpass)[::2, ::2])
    coarse = [layer[::2, ::2] for layer in (*first[1], *second)]
    inner, inner_half = slice(STEP, -STEP, STEP), slice(STEP // 2, -STEP // 2, STEP // 2)
    expected = np.stack(
        [convolved(layer, lowpass).real[inner, inner] for layer in (padded, *first[0])]
        + [convolved(layer, half).real[inner_half, inner_half] for layer in coarse]
    )
    found = extractor(8)._scatter(to_float(picture))[0]
    assert found.shape[0] == NUM_CHANNELS == 1 + SCALES * ANGLES + ANGLES**2
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


def test_features_depend_on_one_image_alone():
    batch = images(3)
    torch.testing.assert_close(extractor()(batch[1:2])[0], extractor()(batch)[0][1:2])


def test_each_image_is_normalised_by_itself():
    features = extractor()(images())[0].view(2, 27, -1)
    torch.testing.assert_close(features.mean(2), torch.zeros(2, 27), atol=1e-5, rtol=0)
    spread = features.std(2, correction=0)  # GroupNorm's epsilon keeps nearly constant groups small
    assert spread.max() <= 1 + 1e-4 and spread[:, 0].min() > 0.99
