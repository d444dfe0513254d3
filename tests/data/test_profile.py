"""Figures of images: sums are exact, whatever the images' layout."""

import numpy as np
import pytest

from pipeline.data.profile import channel_sums, profile_of_images

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 9, 8), dtype=np.uint8)


@pytest.mark.parametrize("images", [IMAGES, IMAGES[::2, :, 1:, ::-1], IMAGES[:, :1], IMAGES[:0]])
def test_channel_sums_are_exact(images):
    wide = images.astype(object)
    channels = range(images.shape[1])
    expected = [[wide[:, c].sum() for c in channels], [(wide[:, c] ** 2).sum() for c in channels]]
    assert channel_sums(images).tolist() == expected
    assert profile_of_images(images)["channel_sums"].tolist() == expected
