import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, features
from small_images import COLOUR, file_of, made, noise, picture, refused

from pipeline.data.codec import BadImageError
from pipeline.ingest.images import ImageSpec


def png_of(width, height, depth=8, colour=2, data=b"") -> bytes:
    """A PNG written from its specification, whatever its header claims."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_missing_and_empty_payloads_have_their_reasons():
    assert refused(None) == "missing_image"
    assert refused(b"") == "empty"


@pytest.mark.parametrize(
    "payload", [b"\0", b"GIF", b"not an image at all", b"\xff\xd8\xff", b"BM", b"RIFF\0\0\0\0WEBP"]
)
def test_what_is_no_image_is_undecodable(payload):
    assert refused(payload) == "undecodable"


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("BMP", {}),
                                               ("WEBP", {}), ("WEBP", {"lossless": True})])  # fmt: skip
def test_a_truncated_file_is_set_aside_wherever_it_ends(kind, options):
    payload = picture(kind, 40, 30, **options)
    # The last bytes say that the file ends (PNG, JPEG), or only fill it up: all pixels come before them.
    for end in {*range(1, 60), *range(60, len(payload) - 12, 7), len(payload) - 12}:
        assert refused(payload[:end]) in ("truncated", "undecodable"), end


def test_most_of_a_cut_jpeg_or_bmp_is_called_truncated():
    for kind in ("JPEG", "BMP", "PNG"):
        payload = picture(kind, 40, 30)
        assert refused(payload[: len(payload) * 2 // 3]) == "truncated"


def test_a_flipped_byte_of_a_png_is_noticed_or_changes_nothing():
    payload = picture("PNG", 20, 20)
    whole = made(payload)
    kept = []
    for place in range(len(payload)):
        flipped = bytearray(payload)
        flipped[place] ^= 0x10
        try:
            np.testing.assert_array_equal(made(bytes(flipped)), whole)
            kept.append(place)
        except BadImageError:
            pass
    assert set(kept) <= {*range(len(payload) - 12, len(payload))}  # in the chunk that says that the file ends


def test_images_without_pixels_are_set_aside():
    assert refused(png_of(0, 5)) == "undecodable"
    assert refused(png_of(5, 0)) == "undecodable"
    assert (
        refused(struct.pack("<2sIIIIiiHHIIIIII", b"BM", 54, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0)) == "undecodable"
    )


def vp8x_of(width, height) -> bytes:
    """A WebP file that claims a canvas of this size; its one frame is small."""
    frame = file_of(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("payload", [
    png_of(60_000, 60_000, data=zlib.compress(bytes(1 << 20))),
    png_of(2**31 - 1, 2**31 - 1),
    png_of(10_000, 10_000, data=zlib.compress(bytes(1 << 20))),
    struct.pack("<2sIIIIiiHHIIIIII", b"BM", 54, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
    b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00\xff\xda\x00\x02",
], ids=["png of 3.6e9", "png of 4.6e18", "png of 1e8", "bmp of 2.5e9", "jpeg of 4e9"])  # fmt: skip
def test_a_small_file_that_claims_a_giant_image_is_refused_by_its_header(payload):
    start = time.perf_counter()
    assert refused(payload) == "too_many_pixels"
    assert time.perf_counter() - start < 10


def test_a_webp_that_claims_a_giant_canvas_is_refused():
    start = time.perf_counter()
    assert refused(vp8x_of(16_000, 16_000)) in ("too_many_pixels", "undecodable")
    assert time.perf_counter() - start < 10


def test_max_pixels_is_the_most_that_is_decoded():
    payload = picture("PNG", 12, 10)
    made(payload, max_pixels=120)
    assert refused(payload, ImageSpec(COLOUR, max_pixels=119)) == "too_many_pixels"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "DIB", "JPEG2000"])
def test_other_formats_are_refused(kind):
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    assert refused(file_of(Image.new("RGB", (10, 12)), kind)) == "undecodable"


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(noise(12, 10, 3, seed=seed)) for seed in range(3)]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        payload = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(payload)).n_frames == 3
        np.testing.assert_array_equal(made(payload), np.asarray(frames[0]).transpose(2, 0, 1))
    assert refused(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])) == "undecodable"
