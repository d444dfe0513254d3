"""Small image files, and what ingest makes of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.codec import BadImageError, decode_stored
from pipeline.ingest.images import ImageSpec, from_file

GREY, COLOUR = (1, 12, 10), (3, 12, 10)


def file_of(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(kind, height=12, width=10, **options) -> bytes:
    """A colour file of noise."""
    return file_of(Image.fromarray(noise(height, width, 3)), kind, **options)


def pixels_of(stored, spec) -> np.ndarray:
    return decode_stored(stored, spec.encoding, spec.shape)


def made(payload, **settings) -> np.ndarray:
    """A file's pixels as ingest makes them: int64 (C, H, W)."""
    spec = ImageSpec(**{"shape": COLOUR, **settings})
    return pixels_of(from_file(payload, spec), spec).astype(int)


def refused(payload, spec=None) -> str:
    """The reason why a file is set aside."""
    with pytest.raises(BadImageError) as error:
        from_file(payload, spec or ImageSpec(COLOUR))
    return str(error.value)
