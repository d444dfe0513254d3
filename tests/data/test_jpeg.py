"""simplejpeg decodes a JPEG file to the bits of Pillow, or Pillow does: whole files, odd ones, and damaged ones."""

import base64
import functools
import io
import os
import sys
from contextlib import closing

import numpy as np
import pytest
import simplejpeg
from photographs import BACKGROUNDS, PACKAGE
from PIL import Image, features
from sklearn.datasets import load_sample_images
from small_images import file_of

from pipeline.data import jpeg, reasons
from pipeline.data.codec import BadImageError, decode_stored, load_pixels, mode_of, open_image, pixels_of
from pipeline.data.decoders import Decoders

pytestmark = pytest.mark.skipif(
    not features.check_feature("libjpeg_turbo"), reason="this Pillow has another libjpeg, so that it decodes everything"
)
# 11 x 9 pixels with arithmetic coding, which Pillow reads and does not write; by libjpeg-turbo's jpegtran.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQ"
    "YEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAJAA"
    "sDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDL1yYrVWOHkkCfMtR6Q9v0AvOU/hT2BNccFfbvR22/bt9ujiW26HyIJbOgT0cG28VU"
    "36FjG1EjDZpjtndkcLL2ecGutjuHTEraAtICIfD6Tk4rmfYRjrdSUubJ0YuC/9k="
)


def parts(seed):
    """Parts of scikit-learn's photographs: (height, width) -> an RGB image, of another place each time."""
    random, photographs = np.random.default_rng(seed), load_sample_images().images

    def part(height, width):
        photograph = photographs[random.integers(len(photographs))]
        y, x = random.integers(0, 427 - height + 1), random.integers(0, 640 - width + 1)
        return Image.fromarray(photograph[y : y + height, x : x + width])

    return part


def by_pillow(payload, shape):
    """Pixels (C, H, W), or the reason why there are none, by Pillow alone."""
    try:
        image = open_image(payload)
        if image.size != (shape[2], shape[1]) or image.mode != mode_of(shape):
            return reasons.WRONG_SIZE
        return pixels_of(load_pixels(image))
    except BadImageError as error:
        return str(error)


def by_reader(payload, shape):
    try:
        return decode_stored(payload, "jpeg", shape)
    except BadImageError as error:
        return str(error)


def shape_of(image):
    return (len(image.getbands()), image.height, image.width)


def check(payload, shape):
    """Both agree; the result is what they say."""
    expected, found = by_pillow(payload, shape), by_reader(payload, shape)
    np.testing.assert_array_equal(found, expected)
    return expected


def check_plain(image, **options):
    """simplejpeg itself makes Pillow's pixels of an image that is saved so."""
    check_plain_file(file_of(image, "JPEG", **options))


def check_plain_file(payload):
    pixels = np.full(shape_of(Image.open(io.BytesIO(payload))), 7, np.uint8)
    assert jpeg.decode_plain(open_image(payload), payload, pixels)
    np.testing.assert_array_equal(pixels, by_pillow(payload, pixels.shape))


def is_plain(payload):
    image = open_image(payload)
    return jpeg.decode_plain(image, payload, np.empty(shape_of(image), np.uint8))


@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_every_quality_and_usual_subsampling(sampling):
    part = parts(sampling)
    for quality in range(1, 101):
        check_plain(part(61, 83), quality=quality, subsampling=sampling)
        check_plain(part(40, 31).convert("L"), quality=quality)


def test_every_size_up_to_70_pixels():
    part = parts(3)
    for height in range(1, 71):
        for width in range(1, 71):
            check_plain(part(height, width), quality=1 + (7 * height + width) % 100, subsampling=(height + width) % 3)


@pytest.mark.parametrize(
    "options",
    [
        {"optimize": True}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 5}, {"restart_marker_rows": 1},
        {"icc_profile": bytes(range(256)) * 600}, {"comment": b"\xff\xd9" * 30_000}, {"dpi": (300, 300)},
        {"keep_rgb": True, "subsampling": 0}, {"smooth": 50}, {"qtables": [[1] * 64, [255] * 64]},
    ],
    ids=str,
)  # fmt: skip
def test_forms_that_are_plain(options):
    part = parts(4)
    for size in ((1, 1), (17, 40), (64, 64), (427, 640)):
        check_plain(part(*size), **options)


def test_what_cameras_write_beside_the_pixels():
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "a camera", 0x011A: 72.0, 0x011B: 72.0, 0x0128: 2})
    check_plain(parts(5)(40, 50), exif=exif, quality=93)


def test_other_names_of_components_and_marks_of_adobe():
    """From which libjpeg guesses whether colours are YCbCr or RGB."""
    part = parts(6)
    for size in ((9, 20), (33, 16)):
        stored = bytearray(file_of(part(*size), "JPEG", subsampling=0))
        frame, scan = stored.index(b"\xff\xc0"), stored.index(b"\xff\xda")
        for names in (b"RGB", b"\0\1\2", b"rgb", b"\1\x22\x23"):
            for number, name in enumerate(names):
                stored[frame + 10 + 3 * number] = stored[scan + 5 + 2 * number] = name
            check_plain_file(bytes(stored))
            bare = bytes(stored[:2] + stored[20:])
            check_plain_file(bare)
            for transform in range(3):
                marked = bare[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + bare[2:]
                assert is_plain(marked) == (transform < 2)  # libjpeg warns of 2, which is for four colours
                assert isinstance(check(marked, (3, *size)), np.ndarray)


def test_what_is_not_plain_is_left_to_pillow():
    part = parts(7)
    image = part(40, 50)
    pixels = np.ascontiguousarray(np.asarray(image))
    others = [
        file_of(image, "JPEG", progressive=True), file_of(image.convert("L"), "JPEG", progressive=True),
        simplejpeg.encode_jpeg(pixels, colorsubsampling="440"), simplejpeg.encode_jpeg(pixels, colorsubsampling="411"),
        file_of(image, "MPO", save_all=True, append_images=[part(40, 50)]), file_of(image, "PNG"),
        file_of(image, "JPEG").replace(b"\xff\xc0", b"\xff\xc1"), ARITHMETIC,
    ]  # fmt: skip
    for payload in others:
        assert not is_plain(payload)
        opened = open_image(payload)
        assert isinstance(check(payload, shape_of(opened)), np.ndarray)
    cmyk = file_of(image.convert("CMYK"), "JPEG")
    assert check(cmyk, (3, 40, 50)) == reasons.WRONG_SIZE
    assert not jpeg.decode_plain(open_image(cmyk), cmyk, np.empty((4, 40, 50), np.uint8))


def test_bytes_before_and_after_a_file():
    image = parts(8)(20, 30)
    stored = file_of(image, "JPEG")
    for payload in (stored + b"more" * 40_000, stored + stored, stored[:-2] + b"\xff\xff\xff\xd9"):
        assert isinstance(check(payload, shape_of(image)), np.ndarray)
    assert check(stored[:-2], shape_of(image)) == reasons.TRUNCATED
    assert check(b"\0" + stored, shape_of(image)) == reasons.UNDECODABLE


FORMS = [
    {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"subsampling": 2, "restart_marker_blocks": 2},
    {"progressive": True}, {"grey": True}, {"grey": True, "restart_marker_rows": 1},
]  # fmt: skip


def saved(part, height, width, *, grey=False, quality=85, **options):
    image = part(height, width)
    image = image.convert("L") if grey else image
    return file_of(image, "JPEG", quality=quality, **options), shape_of(image)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_file_that_is_cut_anywhere(form):
    payload, shape = saved(parts(9), 37, 45, **form)
    seen = {kind for end in range(len(payload)) if isinstance(kind := check(payload[:end], shape), str)}
    assert seen == {reasons.UNDECODABLE, reasons.TRUNCATED}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_flipped_bits(form):
    """Each bit of the header, and some everywhere; libjpeg warns of many and goes on, as Pillow does."""
    payload, shape = saved(parts(10), 30, 40, **form)
    random = np.random.default_rng(0)
    header = payload.index(b"\xff\xda") + 14
    bits = [*range(8 * header), *random.integers(8 * header, 8 * len(payload), 3000)]
    kept = 0
    for bit in bits:
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        kept += not isinstance(check(bytes(damaged), shape), str)
    assert 0 < kept < len(bits)


def segments(payload):
    """The parts of a file: marker by marker, then what is compressed, then its end."""
    found, place = [payload[:2]], 2
    while found[-1][:2] != b"\xff\xda":
        length = 2 + int.from_bytes(payload[place + 2 : place + 4], "big")
        found.append(payload[place : place + length])
        place += length
    return [*found, payload[place:-2], payload[-2:]]


BODIES = (
    b"", b"JFIF", b"JFIF\0\1\1", b"Adobe", b"Adobe\0\x64\0\0\0\0\1", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"MPF\0",
    b"ICC_PROFILE\0", b"ICC_PROFILE\0\1\1", b"Photoshop 3.0\08BIM", b"http://ns.adobe.com/xap/1.0/\0",
)  # fmt: skip
MARKERS = bytes(range(0xC0, 0x100)) + b"\0\1\2"


def disorder(parts_of_file, random):
    """Doubled, dropped, swapped, foreign or changed segments: what one decoder reads over may end another."""
    place, other = random.integers(1, len(parts_of_file), 2).tolist()
    foreign = bytes([255, MARKERS[random.integers(len(MARKERS))]])
    body = BODIES[random.integers(len(BODIES))]
    changed = bytearray(parts_of_file[place])
    if changed:
        changed[random.integers(len(changed))] = random.integers(256)
    changes = (
        lambda: parts_of_file.insert(place, parts_of_file[other]),
        lambda: parts_of_file.pop(place),
        lambda: parts_of_file.insert(place, foreign),
        lambda: parts_of_file.insert(place, foreign + (2 + len(body)).to_bytes(2, "big") + body),
        lambda: parts_of_file.insert(place, random.bytes(3)),
        lambda: parts_of_file.__setitem__(place, bytes(changed)),
    )
    changes[random.integers(len(changes))]()


@pytest.mark.parametrize("seed", range(4))
def test_segments_in_disorder(seed):
    random, part = np.random.default_rng(seed), parts(seed)
    kept = 0
    for number in range(3000):
        payload, shape = saved(part, *random.integers(1, 40, 2), **FORMS[number % len(FORMS)])
        found = segments(payload)
        for _ in range(random.integers(1, 3)):
            disorder(found, random)
        kept += not isinstance(check(b"".join(found), shape), str)
    assert 300 < kept < 2900


def test_damage_of_files_that_pillow_reads_in_several_blocks():
    """It hands 64 KiB to libjpeg at a time."""
    random = np.random.default_rng(1)
    for options in ({}, {"restart_marker_rows": 1}):
        payload, shape = saved(parts(11), 400, 600, subsampling=0, quality=97, comment=b"x" * 65_000, **options)
        assert len(payload) > 2 * 65536 + 65_000
        check_plain_file(payload)
        for _ in range(60):
            damaged = bytearray(payload)
            damaged[random.integers(len(payload))] ^= 1 << random.integers(8)
            check(bytes(damaged), shape)
            check(payload[: random.integers(len(payload))], shape)


@pytest.mark.skipif(not BACKGROUNDS.exists(), reason=f"photographs of Debian's package {PACKAGE} are not there")
def test_photographs_of_a_desktop():
    plain = 0
    for path in sorted(BACKGROUNDS.rglob("*.jpg")):
        payload = path.read_bytes()
        assert isinstance(check(payload, shape_of(Image.open(path))), np.ndarray)
        plain += is_plain(payload)
    assert plain >= 8


def test_pixels_without_simplejpeg_are_the_same(monkeypatch):
    payload, shape = saved(parts(12), 40, 50)
    with_it = decode_stored(payload, "jpeg", shape)
    assert jpeg.decoder().detail == "simplejpeg"
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setattr(jpeg, "decoder", functools.cache(jpeg.decoder.__wrapped__))
    np.testing.assert_array_equal(decode_stored(payload, "jpeg", shape), with_it)
    assert jpeg.decoder().decode is None
    assert jpeg.decoder().detail.startswith("simplejpeg cannot be imported")
    assert not is_plain(payload)


@pytest.mark.parametrize("option", ["fastdct", "fastupsample"])
def test_a_libjpeg_with_other_pixels_is_not_used(option, monkeypatch):
    """Its own quick ways stand for another libjpeg: they differ by a grey level here and there."""
    other = functools.partial(simplejpeg.decode_jpeg, **{option: True})
    monkeypatch.setattr(simplejpeg, "decode_jpeg", other)
    monkeypatch.setattr(jpeg, "decoder", functools.cache(jpeg.decoder.__wrapped__))
    assert jpeg.decoder() == (None, "simplejpeg has other pixels than this Pillow, whose libjpeg is another one")
    payload, shape = saved(parts(13), 40, 50)
    np.testing.assert_array_equal(decode_stored(payload, "jpeg", shape), by_pillow(payload, shape))


@pytest.mark.parametrize("there", [True, False])
def test_processes_decode_with_it_and_without(there, tmp_path, monkeypatch):
    if not there:
        (tmp_path / "simplejpeg.py").write_text("raise ImportError('not on this executor')")
        monkeypatch.syspath_prepend(os.fspath(tmp_path))
    files = [saved(parts(number), 40, 50) for number in range(20)]
    with closing(Decoders(files[0][1], count=2, most_images=20, processes=True)) as made:
        images = made.start([payload for payload, _ in files]).result(lambda *_: ValueError())
    for image, (payload, shape) in zip(images, files, strict=True):
        np.testing.assert_array_equal(image, by_pillow(payload, shape))
