"""Image payloads -> checked images of one shape, as shards store them. No Spark import, no torch.

A payload that cannot be used is never more than a `BadImageError` with a reason; `ingest` sets its row aside.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from pipeline.data import reasons
from pipeline.data.codec import (
    FORMATS,
    BadImageError,
    damage_of,
    formats_of,
    load_pixels,
    mode_of,
    open_image,
    pixels_of,
)
from pipeline.ingest import geometry

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.config.dataset import DatasetSettings

# Spark's image source says how pixels are stored by OpenCV's type number: 8-bit unsigned, 1, 3 (BGR) or 4 (BGRA).
_SPARK_UNDECODABLE = -1
# Rows of a 16-bit image that are made 8-bit at once.
_ROWS_AT_ONCE = 256
_OPENCV_CHANNELS: dict[int | None, int] = {0: 1, 16: 3, 24: 4}


@dataclass(frozen=True)
class ImageSpec:
    """What every image becomes.

    shape : (C, H, W); C is 1 or 3 (any number for images that are stored raw in this very shape)
    resize : none, crop or letterbox
    background : grey value, 0 to 255, that fills a letterbox and shows through transparency
    max_pixels : an image of more is refused by its header
    encoding : raw, png or jpeg
    jpeg_quality : 1 to 100
    keep_jpeg : a JPEG file of one picture that is what it would be made into is stored as it is
    decode, decode_margin : scaled: JPEG files are decoded at a fraction of their size that leaves so many times the
        height and width to resize from; exact: whole
    formats : of files that are decoded, as Pillow names them
    """

    shape: tuple[int, int, int]
    resize: str = "crop"
    background: int = 255
    max_pixels: int = 50_000_000
    encoding: str = "raw"
    jpeg_quality: int = 92
    keep_jpeg: bool = False
    decode: str = "exact"
    decode_margin: float = 2.0
    formats: tuple[str, ...] = FORMATS

    @property
    def raw_bytes(self) -> int:
        return int(np.prod(self.shape))


class SparkImage(TypedDict):
    """The struct of Spark's image source: ``data`` are rows of pixels, ``mode`` says how each is stored."""

    height: int | None
    width: int | None
    mode: int | None
    data: bytes | None


def image_spec(settings: DatasetSettings, source_shape: tuple[int, int, int] | None) -> ImageSpec:
    """What the settings ask for; where they name no shape, images keep the one that all of the source have."""
    shape = settings.image.shape or source_shape
    assert shape is not None, "config checks this"
    formats = formats_of(settings.source.extensions)
    return ImageSpec(shape=shape, formats=formats, **settings.image.model_dump(exclude={"shape"}))


def from_file(payload: bytes | None, spec: ImageSpec) -> bytes:
    """Make a stored image of ``spec`` from the content of a file of one of its formats.

    Raises
    ------
    BadImageError
        It cannot be decoded, or not made into this shape.
    """
    return from_file_of_size(payload, spec)[0]


def from_file_of_size(payload: bytes | None, spec: ImageSpec) -> tuple[bytes, tuple[int, int]]:
    """As `from_file`, and the width and height that the file says it has, not turned."""
    if payload is None:
        raise BadImageError(reasons.MISSING_IMAGE)
    if not payload:
        raise BadImageError(reasons.EMPTY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is refused, or does not matter
        image = open_image(payload, spec.formats)
        size = image.size
        _check_size(*size, spec)
        if image.format in ("JPEG", "MPO"):  # MPO is JPEG with further pictures behind the first
            turn = geometry.turn_of(image)
            if spec.keep_jpeg and image.format == "JPEG" and turn is None and _is_as_stored(image, spec):
                load_pixels(image)  # what is damaged is not kept
                return payload, size
            whole = geometry.ask_for_less(image, turn, spec)
            return _finish(geometry.turned(load_pixels(image), turn), whole, spec), size
        if image.format == "PNG":
            _check_png(payload)
        image = load_pixels(image)  # other formats may say only then which way is up
        return _finish(geometry.turned(image, geometry.turn_of(image)), None, spec), size


def from_spark_image(value: SparkImage | None, spec: ImageSpec) -> bytes:
    """Make a stored image from the struct of Spark's image source, whose colours are BGR or BGRA.

    Raises
    ------
    BadImageError
        It is not whole, its pixels are of an unknown kind, or it cannot be made into this shape.
    """
    from PIL import Image

    if value is None or value["data"] is None:
        raise BadImageError(reasons.MISSING_IMAGE)
    if value["mode"] == _SPARK_UNDECODABLE:
        raise BadImageError(reasons.UNDECODABLE)
    height, width, channels = value["height"] or 0, value["width"] or 0, _OPENCV_CHANNELS.get(value["mode"])
    if channels is None:
        raise BadImageError(reasons.UNSUPPORTED_PIXELS)
    _check_size(width, height, spec)
    if len(value["data"]) != height * width * channels:
        raise BadImageError(reasons.TRUNCATED)
    pixels = np.frombuffer(value["data"], np.uint8).reshape(height, width, channels)
    if channels == 1:
        return _finish(Image.fromarray(pixels[:, :, 0]), None, spec)
    order = [2, 1, 0, 3][:channels]
    return _finish(Image.fromarray(np.ascontiguousarray(pixels[:, :, order])), None, spec)


def from_pixels(pixels: np.ndarray, spec: ImageSpec) -> bytes:
    """Make a stored image from uint8 (C, H, W); pixels that have the spec's shape already stay as they are.

    Raises
    ------
    BadImageError
        They are neither grey nor colour, or cannot be made into this shape.
    """
    from PIL import Image

    if pixels.shape == spec.shape and spec.encoding == "raw":
        return pixels.tobytes()
    if pixels.shape[0] not in (1, 3):
        raise BadImageError(reasons.UNSUPPORTED_PIXELS)
    image = Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _finish(image, None, spec)


def from_raw(raw: bytes | None, spec: ImageSpec) -> bytes | None:
    """Store raw pixels of the spec's shape in its encoding; None stays None."""
    return None if raw is None else from_pixels(np.frombuffer(raw, np.uint8).reshape(spec.shape), spec)


def _is_as_stored(image: Image, spec: ImageSpec) -> bool:
    return image.size == (spec.shape[2], spec.shape[1]) and image.mode == mode_of(spec.shape)


def _check_png(payload: bytes) -> None:
    """PNG has a checksum of every chunk, and decoding does not look at those of the pixels."""
    image = open_image(payload)
    try:
        image.verify()
    except Exception as error:  # noqa: BLE001
        raise BadImageError(damage_of(error)) from None


def _check_size(width: int, height: int, spec: ImageSpec) -> None:
    if width < 1 or height < 1:
        raise BadImageError(reasons.ZERO_SIZED)
    if width * height > spec.max_pixels:
        raise BadImageError(reasons.TOO_MANY_PIXELS)


def _finish(image: Image, whole: geometry.Box | None, spec: ImageSpec) -> bytes:
    """Colours, size, encoding.

    Parameters
    ----------
    whole : where the image is in its pixels; None: everywhere
    """
    if isinstance(image.info.get("transparency"), str):  # a text of that name, and no colour
        del image.info["transparency"]
    image = geometry.fit(_as_mode(image, mode_of(spec.shape), spec.background), whole, spec)
    if spec.encoding == "raw":
        return pixels_of(image).tobytes()
    # Comments and profiles of the file would be written along: equal pixels would no longer be equal files.
    image.info = {}
    buffer = io.BytesIO()
    if spec.encoding == "png":
        image.save(buffer, "PNG")
    else:
        # Colour at full resolution: halving it is visible in small images.
        image.save(buffer, "JPEG", quality=spec.jpeg_quality, subsampling=0)
    return buffer.getvalue()


def _as_8_bits(image: Image) -> Image:
    """16-bit grey, 0 to 65535, as 8-bit grey, 0 to 255; of a PNG file that names a transparent value, with alpha.

    Pillow scales to 16 bits what a PGM file of more than 8 has.
    """
    from PIL import Image as Pillow

    wide, nothing = np.asarray(image), image.info.get("transparency")
    narrow = np.empty(wide.shape, np.uint8)
    for first in range(0, len(wide), _ROWS_AT_ONCE):  # in 32 bits at once, 20 megapixels would take 160 MB more
        rows = wide[first : first + _ROWS_AT_ONCE].astype(np.uint16).astype(np.uint32)
        narrow[first : first + _ROWS_AT_ONCE] = (rows + 128) // 257
    grey = Pillow.fromarray(narrow)
    if isinstance(nothing, int):  # of 16 bits, which several values share that are one in 8
        grey.putalpha(Pillow.fromarray(np.where(wide == nothing, 0, 255).astype(np.uint8)))
    return grey


def _as_mode(image: Image, mode: str, background: int) -> Image:
    """Grey or RGB; what is transparent shows the background."""
    from PIL import Image as Pillow

    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _as_8_bits(image)
    elif image.mode in ("I", "F"):  # 32 bits without a stated range: any scaling would be a guess
        raise BadImageError(reasons.UNSUPPORTED_PIXELS)
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            layer = image.convert("RGBA")
            below = Pillow.new("RGBA", image.size, (background, background, background, 255))
            image = Pillow.alpha_composite(below, layer)
        return image.convert(mode)
    except (ValueError, TypeError, OSError):
        raise BadImageError(reasons.UNSUPPORTED_PIXELS) from None
