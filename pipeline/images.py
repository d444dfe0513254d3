"""Image payloads -> checked images of one shape. Runs on executors; no Spark import.

A payload that cannot be used is never an exception: it gets a reason, and `ingest` sets the row aside.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MISSING = "missing_image"
WRONG_SIZE = "wrong_size"
UNKNOWN_LABEL = "unknown_label"


def reasons_against(payloads: pa.Array, labels: pa.Array, *, image_bytes: int, num_classes: int) -> pa.Array:
    """Why each row cannot be used, or null where it can: a string array as long as ``payloads``.

    Parameters
    ----------
    payloads : binary; raw images, uint8 C x H x W, row-major
    labels : integer; valid from 0 to ``num_classes`` - 1
    """
    known = pc.and_(pc.greater_equal(labels, 0), pc.less(labels, num_classes)).fill_null(False)
    right_size = pc.equal(pc.binary_length(payloads), image_bytes).fill_null(False)
    return pc.case_when(
        pc.make_struct(payloads.is_null(), pc.invert(right_size), pc.invert(known)),
        MISSING,
        WRONG_SIZE,
        UNKNOWN_LABEL,
    )


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
