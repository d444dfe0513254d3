"""Images as shards store them -> pixels. No Spark import, no torch; Pillow only where images are encoded, pyarrow only
where rows of it are handled: a process that decodes is there in a third of a second.

A payload that cannot be decoded is never more than a `BadImageError` whose message is one of `reasons`.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data import jpeg, reasons

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

# What is decoded unless the settings ask for more: each further parser is one more that a damaged file can attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# What is decoded besides, where files with such names are to be read.
_MORE_FORMATS = {
    ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".pbm": "PPM", ".pgm": "PPM", ".pnm": "PPM", ".ppm": "PPM",
    ".jp2": "JPEG2000", ".avif": "AVIF",
}  # fmt: skip
_JPEG_NAMES = (".jpg", ".jpeg", ".jfif", ".jpe")


class BadImageError(ValueError):
    """An image cannot be used; the message is the reason, one of `reasons`."""


def decode_stored(payload: bytes, encoding: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode one image of a shard.

    Parameters
    ----------
    payload : value of the column ``image``
    encoding : ``raw``, ``png`` or ``jpeg``, as the manifest states it
    shape : (C, H, W)

    Returns
    -------
    uint8 (C, H, W); for ``raw`` a read-only view of the payload

    Raises
    ------
    BadImageError
        It is damaged, or of another shape.
    """
    if encoding == "raw":
        if len(payload) != math.prod(shape):
            raise BadImageError(reasons.WRONG_SIZE)
        return np.frombuffer(payload, np.uint8).reshape(shape)
    pixels = np.empty(shape, np.uint8)
    _decode_into(pixels, payload)
    return pixels


def decode_images(payloads: Sequence[bytes | memoryview], target: np.ndarray) -> tuple[int, str] | None:
    """Decode PNG or JPEG images of a shard into ``target``, uint8 (images, C, H, W), each of which may lie anywhere.

    Returns
    -------
    None, or the number of the first image that is damaged or of another shape, and the reason; those after it are not
    decoded.
    """
    for number, (payload, pixels) in enumerate(zip(payloads, target, strict=True)):
        try:
            _decode_into(pixels, payload)
        except BadImageError as error:
            return number, str(error)
    return None


def _decode_into(pixels: np.ndarray, payload: bytes | memoryview) -> None:
    """Decode an image of a shard into uint8 (C, H, W), contiguous, which is the shape that it must have."""
    channels, height, width = pixels.shape
    image = open_image(payload)
    if image.size != (width, height) or image.mode != mode_of((channels, height, width)):
        raise BadImageError(reasons.WRONG_SIZE)
    if not jpeg.decode_plain(image, payload, pixels):
        # Pillow takes channels apart in C; numpy's copy of every third byte takes twice as long.
        for plane, channel in zip(pixels, load_pixels(image).split(), strict=True):
            plane[:] = np.asarray(channel)


def as_rows(images: pa.Array, image_bytes: int) -> np.ndarray | None:
    """View a binary array whose values all have ``image_bytes`` bytes as uint8 (rows, image_bytes), without a copy.

    The result is None where a value is null or of another length.
    """
    import pyarrow as pa

    _, offset_buffer, data = images.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64 if pa.types.is_large_binary(images.type) else np.int32)
    offsets = offsets[images.offset : images.offset + len(images) + 1]
    if images.null_count or np.any(np.diff(offsets) != image_bytes):
        return None
    if data is None:
        return np.empty((0, image_bytes), dtype=np.uint8)
    return np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]].reshape(len(images), image_bytes)


def as_binary(rows: np.ndarray) -> pa.Array:
    """The reverse of `as_rows`: uint8 (rows, image_bytes) as a binary array, without a copy where it is contiguous."""
    import pyarrow as pa

    count, size = rows.shape
    offsets = np.arange(0, count * size + 1, size, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.BinaryArray.from_buffers(pa.binary(), count, buffers)


def formats_of(extensions: Collection[str]) -> tuple[str, ...]:
    """Pillow's names of the formats that are decoded where files with these extensions are read.

    Parameters
    ----------
    extensions : see the setting `dataset.source.extensions`; one that says nothing of the content, such as "" and "*",
        stands for every format
    """
    known = {f".{name.lower()}" for name in FORMATS} | {*_JPEG_NAMES, *_MORE_FORMATS}
    names = _MORE_FORMATS if set(extensions) - known else set(extensions) & _MORE_FORMATS.keys()
    return (*FORMATS, *sorted({_MORE_FORMATS[name] for name in names}))


@functools.cache
def _available(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those that this Pillow can decode."""
    from PIL import Image

    if formats != FORMATS:
        Image.init()  # otherwise Pillow loads what it needs by itself, and fewer plugins
        return tuple(name for name in formats if name in Image.OPEN)
    return formats


def open_image(payload: bytes | memoryview, formats: tuple[str, ...] = FORMATS) -> Image:
    """Open the content of an image file; only its header is read.

    Raises
    ------
    BadImageError
        It is of none of the formats, its header is damaged, or it states far too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(payload), formats=_available(formats))
    except Image.DecompressionBombError:
        raise BadImageError(reasons.TOO_MANY_PIXELS) from None
    except UnidentifiedImageError:
        raise BadImageError(reasons.UNDECODABLE) from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - what parsers raise on damaged headers is not limited to a few classes
        raise BadImageError(reasons.UNDECODABLE) from None


def load_pixels(image: Image) -> Image:
    """Decode the pixels of an opened image.

    Raises
    ------
    BadImageError
        They are cut or damaged.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as in open_image
        raise BadImageError(damage_of(error)) from None
    return image


def damage_of(error: Exception) -> str:
    """The reason that a decoder's error stands for: `reasons.TRUNCATED` or `reasons.UNDECODABLE`."""
    return (
        reasons.TRUNCATED if "truncated" in str(error).lower() or isinstance(error, EOFError) else reasons.UNDECODABLE
    )


def mode_of(shape: tuple[int, int, int]) -> str:
    """Pillow's mode of images of a shape (C, H, W): ``L`` for one channel, else ``RGB``."""
    return "L" if shape[0] == 1 else "RGB"


def pixels_of(image: Image) -> np.ndarray:
    """The pixels of a grey or RGB image: uint8 (C, H, W), contiguous."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
