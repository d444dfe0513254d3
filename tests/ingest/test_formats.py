"""Formats of files that are decoded where the settings ask for them, and how damage in them is told."""

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, features
from small_images import COLOUR, file_of, made, noise, refused

from pipeline.config.dataset import IMAGE_EXTENSIONS, SourceSettings
from pipeline.data.codec import FORMATS, formats_of
from pipeline.ingest.images import ImageSpec

ALL = ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "GIF", "JPEG2000", "PPM", "TIFF")


@pytest.mark.parametrize(
    ("extensions", "formats"),
    [
        (IMAGE_EXTENSIONS, FORMATS),
        ((".jfif", ".png"), FORMATS),
        ((".gif", ".png"), (*FORMATS, "GIF")),
        ((".tif", ".tiff", ".pgm"), (*FORMATS, "PPM", "TIFF")),
        (("", ".png"), ALL),
        (("any",), ALL),
        ((".dat",), ALL),
    ],
)
def test_names_say_what_is_decoded(extensions, formats):
    assert formats_of(extensions) == formats


def test_extensions_are_written_in_any_way():
    extensions = SourceSettings(kind="folder", path="x", extensions=["PNG", ".Tif", "", "png", "any"]).extensions
    assert extensions == ("", ".png", ".tif", "any")
    assert SourceSettings(kind="idx", path="x", classes=["a"]).extensions == IMAGE_EXTENSIONS


@pytest.mark.parametrize("wrong", [".ome.tif", "a/b", ".", "tar.gz"])
def test_an_extension_that_no_name_ends_in_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"write what follows the last dot of a name, for example \.tif"):
        SourceSettings(kind="folder", path="x", extensions=["png", wrong])


def test_extensions_are_for_folders():
    with pytest.raises(ValueError, match="extensions is for kind: folder, this is kind: parquet"):
        SourceSettings(kind="parquet", path="x", extensions=["png", "gif"])
    with pytest.raises(ValueError, match="extensions"):
        SourceSettings(kind="folder", path="x", extensions=[])


def spec(name: str) -> ImageSpec:
    return ImageSpec(COLOUR, formats=formats_of([name]))


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [("TIFF", ".tif", {}), ("TIFF", ".tiff", {"compression": "tiff_lzw"}), ("TIFF", ".tif", {"compression": "jpeg"}),
     ("PPM", ".ppm", {}), ("GIF", ".gif", {}), ("JPEG2000", ".jp2", {"irreversible": False}),
     ("AVIF", ".avif", {"quality": 100})],
)  # fmt: skip
def test_more_formats_are_read_where_their_names_are_asked_for(kind, name, options):
    if {"JPEG2000": "jpg_2000", "AVIF": "avif"}.get(kind) and not features.check(
        {"JPEG2000": "jpg_2000", "AVIF": "avif"}[kind]
    ):
        pytest.skip(f"this Pillow has no {kind}")
    pixels = np.repeat(noise(12, 10, 1), 3, axis=2)  # grey values, so that the palette of a GIF has them all
    payload = file_of(Image.fromarray(pixels), kind, **options)
    assert refused(payload) == "undecodable"
    difference = np.abs(made(payload, formats=formats_of([name])) - pixels.transpose(2, 0, 1).astype(int))
    assert difference.mean() < (12 if options else 0.001)
    assert refused(payload[: len(payload) * 2 // 3], spec(name)) in ("truncated", "undecodable")


@pytest.mark.parametrize("name", [".gif", ".tif", ".ppm", ".jp2", ".avif", "any"])
def test_what_is_no_image_is_undecodable_in_every_format(name):
    for payload in (
        b"\0",
        b"GIF89a",
        b"II*\0",
        b"P6\n",
        b"not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):
        assert refused(payload, spec(name)) in ("undecodable", "truncated")


def tiff_of(width: int, height: int) -> bytes:
    """A grey TIFF that claims this size, written from its specification; its one strip has a kilobyte."""
    strip = zlib.compress(bytes(1024))
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, len(strip))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


# A logical screen, and a frame as large.
GIANT_GIF = (
    b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b",\0\0\0\0" + struct.pack("<HHB", 65535, 65535, 0) + b"\x02\0;"
)  # fmt: skip


@pytest.mark.parametrize("payload", [
    GIANT_GIF, tiff_of(60_000, 60_000), b"P6\n60000 60000\n255\n",
], ids=["gif of 4.3e9", "tiff of 3.6e9", "ppm of 3.6e9"])  # fmt: skip
def test_a_small_file_that_claims_a_giant_image_is_refused_by_its_header(payload):
    started = time.perf_counter()
    assert refused(payload, spec("any")) == "too_many_pixels"
    assert time.perf_counter() - started < 10


def test_of_an_animated_gif_the_first_frame_is_taken():
    frames = [Image.fromarray(np.repeat(noise(12, 10, 1, seed=seed), 3, axis=2)) for seed in range(3)]
    payload = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(made(payload, formats=formats_of([".gif"])), np.asarray(frames[0]).transpose(2, 0, 1))
