import numpy as np
import pytest
from PIL import Image
from small_images import COLOUR, GREY, file_of, made, noise, picture, refused

from pipeline.ingest import geometry
from pipeline.ingest.images import ImageSpec


def marked(height, width) -> bytes:
    """Black with a white square of a quarter of the shorter side in the middle."""
    pixels = np.zeros((height, width), np.uint8)
    half = min(height, width) // 8
    pixels[height // 2 - half : height // 2 + half, width // 2 - half : width // 2 + half] = 255
    return file_of(Image.fromarray(pixels), "PNG")


def centre_and_area(found) -> tuple[float, float, float]:
    weights = found / found.sum()
    y, x = np.indices(found.shape)
    return (weights * y).sum(), (weights * x).sum(), found.sum() / 255


@pytest.mark.parametrize("size", [(80, 80), (80, 200), (200, 80), (16, 400), (1000, 640)])
def test_a_crop_keeps_the_centre_and_fits_the_shorter_side(size):
    found = made(marked(*size), shape=(1, 32, 32))[0]
    y, x, area = centre_and_area(found)
    np.testing.assert_allclose([y, x], 15.5, atol=0.1)
    assert area == pytest.approx(8 * 8, rel=0.05)  # a quarter of the side that fits


@pytest.mark.parametrize("size", [(80, 80), (80, 200), (200, 80), (64, 640)])
def test_a_letterbox_keeps_the_centre_and_fits_the_longer_side(size):
    found = made(marked(*size), shape=(1, 40, 40), resize="letterbox", background=0)[0]
    y, x, area = centre_and_area(found)
    np.testing.assert_allclose([y, x], 19.5, atol=0.51)  # an odd rest of the background has no middle
    side = 2 * (min(size) // 8) * 40 / max(size)
    assert area == pytest.approx(side * side, rel=0.1)


def test_a_letterbox_is_filled_with_the_background():
    payload = file_of(Image.new("RGB", (100, 50), (10, 20, 30)), "PNG")
    found = made(payload, shape=(3, 20, 20), resize="letterbox", background=99)
    assert (found[:, :5] == 99).all()
    assert (found[:, 15:] == 99).all()
    assert (found[:, 5:15] == np.array([10, 20, 30])[:, None, None]).all()


def test_halving_averages_pixels():
    smooth = np.add.outer(np.arange(48) * 2, np.arange(40) * 3).astype(np.uint8)
    found = made(file_of(Image.fromarray(smooth), "PNG"), shape=(1, 24, 20))[0]
    blocks = smooth.reshape(24, 2, 20, 2).mean(axis=(1, 3))
    assert np.abs(found - blocks)[1:-1, 1:-1].max() <= 1


def test_a_crop_takes_the_middle_pixels_where_nothing_is_scaled():
    pixels = noise(12, 40)
    np.testing.assert_array_equal(made(file_of(Image.fromarray(pixels), "PNG"), shape=GREY)[0], pixels[:, 15:25])


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
def test_every_size_can_be_resized(resize):
    """Also those where size / (wanted / size) is a little more than wanted: 47 and 24, 220 and 28, ..."""
    for wanted in (24, 28, 32, 37):
        spec = ImageSpec((1, wanted, wanted), resize=resize)
        for size in range(1, 400):
            for image in (Image.new("L", (size, size)), Image.new("L", (size + 5, size)), Image.new("L", (size, 999))):
                assert geometry.fit(image, None, spec).size == (wanted, wanted)


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_thin_and_tiny_images_are_resized(size, resize):
    payload = file_of(Image.new("RGB", size, (9, 9, 9)), "PNG")
    assert (made(payload, resize=resize, background=9) == 9).all()


def test_an_image_of_the_right_size_is_not_resampled():
    pixels = noise(12, 10)
    for resize in ("none", "crop", "letterbox"):
        found = made(file_of(Image.fromarray(pixels), "PNG"), shape=GREY, resize=resize)
        np.testing.assert_array_equal(found[0], pixels)


def test_without_resizing_other_sizes_are_refused():
    assert refused(picture("PNG", 12, 11), ImageSpec(COLOUR, resize="none")) == "wrong_size"
    assert refused(picture("PNG", 10, 12), ImageSpec(COLOUR, resize="none")) == "wrong_size"
