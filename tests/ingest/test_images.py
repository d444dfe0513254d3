import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from small_images import COLOUR, GREY, file_of, made, noise, picture, pixels_of

from pipeline.data.codec import BadImageError
from pipeline.ingest import images
from pipeline.ingest.images import ImageSpec, from_file, from_pixels, from_spark_image


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_pixels_of_lossless_files_stay_as_they_are(kind):
    pixels = noise(12, 10, 3)
    payload = file_of(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(made(payload), pixels.transpose(2, 0, 1))


def test_a_jpeg_comes_as_pillow_decodes_it():
    payload = picture("JPEG", quality=80)
    np.testing.assert_array_equal(made(payload), np.asarray(Image.open(io.BytesIO(payload))).transpose(2, 0, 1))


def test_colour_becomes_grey_and_grey_becomes_colour():
    colour, grey = noise(12, 10, 3), noise(12, 10)
    luma = colour.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601-2
    found = made(file_of(Image.fromarray(colour), "PNG"), shape=GREY)
    assert np.abs(found[0] - luma).max() <= 1
    np.testing.assert_array_equal(made(file_of(Image.fromarray(grey), "PNG")), np.stack([grey] * 3))
    np.testing.assert_array_equal(made(file_of(Image.fromarray(grey), "BMP"), shape=GREY)[0], grey)


def test_black_and_white_becomes_0_and_255():
    dots = noise(12, 10) > 127
    payload = file_of(Image.fromarray(dots), "PNG")
    assert Image.open(io.BytesIO(payload)).mode == "1"
    np.testing.assert_array_equal(made(payload, shape=GREY)[0], dots * 255)
    np.testing.assert_array_equal(made(file_of(Image.fromarray(dots), "BMP"), shape=GREY)[0], dots * 255)


def test_a_palette_is_looked_up():
    pixels = noise(12, 10, 3) // 128 * 255  # eight colours
    payload = file_of(Image.fromarray(pixels).quantize(8), "PNG")
    assert Image.open(io.BytesIO(payload)).mode == "P"
    np.testing.assert_array_equal(made(payload), pixels.transpose(2, 0, 1))


def test_16_bit_grey_is_scaled_to_8():
    wide = np.random.default_rng(0).integers(0, 65536, (12, 10)).astype(np.uint16)
    wide[0, :2] = [0, 65535]
    payload = file_of(Image.fromarray(wide), "PNG")
    assert Image.open(io.BytesIO(payload)).mode == "I;16"
    np.testing.assert_array_equal(made(payload, shape=GREY)[0], np.rint(wide / 257))


@pytest.mark.parametrize("most", [65535, 4095])
def test_16_bit_pgm_is_scaled_to_8(most):
    """Two bytes a pixel, the high one first, from 0 to what the header says."""
    wide = np.random.default_rng(0).integers(0, most + 1, (12, 10))
    wide[0, :2] = [0, most]
    payload = b"P5\n10 12\n%d\n" % most + wide.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(payload)).mode == "I"
    found = made(payload, shape=GREY, formats=("PPM",))[0]
    assert np.abs(found - wide / most * 255).max() < 0.51


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_a_transparent_value_of_16_bits_is_that_value_alone(shape):
    """Its neighbours are the same in 8 bits."""
    wide = np.repeat(np.array([30_000, 30_001, 257], np.uint16), 40).reshape(12, 10)
    found = made(file_of(Image.fromarray(wide), "PNG", transparency=30_000), shape=shape, background=77)
    expected = np.where(wide == 30_000, 77, np.rint(wide / 257))
    np.testing.assert_array_equal(found, np.broadcast_to(expected, shape))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_stated_range_are_refused(mode):
    with pytest.raises(BadImageError, match="unsupported_pixels"):
        images._as_mode(Image.new(mode, (10, 12)), "L", 255)


def test_a_cmyk_jpeg_is_converted():
    image = Image.new("CMYK", (10, 12), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red, green, blue = made(file_of(image, "JPEG", quality=95))
    assert red.min() > 240
    assert max(green.max(), blue.max()) < 15


def over(colour, alpha, background) -> np.ndarray:
    """What is seen of ``colour`` (..., C) with ``alpha`` (...) in front of a grey."""
    share = alpha[..., None] / 255
    return colour * share + background * (1 - share)


@pytest.mark.parametrize("background", [0, 100, 255])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_background_shows_through_transparency(kind, background):
    pixels = noise(12, 10, 4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = made(file_of(Image.fromarray(pixels), kind, **options), background=background)
    expected = over(pixels[..., :3].astype(float), pixels[..., 3], background).transpose(2, 0, 1)
    assert np.abs(found - expected).max() <= 1


def test_the_background_shows_through_grey_with_alpha():
    pixels = noise(12, 10, 2)
    payload = file_of(Image.fromarray(pixels, "LA"), "PNG")
    expected = over(pixels[..., :1].astype(float), pixels[..., 1], 200)[..., 0]
    assert np.abs(made(payload, shape=GREY, background=200)[0] - expected).max() <= 1


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_the_background_shows_through_a_transparent_colour(mode, shape):
    """PNG may name one colour that is transparent instead of storing alpha."""
    key = {"1": 0, "L": 0, "P": 0, "RGB": (0, 0, 0)}[mode]
    image = Image.new(mode, (10, 12), {"1": 1, "L": 255, "P": 1, "RGB": (255, 255, 255)}[mode])
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255])
    image.paste(key, (0, 0, 5, 12))
    found = made(file_of(image, "PNG", transparency=key), shape=shape, background=77)
    assert (found[:, :, :5] == 77).all()
    assert (found[:, :, 5:] == 255).all()


def test_a_palette_with_alpha_is_looked_up():
    image = Image.new("P", (10, 12), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    found = made(file_of(image, "PNG", transparency=bytes([255, 51])), background=0)
    np.testing.assert_allclose(found[:, 3, 3], [40, 20, 10], atol=1)


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB"])
def test_texts_in_a_file_change_nothing(mode, encoding):
    """Pillow keeps them beside what it knows of the pixels: a text may have the name of that, and is written along."""
    image = Image.fromarray(noise(12, 10, 3)).convert(mode)
    texts = PngImagePlugin.PngInfo()
    for name in ("transparency", "icc_profile", "comment"):
        texts.add_text(name, "of another kind " * 5_000)
    spec = ImageSpec(COLOUR, encoding=encoding)
    plain, labelled = file_of(image, "PNG"), file_of(image, "PNG", pnginfo=texts)
    assert from_file(labelled, spec) == from_file(plain, spec)


def test_a_profile_and_a_comment_are_not_stored():
    for options in ({"icc_profile": b"x" * 50_000}, {"comment": b"of yesterday"}):
        for encoding in ("png", "jpeg"):
            spec = ImageSpec(COLOUR, encoding=encoding)
            assert from_file(picture("JPEG", **options), spec) == from_file(picture("JPEG"), spec)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    """EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored pixels belong."""
    upright = noise(12, 10, 3)
    flip = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
            8: lambda a: np.rot90(a, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = file_of(Image.fromarray(np.ascontiguousarray(flip(upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(made(payload), upright.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_changes_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(noise(12, 10, 3))
    np.testing.assert_array_equal(made(file_of(image, "PNG", exif=exif)), made(file_of(image, "PNG")))


def test_damaged_exif_data_does_not_cost_the_image():
    image = Image.fromarray(noise(12, 10, 3))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0" + bytes(range(200)), b"nothing"):
        payload = file_of(image, "JPEG", exif=exif)
        np.testing.assert_array_equal(made(payload), made(file_of(image, "JPEG")))


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_png_keeps_and_jpeg_nearly_keeps_pixels(shape):
    smooth = np.add.outer(np.arange(shape[1]) * 9, np.arange(shape[2]) * 8)
    pixels = np.stack([smooth + 20 * channel for channel in range(shape[0])]).astype(np.uint8)
    payload = file_of(Image.fromarray(pixels[0] if shape[0] == 1 else pixels.transpose(1, 2, 0).copy()), "PNG")
    np.testing.assert_array_equal(made(payload, shape=shape, encoding="raw"), pixels)
    np.testing.assert_array_equal(made(payload, shape=shape, encoding="png"), pixels)
    found = made(payload, shape=shape, encoding="jpeg", jpeg_quality=95)
    assert 0 < np.abs(found - pixels).max() <= 8


def spark_image(pixels, mode, changes=None) -> dict:
    height, width = pixels.shape[:2]
    return {"height": height, "width": width, "mode": mode, "data": pixels.tobytes()} | (changes or {})


def test_sparks_image_struct_holds_bgr_pixels():
    spec = ImageSpec(COLOUR)
    blue_green_red = noise(12, 10, 3)
    found = pixels_of(from_spark_image(spark_image(blue_green_red, 16), spec), spec)
    np.testing.assert_array_equal(found, blue_green_red[:, :, ::-1].transpose(2, 0, 1))
    grey = noise(12, 10)
    np.testing.assert_array_equal(pixels_of(from_spark_image(spark_image(grey, 0), spec), spec), [grey] * 3)


def test_sparks_image_struct_may_have_alpha():
    pixels = noise(12, 10, 4)
    spec = ImageSpec(COLOUR, background=30)
    found = pixels_of(from_spark_image(spark_image(pixels, 24), spec), spec).astype(int)
    expected = over(pixels[..., 2::-1].astype(float), pixels[..., 3], 30).transpose(2, 0, 1)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(("changes", "reason"), [
    ({"data": None}, "missing_image"), ({"mode": -1}, "undecodable"), ({"mode": 21}, "unsupported_pixels"),
    ({"mode": None}, "unsupported_pixels"), ({"data": b"abc"}, "truncated"), ({"mode": 24}, "truncated"),
    ({"height": 0, "data": b""}, "zero_sized"), ({"width": None}, "zero_sized"), ({"height": -1}, "zero_sized"),
    ({"height": 100_000, "width": 100_000}, "too_many_pixels"),
])  # fmt: skip
def test_bad_image_structs_have_their_reasons(changes, reason):
    with pytest.raises(BadImageError, match=f"^{reason}$"):
        from_spark_image(spark_image(noise(12, 10, 3), 16, changes), ImageSpec(COLOUR))


def test_a_missing_image_struct_has_its_reason():
    with pytest.raises(BadImageError, match="missing_image"):
        from_spark_image(None, ImageSpec(COLOUR))


def test_pixels_become_images():
    pixels = noise(*COLOUR)
    assert from_pixels(pixels, ImageSpec(COLOUR)) == pixels.tobytes()
    png = ImageSpec(COLOUR, encoding="png")
    np.testing.assert_array_equal(pixels_of(from_pixels(pixels, png), png), pixels)
    wide = ImageSpec((1, 12, 4))
    grey = noise(*GREY)
    np.testing.assert_array_equal(pixels_of(from_pixels(grey, wide), wide), grey[:, :, 3:7])


def test_pixels_of_other_channels_stay_raw_or_are_refused():
    pixels = noise(5, 12, 10)
    assert from_pixels(pixels, ImageSpec((5, 12, 10))) == pixels.tobytes()
    with pytest.raises(BadImageError, match="unsupported_pixels"):
        from_pixels(pixels, ImageSpec(COLOUR))
