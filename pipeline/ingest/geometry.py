"""The geometry of ingest: which way is up, how much of an image has to be decoded, and how it is made to fit.

A JPEG file can be decoded at 1/2, 1/4 or 1/8 of its size, each block of 8 x 8 pixels to fewer: libjpeg computes a
smaller inverse cosine transform, which is near to a mean over the pixels that are left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.data import reasons
from pipeline.data.codec import BadImageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.ingest.images import ImageSpec

# EXIF's tag for which way is up, 1 to 8, and how Pillow turns what is stored so: by `Image.Transpose`'s numbers, since
# Pillow is imported where an image comes.
_ORIENTATION = 0x0112
_FLIP_LEFT_RIGHT, _FLIP_TOP_BOTTOM, _ROTATE_90, _ROTATE_180, _ROTATE_270, _TRANSPOSE, _TRANSVERSE = range(7)
_TURNS = {2: _FLIP_LEFT_RIGHT, 3: _ROTATE_180, 4: _FLIP_TOP_BOTTOM, 5: _TRANSPOSE, 6: _ROTATE_270,
          7: _TRANSVERSE, 8: _ROTATE_90}  # fmt: skip
# Those after which rows are columns; and those after which what was on the left, or on top, is on the other side.
_SWAPPED = (_TRANSPOSE, _ROTATE_270, _TRANSVERSE, _ROTATE_90)
_FROM_RIGHT = (_FLIP_LEFT_RIGHT, _ROTATE_180, _ROTATE_270, _TRANSVERSE)
_FROM_BELOW = (_FLIP_TOP_BOTTOM, _ROTATE_180, _TRANSVERSE, _ROTATE_90)
# Left, top, right and bottom, in pixels.
Box = tuple[float, float, float, float]


def turn_of(image: Image) -> int | None:
    """What has to be done for the image to be as EXIF says to show it."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF data says nothing about the pixels
        return None


def turned(image: Image, turn: int | None) -> Image:
    """The image as EXIF says to show it; ``turn`` is what `turn_of` gave."""
    from PIL.Image import Transpose

    return image if turn is None else image.transpose(Transpose(turn))


def ask_for_less(image: Image, turn: int | None, spec: ImageSpec) -> Box | None:
    """Let libjpeg decode an image at 1/2, 1/4 or 1/8, where that leaves ``decode_margin`` times what is needed.

    Returns
    -------
    Where the image will be in the upright pixels: those of the last column and row may be of no whole block.
    """
    if spec.decode != "scaled" or spec.resize == "none":
        return None
    size = image.size
    upright = size[::-1] if turn in _SWAPPED else size
    wanted = (spec.shape[2], spec.shape[1])
    scales = [want / have for want, have in zip(wanted, upright, strict=True)]
    scale = spec.decode_margin * (max(scales) if spec.resize == "crop" else min(scales))
    if scale > 1:
        return None
    asked = image.draft(None, (math.ceil(size[0] * scale), math.ceil(size[1] * scale)))
    if asked is None or image.size == size:
        return None
    (_, _, width, height), (columns, rows) = asked[1], image.size
    if turn in _SWAPPED:
        width, height, columns, rows = height, width, rows, columns
    left = columns - width if turn in _FROM_RIGHT else 0.0
    top = rows - height if turn in _FROM_BELOW else 0.0
    return left, top, left + width, top + height


def fit(image: Image, whole: Box | None, spec: ImageSpec) -> Image:
    """The spec's height and width; an image that has them already is not resampled.

    Parameters
    ----------
    whole : where the image is in its pixels; None: everywhere

    Raises
    ------
    BadImageError
        It has another size, and is not to be resized.
    """
    from PIL import Image as Pillow

    size = (spec.shape[2], spec.shape[1])
    if image.size == size and whole is None:
        return image
    if spec.resize == "none":
        raise BadImageError(reasons.WRONG_SIZE)
    left, top, right, bottom = whole or (0, 0, *image.size)
    extent = (right - left, bottom - top)
    scales = [want / have for want, have in zip(size, extent, strict=True)]
    if spec.resize == "crop":
        # The box of the source that fills the target, resampled in one go.
        scale = max(scales)
        box = [min(have, want / scale) for want, have in zip(size, extent, strict=True)]
        left, top = (start + (have - part) / 2 for start, have, part in zip((left, top), extent, box, strict=True))
        return image.resize(size, Pillow.Resampling.BILINEAR, box=(left, top, left + box[0], top + box[1]))
    scale = min(scales)
    inner = [max(1, min(want, round(have * scale))) for want, have in zip(size, extent, strict=True)]
    small = image.resize((inner[0], inner[1]), Pillow.Resampling.BILINEAR, box=whole)
    canvas = Pillow.new(image.mode, size, spec.background if image.mode == "L" else (spec.background,) * 3)
    canvas.paste(small, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas
