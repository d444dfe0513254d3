"""The pixels of JPEG files by simplejpeg, where they are those of Pillow, which takes a quarter longer.

Pillow reads every header, so that what it refuses is refused, and decodes all that is not plain: progressive, CMYK,
other subsamplings, and whatever libjpeg has any complaint about. Where simplejpeg is not installed, or has other pixels
than this Pillow, Pillow decodes everything. So pixels are Pillow's on every machine (docs/decisions/0032).
"""

from __future__ import annotations

import functools
import io
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

# Of a frame's header: marker, bytes, bits of a sample, height, width, channels.
_FRAME = struct.Struct(">HHBHHB")
# Side of the images that are decoded by both, once in a process: whole and cut blocks of each subsampling.
_SAMPLE_SIDE = 45


class Decoder(NamedTuple):
    """What decodes plain JPEG files.

    decode : simplejpeg's function; None where Pillow decodes everything
    detail : its name, or why there is none
    """

    decode: Callable[..., np.ndarray] | None
    detail: str


@functools.cache
def decoder() -> Decoder:
    """Find out once in a process what decodes plain JPEG files."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:  # not installed, or built for another numpy
        return Decoder(None, f"simplejpeg cannot be imported ({error})")
    if not all(_has_pixels_of_pillow(decode_jpeg, sampling) for sampling in (0, 1, 2, None)):
        return Decoder(None, "simplejpeg has other pixels than this Pillow, whose libjpeg is another one")
    return Decoder(decode_jpeg, "simplejpeg")


def decode_plain(image: Image, payload: bytes | memoryview, pixels: np.ndarray) -> bool:
    """Decode a JPEG file as Pillow would, where simplejpeg can.

    Parameters
    ----------
    image : the file as `codec.open_image` opens it, nothing decoded yet
    payload : its content
    pixels : uint8 (C, H, W), contiguous, of the image's size and mode; undefined where the result is False

    Returns
    -------
    Whether the pixels are there. If not, it is for Pillow to decode the file, or to say what is wrong with it.
    """
    decode = decoder().decode
    return decode is not None and _is_plain(image, payload) and _decoded(decode, payload, pixels)


def _is_plain(image: Image, payload: bytes | memoryview) -> bool:
    """Whether every version of libjpeg-turbo makes the same pixels of an opened file: no blocks of incomplete scans
    that are smoothed, no arithmetic or lossless coding that is left out of some, no rare subsampling."""
    from PIL import JpegImagePlugin

    if type(image) is not JpegImagePlugin.JpegImageFile or "progressive" in image.info:
        return False
    if len(image.layer) != image.layers:  # the header is damaged
        return False
    if image.layers != 1 and JpegImagePlugin.get_sampling(image) < 0:
        return False
    # The header of a baseline frame (SOF0), of which Pillow does not say whether it is there.
    return _FRAME.pack(0xFFC0, 8 + 3 * image.layers, 8, image.height, image.width, image.layers) in bytes(payload)


def _decoded(decode: Callable[..., np.ndarray], payload: bytes | memoryview, pixels: np.ndarray) -> bool:
    """Decode into ``pixels``, unless there is any error or warning."""
    channels, rows, columns = pixels.shape
    size = 4 * rows * columns
    # Some bytes more than are filled, for the views that begin at the second and third.
    buffer = pixels if channels == 1 else np.empty(size + channels - 1, np.uint8)
    try:
        decoded = decode(payload, "GRAY" if channels == 1 else "RGBX", buffer=buffer, strict=True)
    except (ValueError, RuntimeError):
        return False
    if decoded.shape[:2] != (rows, columns):
        return False
    if channels == 1:
        return True
    # Every fourth byte, as the lowest of 32 bits: numpy narrows those with vector instructions, in 12 us for 256 x 256.
    # Its copy of every third or fourth byte has none, and takes 55.
    for channel, plane in enumerate(pixels):
        plane[:] = buffer[channel : channel + size].view("<u4").reshape(rows, columns)
    return True


def _has_pixels_of_pillow(decode: Callable[..., np.ndarray], sampling: int | None) -> bool:
    """Whether both make the same of a sample: colours with Pillow's number of a subsampling, or None for grey."""
    from PIL import Image

    shape = (_SAMPLE_SIDE, _SAMPLE_SIDE) if sampling is None else (_SAMPLE_SIDE, _SAMPLE_SIDE, 3)
    values = np.arange(np.prod(shape), dtype=np.int64)
    sample = (values * values % 251 % 240).astype(np.uint8).reshape(shape)
    file = io.BytesIO()
    Image.fromarray(sample).save(file, "JPEG", quality=90, **({} if sampling is None else {"subsampling": sampling}))
    expected = np.atleast_3d(np.asarray(Image.open(file))).transpose(2, 0, 1)
    pixels = np.empty_like(expected, order="C")
    return _decoded(decode, file.getvalue(), pixels) and np.array_equal(pixels, expected)
