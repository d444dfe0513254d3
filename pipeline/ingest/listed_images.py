"""What a manifest says of how the images of a dataset were made."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.data.manifest import Image, Preparation
from pipeline.ingest.images import ImageSpec


def listed_image(spec: ImageSpec) -> Image:
    """What a manifest says of images that are made like this, as a part of its digest."""
    scaled = spec.decode == "scaled"
    return Image(
        encoding=spec.encoding,
        shape=spec.shape,
        decode=spec.decode,
        decode_margin=spec.decode_margin if scaled else None,
        keep_jpeg=spec.keep_jpeg,
    )


def preparation(spec: ImageSpec, max_bytes: int) -> Preparation:
    """The rest of it, which is no part of a digest.

    max_bytes : a file of more is set aside unread
    """
    made = {name: value for name, value in asdict(spec).items() if name in Preparation.model_fields}
    return Preparation(**made, max_bytes=max_bytes)
