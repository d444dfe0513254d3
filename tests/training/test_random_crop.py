"""Random resized crops: which parts are drawn, and that they are resized as Pillow does it."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.augment import AugmentSettings
from pipeline.training.augment import augment
from pipeline.training.augment.crop import draw_boxes, resized_crops
from pipeline.training.augment.draws import BatchRows

LANES = 4
SETTINGS = AugmentSettings(crop_scale=0.08)


def images_of(rows, height, width, channels=3, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (rows, channels, height, width), dtype=np.uint8))


def boxes_of(count, size, scale=0.08, ratio=4 / 3, step=0):
    return draw_boxes(BatchRows(0, step, range(LANES), LANES, count // LANES), size, scale, ratio)


def of_pillow(image, box, size):
    top, left, height, width = box
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = picture.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("size", [(40, 40), (90, 33), (61, 75)])
def test_crops_are_resized_as_pillow_does(size):
    images, boxes = images_of(24, 61, 75), boxes_of(24, (61, 75))
    found = resized_crops(images, torch.from_numpy(boxes), size).numpy().astype(int)
    for image, box, crop in zip(images, boxes.tolist(), found, strict=True):
        assert np.abs(of_pillow(image, box, size) - crop).max() <= 1


@pytest.mark.parametrize("length", [1, 20, 40, 53, 75])
@pytest.mark.parametrize("axis", [1, 2])
def test_along_one_axis_the_bytes_are_those_of_pillow(axis, length):
    image = images_of(1, 75, 75)
    box, size = [0, 0, 75, 75], [75, 75]
    box[axis + 1], size[axis - 1] = length, 40
    found = resized_crops(image, torch.tensor([box]), tuple(size))[0].numpy()
    assert np.array_equal(found, of_pillow(image[0], box, size))


def test_a_part_of_the_right_size_is_copied():
    images, boxes = images_of(2, 20, 30), torch.tensor([[3, 4, 10, 12], [10, 18, 10, 12]])
    crops = resized_crops(images, boxes, (10, 12))
    assert torch.equal(crops[0], images[0, :, 3:13, 4:16])
    assert torch.equal(crops[1], images[1, :, 10:, 18:])


def test_parts_lie_within_the_image_and_are_spread_over_their_ranges():
    boxes = boxes_of(20_000, (256, 256))
    top, left, height, width = boxes.T
    assert boxes.min() >= 0
    assert (top + height).max() == (left + width).max() == 256
    area, ratio = height * width / 256**2, width / height
    assert 0.078 < area.min() < 0.09
    assert area.max() > 0.95
    assert 0.74 < ratio.min() < ratio.max() < 1.35
    small = area[area < 0.4]  # those always fit, so that they are uniform, and as often wide as tall
    assert np.histogram(small, 4, (0.08, 0.4))[0] / len(small) == pytest.approx(np.full(4, 0.25), abs=0.015)
    assert (ratio[area < 0.4] > 1).mean() == pytest.approx(0.5, abs=0.015)
    free = 256 - height[height < 200]
    assert (top[height < 200] / free).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("size", "expected"), [((10, 100), (10, 13)), ((100, 10), (13, 10)), ((30, 30), (30, 30))])
def test_what_never_fits_is_the_largest_part_of_an_allowed_shape(size, expected):
    boxes = boxes_of(8, size, scale=1.0)
    if size == (30, 30):  # nearly all of it, or all of it
        assert (boxes[:, 2:] >= 22).all()
        return
    assert (boxes[:, 2:] == expected).all()
    assert (boxes[:, :2] == (np.array(size) - expected) // 2).all()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_crops_are_the_same_for_any_number_of_workers(world_size):
    images = images_of(24, 20, 26)
    options = {"seed": 1, "step": 5, "num_lanes": LANES, "size": (16, 12)}
    whole = augment(images, SETTINGS, lanes=range(LANES), **options)
    assert whole.shape == (24, 3, 16, 12)
    assert len({crop.numpy().tobytes() for crop in whole}) == 24
    for rank in range(world_size):
        lanes = range(rank, LANES, world_size)
        own = images.view(LANES, 6, 3, 20, 26)[list(lanes)].flatten(0, 1)
        part = augment(own, SETTINGS, lanes=lanes, **options)
        assert torch.equal(part, whole.view(LANES, 6, 3, 16, 12)[list(lanes)].flatten(0, 1))


def test_without_a_size_crops_are_as_large_as_the_images():
    images = images_of(8, 20, 26)
    options = {"seed": 1, "lanes": range(LANES), "num_lanes": LANES}
    crops = augment(images, SETTINGS, step=0, **options)
    assert crops.shape == images.shape
    assert not torch.equal(crops, augment(images, SETTINGS, step=1, **options))
