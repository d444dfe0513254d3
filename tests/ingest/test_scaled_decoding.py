"""JPEG files that are decoded at a fraction of their size, or not at all where they fit already."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from image_files import folder_settings, rows_of
from PIL import Image
from sklearn.datasets import load_sample_images
from small_images import COLOUR, GREY, file_of, made, noise, picture, refused

from pipeline.config.dataset import ImageSettings
from pipeline.data import load_manifest
from pipeline.data.manifest import Image as ListedImage
from pipeline.ingest import geometry
from pipeline.ingest.images import ImageSpec, from_file
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.listed_images import listed_image
from pipeline.ingest.sources import read_ahead

SCALED = {"decode": "scaled"}


@pytest.fixture(scope="module")
def photos():
    """Two photographs, 640 x 427."""
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def difference(payload, **spec):
    return np.abs(made(payload, **spec) - made(payload, **spec, **SCALED)).mean()


def decoded_size(payload, spec):
    """Width and height that are decoded."""
    image = Image.open(io.BytesIO(payload))
    geometry.ask_for_less(image, geometry.turn_of(image), spec)
    return image.size


@pytest.mark.parametrize("resize", ["crop", "letterbox"])
@pytest.mark.parametrize("shape", [(3, 48, 64), (3, 96, 96), (1, 100, 40)])
@pytest.mark.parametrize("quality", [75, 95])
def test_scaled_is_within_a_grey_level_of_exact(photos, shape, resize, quality):
    for photo in photos:
        payload = file_of(photo, "JPEG", quality=quality)
        assert decoded_size(payload, ImageSpec(shape, resize=resize, **SCALED)) != photo.size
        assert 0 < difference(payload, shape=shape, resize=resize) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["crop", "letterbox"])
def test_whichever_way_is_up_the_last_column_of_no_whole_block_moves_nothing(photos, orientation, resize):
    """An image whose size no scale divides would be stretched by up to a pixel, at the side where EXIF turns it to: the
    differences would be three to six times as large. The first photograph has much detail, and a margin of just 2.0.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    for photo, most in zip(photos, (1.4, 0.7), strict=True):
        for width, height in ((321, 425), (639, 397)):
            payload = file_of(photo.crop((0, 0, width, height)), "JPEG", quality=90, exif=exif)
            assert difference(payload, shape=(3, 48, 40), resize=resize) <= most


@pytest.mark.parametrize(("margin", "size"), [(1, (80, 54)), (1.5, (160, 107)), (2, (160, 107)), (2.14, (320, 214)),
                                              (4.3, (640, 427)), (16, (640, 427))])  # fmt: skip
def test_the_margin_is_kept(photos, margin, size):
    """The shorter side is 427 pixels, the target's 50: 8.5 times."""
    payload = file_of(photos[0], "JPEG")
    assert decoded_size(payload, ImageSpec((3, 50, 50), decode="scaled", decode_margin=margin)) == size


def test_a_side_that_is_only_just_large_enough_counts(photos):
    wide = file_of(photos[0].resize((640, 100)), "JPEG")
    assert decoded_size(wide, ImageSpec((3, 50, 50), **SCALED)) == (640, 100)
    assert decoded_size(wide, ImageSpec((3, 50, 50), resize="letterbox", **SCALED)) == (160, 25)


def test_what_is_small_or_no_jpeg_is_exact(photos):
    small = file_of(photos[0].resize((90, 80)), "JPEG")
    assert difference(small, shape=(3, 48, 48)) == 0
    assert difference(file_of(photos[0], "PNG"), shape=(3, 48, 48)) == 0
    assert difference(file_of(photos[0].convert("RGB"), "WEBP"), shape=(3, 48, 48)) == 0
    assert refused(file_of(photos[0], "JPEG"), ImageSpec((3, 8, 8), resize="none", **SCALED)) == "wrong_size"


def test_a_cut_file_is_set_aside_all_the_same(photos):
    payload = file_of(photos[0], "JPEG")
    assert refused(payload[: len(payload) // 2], ImageSpec((3, 8, 8), **SCALED)) == "truncated"


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_colours_are_scaled_too(photos, mode):
    payload = file_of(photos[1].convert(mode), "JPEG", quality=95)
    assert 0 < difference(payload, shape=(3, 48, 48)) <= 1


def two_pictures(first, second, **options):
    """A JPEG file with a second picture behind the first, as some phones write: to Pillow another format, MPO."""
    payload = file_of(first, "MPO", save_all=True, append_images=[second], quality=90, **options)
    assert Image.open(io.BytesIO(payload)).format == "MPO"
    return payload


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decode", ["exact", "scaled"])
def test_the_first_of_several_pictures_is_what_it_is_alone(photos, decode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    both = two_pictures(*photos, exif=exif)
    alone = file_of(photos[0], "JPEG", quality=90, exif=exif)
    for shape in ((3, 48, 40), (1, 40, 48)):
        np.testing.assert_array_equal(made(both, shape=shape, decode=decode), made(alone, shape=shape, decode=decode))
        assert difference(both, shape=shape) == difference(alone, shape=shape) > 0


def test_several_pictures_are_not_kept():
    both = two_pictures(Image.fromarray(noise(12, 10, 3)), Image.fromarray(noise(40, 40, 3)))
    stored = from_file(both, KEPT)
    assert Image.open(io.BytesIO(stored)).format == "JPEG"
    assert stored == from_file(both, ImageSpec(COLOUR, encoding="jpeg"))


KEPT = ImageSpec(COLOUR, encoding="jpeg", keep_jpeg=True)


def test_a_jpeg_that_fits_is_kept_as_it_is():
    payload = picture("JPEG", quality=40)
    assert from_file(payload, KEPT) == payload
    again = from_file(payload, ImageSpec(COLOUR, encoding="jpeg"))
    assert again != payload
    grey = file_of(Image.fromarray(noise(12, 10)), "JPEG")
    assert from_file(grey, ImageSpec(GREY, encoding="jpeg", keep_jpeg=True)) == grey


def test_what_does_not_fit_is_made():
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = picture("JPEG", exif=exif)
    for payload in (
        turned, picture("PNG"), picture("JPEG", height=24), file_of(Image.fromarray(noise(12, 10)), "JPEG"),
        file_of(Image.new("CMYK", (10, 12)), "JPEG"),
    ):  # fmt: skip
        stored = from_file(payload, KEPT)
        assert stored != payload
        image = Image.open(io.BytesIO(stored))
        assert (image.format, image.size, image.mode) == ("JPEG", (10, 12), "RGB")


def test_a_damaged_file_is_not_kept():
    payload = picture("JPEG")
    assert refused(payload[: len(payload) - 100], KEPT) == "truncated"


def test_a_manifest_says_how_images_were_made_and_nothing_where_that_is_as_it_was():
    before = {"encoding": "raw", "shape": [3, 12, 10]}
    assert json.loads(listed_image(ImageSpec(COLOUR)).model_dump_json()) == before
    scaled = listed_image(ImageSpec(COLOUR, encoding="jpeg", keep_jpeg=True, **SCALED))
    assert json.loads(scaled.model_dump_json()) == {
        "encoding": "jpeg", "shape": [3, 12, 10], "decode": "scaled", "decode_margin": 2.0, "keep_jpeg": True,
    }  # fmt: skip
    assert ListedImage.model_validate_json(scaled.model_dump_json()) == scaled


def test_keep_jpeg_needs_jpeg():
    with pytest.raises(ValueError, match="keep_jpeg is for encoding: jpeg, this is encoding: raw"):
        ImageSettings(keep_jpeg=True)


_LARGE = """
import resource, sys
from pathlib import Path
from pipeline.ingest.images import ImageSpec, from_file
payload = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stored = from_file(payload, ImageSpec((3, 64, 64), decode=sys.argv[2]))
print(len(stored), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("kind", "decode", "most_mb"), [("CMYK", "exact", 200), ("CMYK", "scaled", 40),
                                                         ("16-bit", "exact", 190)])  # fmt: skip
def test_an_image_of_20_megapixels_takes_bounded_memory(tmp_path, kind, decode, most_mb):
    """CMYK is 80 MB of pixels, and so is what becomes of it; 16-bit grey is 40 MB, then 20, then 80 in colour."""
    if kind == "CMYK":
        Image.new("CMYK", (5472, 3648), (0, 200, 100, 0)).save(tmp_path / "image", "JPEG")
    else:
        wide = np.broadcast_to(np.arange(5472, dtype=np.uint16) * 11, (3648, 5472))
        Image.fromarray(wide).save(tmp_path / "image", "PNG", compress_level=1)
    command = [sys.executable, "-c", _LARGE, str(tmp_path / "image"), decode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    size, grown = map(int, done.stdout.split())
    assert size == 3 * 64 * 64
    assert grown / 1024 < most_mb


@pytest.mark.spark
def test_a_dataset_of_photographs_scaled_and_kept(spark, photos, tmp_path):
    """What ingest stores is what `from_file` makes, whichever way it is decoded."""
    sizes = {"large": (640, 427), "fits": (48, 40), "wide": (333, 50)}
    payloads = {}
    for number in range(30):
        name, size = list(sizes.items())[number % 3]
        payloads[f"{name}{number}"] = file_of(photos[number % 2].rotate(number).resize(size), "JPEG", quality=90)
    for name, payload in payloads.items():
        path = tmp_path / "in" / ("cat", "dog")[len(name) % 2] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    image = {"shape": (3, 40, 48), "encoding": "jpeg", "decode": "scaled", "keep_jpeg": True}
    settings = folder_settings(tmp_path / "data", tmp_path / "in", image=image, row_group_rows=4)
    found, written = ingest_dataset(spark, settings, cache="unused")
    assert written
    assert (found.image.decode, found.image.decode_margin, found.image.keep_jpeg) == ("scaled", 2.0, True)
    assert load_manifest(settings.path) == found
    spec = ImageSpec(**image)
    stored = sorted(row["image"] for row in rows_of(tmp_path / "data").values())
    assert stored == sorted(from_file(payload, spec) for payload in payloads.values())
    assert sum(image in payloads.values() for image in stored) == 10
    assert ingest_dataset(spark, settings, cache="unused") == (found, False)


def test_files_are_read_ahead_and_no_further_than_is_said(tmp_path, monkeypatch):
    """The consumer waits after each row, so that the readers get as far as they may."""
    monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", 3_000)
    opened = []
    read = read_ahead._read_file

    def slow(path, *, is_local):
        opened.append(path)
        return read(path, is_local=is_local)

    monkeypatch.setattr(read_ahead, "_read_file", slow)
    items = []
    for number in range(40):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 1_000)
        problem = "too_many_bytes" if number == 20 else None
        items.append({"id": number, "path": f"{number}", "size": 1_000, "problem": problem})
    (tmp_path / "30").unlink()
    seen = []
    for item, payload, unreadable in read_ahead.read_ahead(items, str(tmp_path)):
        seen.append((item["id"], None if payload is None else payload[0], unreadable))
        time.sleep(0.01)
        assert len(opened) <= len(seen) + 3
    expected = [(number, None if number in (20, 30) else number, number == 30) for number in range(40)]
    assert seen == expected
