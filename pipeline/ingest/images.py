"""Image payloads -> checked images of one shape, and stored images -> pixels. No Spark import, no torch.

A payload that cannot be used is never more than a `BadImageError` with a reason; `ingest` sets its row aside.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from PIL.Image import Image

# Reasons to set a row aside.
MISSING_IMAGE = "missing_image"
UNREADABLE = "unreadable_file"
EMPTY = "empty"
TRUNCATED = "truncated"
UNDECODABLE = "undecodable"
ZERO_SIZED = "zero_sized"
TOO_MANY_PIXELS = "too_many_pixels"
UNSUPPORTED_PIXELS = "unsupported_pixels"
WRONG_SIZE = "wrong_size"
MISSING_LABEL = "missing_label"
UNKNOWN_LABEL = "unknown_label"
MISSING_SPLIT = "unknown_split"
DUPLICATE = "duplicate"

# What is decoded at all: each further parser is one more that a damaged file can attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Spark's image source says how pixels are stored by OpenCV's type number: 8-bit unsigned, 1, 3 (BGR) or 4 (BGRA).
_SPARK_UNDECODABLE = -1
_OPENCV_CHANNELS = {0: 1, 16: 3, 24: 4}
# EXIF's tag for which way is up, 1 to 8.
_ORIENTATION = 0x0112


class BadImageError(ValueError):
    """An image cannot be used; the message is one of the reasons above."""


@dataclass(frozen=True)
class ImageSpec:
    """What every image becomes.

    shape : (C, H, W); C is 1 or 3 (any number for images that are stored raw in this very shape)
    resize : none, crop or letterbox
    background : grey value, 0 to 255
    max_pixels : an image of more is refused by its header
    encoding : raw, png or jpeg
    """

    shape: tuple[int, int, int]
    resize: str = "crop"
    background: int = 255
    max_pixels: int = 50_000_000
    encoding: str = "raw"
    jpeg_quality: int = 92

    @property
    def raw_bytes(self) -> int:
        return int(np.prod(self.shape))


def from_file(payload: bytes | None, spec: ImageSpec) -> bytes:
    """The content of a JPEG, PNG, WebP or BMP file -> a stored image of ``spec``.

    Raises
    ------
    BadImageError
        It cannot be decoded, or not made into this shape.
    """
    if payload is None:
        raise BadImageError(MISSING_IMAGE)
    if not payload:
        raise BadImageError(EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is refused, or does not matter
        return _finish(_decode(payload, spec), spec)


def from_spark_image(value: dict[str, Any] | None, spec: ImageSpec) -> bytes:
    """The struct of Spark's image source (height, width, mode, data: rows of BGR pixels) -> a stored image."""
    from PIL import Image

    if value is None or value["data"] is None:
        raise BadImageError(MISSING_IMAGE)
    if value["mode"] == _SPARK_UNDECODABLE:
        raise BadImageError(UNDECODABLE)
    height, width, channels = value["height"] or 0, value["width"] or 0, _OPENCV_CHANNELS.get(value["mode"])
    if channels is None:
        raise BadImageError(UNSUPPORTED_PIXELS)
    _check_size(width, height, spec)
    if len(value["data"]) != height * width * channels:
        raise BadImageError(TRUNCATED)
    pixels = np.frombuffer(value["data"], np.uint8).reshape(height, width, channels)
    if channels == 1:
        return _finish(Image.fromarray(pixels[:, :, 0]), spec)
    order = [2, 1, 0, 3][:channels]
    return _finish(Image.fromarray(np.ascontiguousarray(pixels[:, :, order])), spec)


def from_pixels(pixels: np.ndarray, spec: ImageSpec) -> bytes:
    """uint8 C x H x W -> a stored image of ``spec``; pixels of that shape already are kept as they are."""
    from PIL import Image

    if pixels.shape == spec.shape and spec.encoding == "raw":
        return pixels.tobytes()
    if pixels.shape[0] not in (1, 3):
        raise BadImageError(UNSUPPORTED_PIXELS)
    image = Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _finish(image, spec)


def decode_stored(payload: bytes, encoding: str, shape: tuple[int, int, int]) -> np.ndarray:
    """A stored image as uint8 C x H x W.

    Raises
    ------
    BadImageError
        It is damaged, or of another shape.
    """
    if encoding == "raw":
        if len(payload) != int(np.prod(shape)):
            raise BadImageError(WRONG_SIZE)
        return np.frombuffer(payload, np.uint8).reshape(shape)
    image = _open(payload)
    if image.size != (shape[2], shape[1]) or image.mode != _mode_of(shape):
        raise BadImageError(WRONG_SIZE)
    return _as_chw(_load(image))


def as_rows(images: pa.Array, image_bytes: int) -> np.ndarray | None:
    """A binary array whose values all have ``image_bytes`` bytes as uint8 (rows, image_bytes), without a copy.

    None where a value is null or of another length.
    """
    _, offset_buffer, data = images.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64 if pa.types.is_large_binary(images.type) else np.int32)
    offsets = offsets[images.offset : images.offset + len(images) + 1]
    if images.null_count or np.any(np.diff(offsets) != image_bytes):
        return None
    if data is None:
        return np.empty((0, image_bytes), dtype=np.uint8)
    return np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]].reshape(len(images), image_bytes)


def as_binary(rows: np.ndarray) -> pa.Array:
    """uint8 (rows, image_bytes) as a binary array, without a copy where it is contiguous."""
    count, size = rows.shape
    offsets = np.arange(0, count * size + 1, size, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.BinaryArray.from_buffers(pa.binary(), count, buffers)


def channel_sums(pixels: np.ndarray) -> np.ndarray:
    """Per channel the sum of values and of their squares: uint8 (rows, C, H, W) -> int64 (2, C), exact."""
    values = np.arange(256, dtype=np.int64)
    counts = [np.bincount(pixels[:, c].ravel(), minlength=256) for c in range(pixels.shape[1])]
    return np.array([[count @ values for count in counts], [count @ values**2 for count in counts]])


def _decode(payload: bytes, spec: ImageSpec) -> Image:
    """Decoded, upright pixels."""
    image = _open(payload)
    _check_size(*image.size, spec)
    if image.format == "PNG":
        _check_png(payload)
    return _upright(_load(image))


def _open(payload: bytes) -> Image:
    """Read the header only."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(payload), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImageError(TOO_MANY_PIXELS) from None
    except UnidentifiedImageError:
        raise BadImageError(UNDECODABLE) from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - what parsers raise on damaged headers is not limited to a few classes
        raise BadImageError(UNDECODABLE) from None


def _check_png(payload: bytes) -> None:
    """PNG has a checksum of every chunk, and decoding does not look at those of the pixels."""
    image = _open(payload)
    try:
        image.verify()
    except Exception as error:  # noqa: BLE001
        raise BadImageError(_damage(error)) from None


def _load(image: Image) -> Image:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - as in _open
        raise BadImageError(_damage(error)) from None
    return image


def _upright(image: Image) -> Image:
    """The image as EXIF says to show it."""
    from PIL.Image import Transpose as To

    turns = {2: To.FLIP_LEFT_RIGHT, 3: To.ROTATE_180, 4: To.FLIP_TOP_BOTTOM, 5: To.TRANSPOSE,
             6: To.ROTATE_270, 7: To.TRANSVERSE, 8: To.ROTATE_90}  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF data says nothing about the pixels, which were decoded
        return image
    return image if turn is None else image.transpose(turn)


def _damage(error: Exception) -> str:
    return TRUNCATED if "truncated" in str(error).lower() or isinstance(error, EOFError) else UNDECODABLE


def _check_size(width: int, height: int, spec: ImageSpec) -> None:
    if width < 1 or height < 1:
        raise BadImageError(ZERO_SIZED)
    if width * height > spec.max_pixels:
        raise BadImageError(TOO_MANY_PIXELS)


def _finish(image: Image, spec: ImageSpec) -> bytes:
    """Colours, size, encoding."""
    image = _fit(_as_mode(image, _mode_of(spec.shape), spec.background), spec)
    if spec.encoding == "raw":
        return _as_chw(image).tobytes()
    buffer = io.BytesIO()
    if spec.encoding == "png":
        image.save(buffer, "PNG")
    else:
        # Colour at full resolution: halving it is visible in small images.
        image.save(buffer, "JPEG", quality=spec.jpeg_quality, subsampling=0)
    return buffer.getvalue()


def _mode_of(shape: tuple[int, int, int]) -> str:
    return "L" if shape[0] == 1 else "RGB"


def _as_mode(image: Image, mode: str, background: int) -> Image:
    """Grey or RGB; what is transparent shows the background."""
    from PIL import Image as Pillow

    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):  # 16-bit grey: 0..65535 -> 0..255
        wide = np.asarray(image).astype(np.uint16)
        image = Pillow.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):  # 32 bits without a stated range: any scaling would be a guess
        raise BadImageError(UNSUPPORTED_PIXELS)
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            layer = image.convert("RGBA")
            below = Pillow.new("RGBA", image.size, (background, background, background, 255))
            image = Pillow.alpha_composite(below, layer)
        return image.convert(mode)
    except (ValueError, OSError):
        raise BadImageError(UNSUPPORTED_PIXELS) from None


def _fit(image: Image, spec: ImageSpec) -> Image:
    """The spec's height and width; an image that has them already is not resampled."""
    from PIL import Image as Pillow

    size = (spec.shape[2], spec.shape[1])
    if image.size == size:
        return image
    if spec.resize == "none":
        raise BadImageError(WRONG_SIZE)
    scales = [want / have for want, have in zip(size, image.size, strict=True)]
    if spec.resize == "crop":
        # The box of the source that fills the target, resampled in one go.
        scale = max(scales)
        box = [min(have, want / scale) for want, have in zip(size, image.size, strict=True)]
        left, top = [(have - part) / 2 for have, part in zip(image.size, box, strict=True)]
        return image.resize(size, Pillow.Resampling.BILINEAR, box=(left, top, left + box[0], top + box[1]))
    scale = min(scales)
    inner = [max(1, min(want, round(have * scale))) for want, have in zip(size, image.size, strict=True)]
    small = image.resize((inner[0], inner[1]), Pillow.Resampling.BILINEAR)
    canvas = Pillow.new(image.mode, size, spec.background if image.mode == "L" else (spec.background,) * 3)
    canvas.paste(small, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas


def _as_chw(image: Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
