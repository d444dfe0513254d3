"""Items of a part to images that the network takes: read and decoded in threads, ahead of what is asked for."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.data import profile, reasons
from pipeline.data.codec import BadImageError, as_rows, decode_stored
from pipeline.ingest import images
from pipeline.serving.scoring.source import PART

if TYPE_CHECKING:
    from pipeline.serving.predictor import Predictor
    from pipeline.serving.scoring.work import Work


@dataclass
class Decoded:
    """Images of one part, ready for the network, and what could not be made ready.

    ids, origins : of the images, in their order
    images : uint8 (N, C, H, W); none any more once the network has them
    bad : id, origin and reason of each that was set aside
    sides : images by the shorter side of their file
    figures : see `profile.profile_of_images`
    """

    ids: np.ndarray
    origins: list[str]
    images: np.ndarray
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    sides: Counter[str] = field(default_factory=Counter)
    figures: dict[str, np.ndarray] = field(default_factory=dict)


def decoded_ahead(batches: Iterable[pa.RecordBatch], work: Work, predictor: Predictor) -> Iterator[tuple[int, Decoded]]:
    """The images of items, a few at a time, each with the number of the part that it belongs to, in their order."""
    return _ahead(_pieces(batches, work.item_rows), lambda items: _decode(items, work, predictor), work.threads)


def _pieces(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Slices of so many items at most, each of one part, with its number."""
    for batch in batches:
        parts = batch.column(PART).to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(parts)) + 1), len(parts)]
        for start, end in itertools.pairwise(cuts):
            for first in range(start, end, rows):
                yield int(parts[first]), batch.slice(first, min(rows, end - first))


def _ahead(
    pieces: Iterator[tuple[int, pa.RecordBatch]], decode: Callable[[pa.RecordBatch], Decoded], threads: int
) -> Iterator[tuple[int, Decoded]]:
    """Decode pieces in threads, a few ahead of what is asked for, and give them in their order."""
    waiting: deque[tuple[int, Future[Decoded]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="sparknorm-decode") as pool:
        try:
            for part, items in pieces:
                waiting.append((part, pool.submit(decode, items)))
                if len(waiting) > threads + 1:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _decode(items: pa.RecordBatch, work: Work, predictor: Predictor) -> Decoded:
    """In a thread: read the images of some items, and make of each what the network takes, or give a reason."""
    parts = [_decode_rows(rows, work, predictor) for rows in work.read(items)]
    if len(parts) == 1:
        whole = parts[0]
    else:
        whole = Decoded(
            np.concatenate([np.zeros(0, np.int64), *(part.ids for part in parts)]),
            [origin for part in parts for origin in part.origins],
            np.concatenate([np.zeros((0, *predictor.image.shape), np.uint8), *(part.images for part in parts)]),
            [bad for part in parts for bad in part.bad],
            sum((part.sides for part in parts), Counter()),
        )
    whole.figures = profile.profile_of_images(whole.images)
    return whole


def _decode_rows(rows: pa.RecordBatch, work: Work, predictor: Predictor) -> Decoded:
    payloads, shape = rows.column("payload"), predictor.image.shape
    is_raw = work.form in ("pixels", "stored") and work.encoding == "raw"
    if is_raw and not rows.column("problem").null_count < rows.num_rows:
        pixels = as_rows(payloads, int(np.prod(shape)))
        if pixels is not None:
            ids, origins = rows.column("id").to_numpy(), rows.column("origin").to_pylist()
            return Decoded(ids, origins, pixels.reshape(-1, *shape))
    return _decode_one_by_one(rows, work, predictor)


def _decode_one_by_one(rows: pa.RecordBatch, work: Work, predictor: Predictor) -> Decoded:
    ids, origins = rows.column("id").to_pylist(), rows.column("origin").to_pylist()
    made, good, bad, sides = [], [], [], Counter[str]()
    for number, (payload, problem) in enumerate(zip(rows.column("payload"), rows.column("problem"), strict=True)):
        try:
            if problem.is_valid:
                raise BadImageError(problem.as_py())
            value = payload.as_py()  # one copy of a file at a time
            if work.form == "file":
                pixels, size = predictor.decode_of_size(value)
                sides[profile.side_bin(*size)] += 1
            else:
                pixels = _pixels(value, work, predictor)
            made.append(pixels)
            good.append(number)
        except BadImageError as error:
            bad.append((ids[number], origins[number], str(error)))
    return Decoded(
        np.array([ids[number] for number in good], np.int64),
        [origins[number] for number in good],
        np.stack(made) if made else np.zeros((0, *predictor.image.shape), np.uint8),
        bad,
        sides,
    )


def _pixels(value: Any, work: Work, predictor: Predictor) -> np.ndarray:
    """The image that a payload holds which is no file: uint8 (C, H, W)."""
    spec = predictor.image
    if value is None:
        raise BadImageError(reasons.MISSING_IMAGE)
    if work.form == "spark_image":
        return decode_stored(images.from_spark_image(value, spec), spec.encoding, spec.shape)
    assert work.shape is not None
    return decode_stored(value, work.encoding, work.shape)
