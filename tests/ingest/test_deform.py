import warnings

import numpy as np
import pytest

from pipeline.config.dataset import DeformSettings
from pipeline.ingest import deform as module
from pipeline.ingest.deform import deform, uniform

STILL = DeformSettings(shift=0, rotation=0, scale=0, elastic=0)
SHAPES = [(1, 28, 28), (3, 16, 16), (3, 11, 30), (1, 30, 7)]


def noise(rows, shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, *shape), dtype=np.uint8)


def smooth(height, width) -> np.ndarray:
    """A hill of 20 to 240: uint8 (1, 1, height, width)."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return (20 + 220 * np.exp(-2 * (y - 0.2) ** 2 - 3 * (x + 0.1) ** 2)).astype(np.uint8)[None, None]


def copies_of(images, copies=1, *, seed=3, first_id=100, settings=None) -> np.ndarray:
    ids = np.arange(first_id, first_id + len(images))
    return deform(images, ids, np.full(len(images), copies), seed=seed, settings=settings or DeformSettings())


@pytest.mark.parametrize("shape", SHAPES)
def test_without_any_deformation_images_stay_as_they_are(shape):
    images = noise(20, shape)
    np.testing.assert_array_equal(copies_of(images, settings=STILL), images)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_copy_depends_on_seed_id_and_copy_alone(shape):
    images = noise(50, shape)
    ids = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 50)
    copies = np.random.default_rng(2).integers(1, 9, 50)
    together = deform(images, ids, copies, seed=3, settings=DeformSettings())
    assert together.dtype == np.uint8
    assert together.shape == images.shape
    for row in range(50):
        one = slice(row, row + 1)
        alone = deform(images[one], ids[one], copies[one], seed=3, settings=DeformSettings())
        np.testing.assert_array_equal(alone, together[one])
    order = np.random.default_rng(4).permutation(50)
    mixed = deform(images[order], ids[order], copies[order], seed=3, settings=DeformSettings())
    np.testing.assert_array_equal(mixed, together[order])


def test_another_seed_id_or_copy_is_another_image():
    images = np.repeat(smooth(28, 28), 4, axis=0)
    base = copies_of(images)
    assert len({image.tobytes() for image in base}) == 4  # four ids
    for other in (copies_of(images, seed=4), copies_of(images, 2), copies_of(images, first_id=200)):
        assert all((a != b).any() for a, b in zip(base, other, strict=True))


def test_copies_stay_the_same_from_version_to_version():
    """An expanded dataset that is made again must be the same byte for byte."""
    numbers = uniform(np.array([0, 1, -1]), np.array([0, 1, 7]), seed=5, count=2)
    assert np.round((numbers + 1) * 2**23).astype(int).tolist() == [
        splitmix(0, 0, 5, 2), splitmix(1, 1, 5, 2), splitmix(-1, 7, 5, 2)
    ]  # fmt: skip


def splitmix(row_id, copy, seed, count) -> list[int]:
    """SplitMix64 in Python's integers (Steele, Lea & Flood 2014, figure 17); the upper 24 bits of each."""
    whole, step = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & whole
        return z ^ (z >> 31)

    start = mix(mix(row_id + seed * step & whole) ^ (copy * step & whole))
    return [mix(start + number * step & whole) >> 40 for number in range(1, count + 1)]


def test_uniform_numbers_are_uniform_and_uncorrelated():
    rows, count = 20_000, 30
    numbers = uniform(np.arange(rows), np.ones(rows, np.int64), seed=9, count=count)
    assert numbers.dtype == np.float32
    assert numbers.min() >= -1
    assert numbers.max() < 1
    error = 1 / np.sqrt(rows)
    assert np.abs(numbers.mean(axis=0)).max() < 4.5 * error / np.sqrt(3)
    np.testing.assert_allclose(numbers.var(axis=0), 1 / 3, rtol=0.03)
    among = np.corrcoef(numbers, rowvar=False) - np.eye(count)
    assert np.abs(among).max() < 5 * error
    histogram = np.histogram(numbers, bins=64, range=(-1, 1))[0] / (rows * count / 64)
    assert np.abs(histogram - 1).max() < 0.06


def test_numbers_of_neighbouring_ids_copies_and_seeds_are_unrelated():
    rows = 20_000
    ids, copies = np.arange(rows), np.ones(rows, np.int64)
    base = uniform(ids, copies, seed=1, count=4)
    for other in (
        uniform(ids + 1, copies, seed=1, count=4),
        uniform(ids, copies + 1, seed=1, count=4),
        uniform(ids, copies, seed=2, count=4),
        uniform(copies, ids, seed=1, count=4),
    ):
        between = np.corrcoef(base, other, rowvar=False)[:4, 4:]
        assert np.abs(between).max() < 5 / np.sqrt(rows)


def test_any_seed_is_taken_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [uniform(np.array([1]), np.array([1]), seed=seed, count=3) for seed in (0, 1, 2**31, 2**63, 2**64 - 1)]
    assert len({numbers.tobytes() for numbers in found}) == 5


def moved(images, numbers, **settings) -> np.ndarray:
    """Images under the affine change of these five numbers: shift y, x; angle; scale y, x."""
    rows = np.repeat(np.array([numbers], np.float32), len(images), axis=0)
    y, x = module._affine(rows, *images.shape[2:], STILL.model_copy(update=settings))
    assert (y.dtype, x.dtype) == (np.float32, np.float32)
    return module._sample(images, y, x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("down", "right"), [(2, 0), (0, -2), (-1, 2), (2, 2)])
def test_a_shift_by_whole_pixels_is_a_roll_with_repeated_edges(shape, down, right):
    images = noise(3, shape)
    found = moved(images, (-down / 2, -right / 2, 0, 0, 0), shift=2)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    height, width = shape[1:]
    np.testing.assert_array_equal(found, padded[:, :, 2 - down : 2 - down + height, 2 - right : 2 - right + width])
    inside = (..., slice(2, -2), slice(2, -2))
    np.testing.assert_array_equal(found[inside], np.roll(images, (down, right), (2, 3))[inside])


@pytest.mark.parametrize("size", [7, 28])
@pytest.mark.parametrize(("share", "quarters"), [(0.5, -1), (-0.5, 1), (1, 2)])
def test_a_rotation_by_right_angles_is_numpys(size, share, quarters):
    images = noise(3, (3, size, size))
    found = moved(images, (0, 0, share, 0, 0), rotation=180)
    np.testing.assert_array_equal(found, np.rot90(images, quarters, (2, 3)))


def test_a_shift_by_half_a_pixel_averages_neighbours():
    images = noise(5, (1, 9, 9)).astype(int)
    found = moved(images.astype(np.uint8), (0, 0.5, 0, 0, 0), shift=1)
    np.testing.assert_array_equal(found[..., :-1], (images[..., :-1] + images[..., 1:] + 1) // 2)


def test_scaling_magnifies_each_axis_for_itself():
    bar = np.zeros((1, 1, 41, 41), np.uint8)
    bar[..., 10:31, 15:26] = 200
    taller = moved(bar, (0, 0, 0, 1, 0), scale=0.5)[0, 0] > 100
    assert (taller.any(axis=1).sum(), taller.any(axis=0).sum()) == (pytest.approx(1.5 * 21, abs=1), 11)
    thinner = moved(bar, (0, 0, 0, 0, -1), scale=0.5)[0, 0] > 100
    assert (thinner.any(axis=1).sum(), thinner.any(axis=0).sum()) == (21, pytest.approx(0.5 * 11, abs=1))


@pytest.mark.parametrize("pixels", [28, 64, 7])
@pytest.mark.parametrize("elastic", [0.5, 2.0])
def test_elastic_displacement_has_the_deviation_of_the_setting(pixels, elastic, monkeypatch):
    """And it is smooth: neighbouring pixels move alike."""
    seen = {}
    monkeypatch.setattr(module, "_sample", lambda images, y, x: seen.update(y=y, x=x))
    rows = 3000
    deform(
        np.zeros((rows, 1, pixels, pixels), np.uint8), np.arange(rows), np.ones(rows, np.int64), seed=1,
        settings=STILL.model_copy(update={"elastic": elastic}),
    )  # fmt: skip
    still = np.arange(pixels, dtype=np.float32)
    for moves in (seen["y"] - still[:, None], seen["x"] - still):
        assert moves.dtype == np.float32
        np.testing.assert_allclose(moves.std(axis=0), elastic, rtol=0.08)
        assert np.abs(moves.mean(axis=0)).max() < 5 * elastic / np.sqrt(rows)
        if pixels > 7:
            assert np.diff(moves, axis=1).std() < 0.25 * elastic
    both = np.corrcoef((seen["y"] - still[:, None])[:, 3, 3], (seen["x"] - still)[:, 3, 3])
    assert abs(both[0, 1]) < 5 / np.sqrt(rows)


@pytest.mark.parametrize("shape", [(28, 28), (11, 30)])
def test_all_channels_are_deformed_alike(shape):
    grey = noise(10, (1, *shape))
    colour = copies_of(np.repeat(grey, 3, axis=1))
    for channel in range(3):
        np.testing.assert_array_equal(colour[:, channel : channel + 1], copies_of(grey))


def test_default_copies_stay_close_to_their_originals():
    image = np.repeat(smooth(28, 28), 200, axis=0)
    copies = copies_of(image).astype(int)
    change = np.abs(copies - image).mean(axis=(1, 2, 3))
    assert change.min() > 1
    assert change.max() < 60
    assert copies.min() >= image.min()  # bilinear values never leave the range of the original
    assert copies.max() <= image.max()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (1, 1, 9), (3, 9, 1), (1, 2, 2)])
def test_tiny_images_are_deformed_too(shape):
    images = noise(6, shape)
    found = copies_of(images, settings=DeformSettings(shift=50, rotation=180, scale=0.9, elastic=20))
    assert found.shape == images.shape
    if shape[1:] == (1, 1):
        np.testing.assert_array_equal(found, images)


def test_extreme_settings_stay_inside_the_image():
    images = noise(50, (1, 12, 12)) // 2 + 60
    found = copies_of(images, settings=DeformSettings(shift=1e6, rotation=180, scale=0.999, elastic=1e4))
    assert found.min() >= 60
    assert found.max() <= images.max()


def test_no_rows_are_no_copies():
    assert copies_of(noise(0, (1, 12, 12))).shape == (0, 1, 12, 12)
