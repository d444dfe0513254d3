"""Brightness, contrast and saturation, against Pillow's ImageEnhance."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from pipeline.config.augment import AugmentSettings
from pipeline.training.augment import augment, colour
from pipeline.training.augment.draws import BatchRows, Purpose

LANES = 4
KINDS = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
ROWS = BatchRows(0, 3, range(LANES), LANES, 4)


def images_of(rows=16, channels=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, channels, 9, 7), dtype=np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_that_of_pillow_with_the_same_factor(kind):
    images = images_of()
    changed = colour.jitter(images, AugmentSettings(**{kind: 0.6}), ROWS)
    draws = ROWS.generator(Purpose.COLOUR).random(ROWS.shape(3), dtype="float32")[..., list(KINDS).index(kind)]
    factors = 1 + (2 * draws.ravel() - 1) * 0.6
    assert factors.min() < 0.6 < 1.4 < factors.max()
    for image, found, factor in zip(images, changed, factors.tolist(), strict=True):
        enhanced = KINDS[kind](Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(factor)
        expected = np.asarray(enhanced).transpose(2, 0, 1).astype(int)
        assert np.abs(found.numpy().astype(int) - expected).max() <= 1  # Pillow cuts off where this rounds


def test_grey_images_have_brightness_and_contrast():
    images = images_of(channels=1)
    changed = colour.jitter(images, AugmentSettings(brightness=0.5, contrast=0.5), ROWS)
    assert not torch.equal(changed, images)
    with pytest.raises(ValueError, match=r"saturation 0\.5 is for images in colour"):
        AugmentSettings(saturation=0.5).check(image_shape=(1, 28, 28), lane_rows=4, reader="arrow")


def test_all_three_change_an_image_in_an_order_that_is_drawn():
    settings = AugmentSettings(brightness=0.4, contrast=0.4, saturation=0.4)
    orders = set()
    for step in range(40):
        rows = BatchRows(0, step, range(LANES), LANES, 4)
        orders.add(tuple(rows.generator(Purpose.COLOUR_ORDER).permutation(3)))
    assert len(orders) == 6
    whole = augment(images_of(), settings, seed=0, step=3, lanes=range(LANES), num_lanes=LANES)
    assert (whole != images_of()).any(dim=(1, 2, 3)).all()
    for lanes in (range(0, LANES, 2), range(1, LANES, 2), range(3, 4)):
        own = images_of().view(LANES, 4, 3, 9, 7)[list(lanes)].flatten(0, 1)
        part = augment(own, settings, seed=0, step=3, lanes=lanes, num_lanes=LANES)
        assert torch.equal(part, whole.view(LANES, 4, 3, 9, 7)[list(lanes)].flatten(0, 1))
