"""What executors do in the job of `score`: read and decode ahead in threads, ask the network, publish parts. No MLflow.

A worker process loads the model once and keeps it for the tasks that follow.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.config.secrets import masked
from pipeline.data import profile, reasons
from pipeline.data.codec import BadImageError, as_rows, decode_stored
from pipeline.ingest import images
from pipeline.serving.scoring.scores import PARTS, QUARANTINE, RECORD_KEY, PartRecord
from pipeline.serving.scoring.source import PART, StoredForm

if TYPE_CHECKING:
    from pipeline.serving.predictor import Predictor

_QUARANTINE_SCHEMA = pa.schema([("id", pa.int64()), ("origin", pa.string()), ("reason", pa.string())])
# The model of this process: what it was loaded from and where to, and the model.
_loaded: dict[tuple[str, str], Predictor] = {}


@dataclass(frozen=True)
class Work:
    """All that a task must know; plain values, since executors get it pickled.

    folder : absolute path or URL of the scores; None: nothing is published, and only the figures count
    prefix : what the names of parts begin with
    model_file : name of the model's archive among the files that Spark has sent
    model : how the column ``model`` names it
    version : of the scores
    classes : of the model
    form, encoding, shape, item_rows, read : see `source.ImagesToScore`
    batch_size : images that go through the network at once
    threads : that read and decode
    device : "auto", "cpu" or "cuda"
    """

    folder: str | None
    prefix: str
    model_file: str
    model: str
    version: int
    classes: tuple[str, ...]
    form: StoredForm
    encoding: str
    shape: tuple[int, int, int] | None
    item_rows: int
    read: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]]
    batch_size: int
    threads: int
    device: Literal["auto", "cpu", "cuda"]


class TaskRecord(FrozenModel):
    """What a task reports of a part: the part, the process that scored it, and whether it had to load the model."""

    part: PartRecord
    process: str
    loaded_model: bool


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


def score_parts(batches: Iterator[pa.RecordBatch], work: Work) -> Iterator[pa.RecordBatch]:
    """Items that are sorted by part -> a record (JSON) of each part, once it is published."""
    predictor, loaded = _predictor(work)
    decoded = _ahead(_pieces(batches, work.item_rows), lambda items: _decode(items, work, predictor), work.threads)
    for part, pieces in itertools.groupby(decoded, key=lambda piece: piece[0]):
        record = _score_part(part, (piece for _, piece in pieces), work, predictor)
        process = f"{socket.gethostname()}:{os.getpid()}"
        told = TaskRecord(part=record, process=process, loaded_model=loaded)
        loaded = False
        yield pa.RecordBatch.from_pydict({"record": pa.array([told.model_dump_json()], pa.string())})


def _predictor(work: Work) -> tuple[Predictor, bool]:
    """The model on this task's device, and whether it was loaded just now."""
    import torch
    from pyspark import SparkFiles, TaskContext

    from pipeline.distributed.device import choose_device
    from pipeline.serving.predictor import Predictor

    context = TaskContext.get()
    assert context is not None, "Spark calls this in its tasks"
    torch.set_num_threads(max(1, context.cpus()))
    assigned = context.resources().get("gpu")
    address = assigned.addresses[0] if assigned else None
    if work.device == "auto" and address is None:
        device = torch.device("cpu")  # a GPU that Spark has not assigned may be another's
    else:
        device = choose_device(work.device, address, 0)
    key = (work.model_file, str(device))
    if key in _loaded:
        return _loaded[key], False
    _loaded.clear()
    with tempfile.TemporaryDirectory(prefix="sparknorm-model-") as folder:
        with zipfile.ZipFile(SparkFiles.get(work.model_file)) as archive:
            archive.extractall(folder)
        _loaded[key] = Predictor.load(folder, device)
    return _loaded[key], True


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
            value = payload.as_py()
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


def _score_part(part: int, pieces: Iterable[Decoded], work: Work, predictor: Predictor) -> PartRecord:
    """Score the images of one part, in their order, and publish it."""
    scored: list[Decoded] = []

    def of_images() -> Iterator[np.ndarray]:
        for piece in pieces:
            taken, piece.images = piece.images, piece.images[:0]  # a part's pixels are not held together
            scored.append(piece)
            yield taken

    answers = [predictor.probabilities(batch) for batch in _batches(of_images(), work.batch_size)]
    probabilities = np.concatenate(answers) if answers else np.zeros((0, len(work.classes)), np.float32)
    ids = np.concatenate([piece.ids for piece in scored])
    origins = _shown([origin for piece in scored for origin in piece.origins])
    if not np.isfinite(probabilities).all():
        wrong = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0])
        raise ValueError(f"the model {work.model} gives no probabilities for {origins[wrong]}: they are not finite")
    bad = [row for piece in scored for row in piece.bad]
    record = PartRecord(
        number=part,
        path=f"{PARTS}/{work.prefix}-{part:05d}.parquet",
        rows=len(ids),
        quarantine=f"{QUARANTINE}/{work.prefix}-{part:05d}.parquet" if bad else "",
        set_aside=dict(sorted(Counter(reason for *_, reason in bad).items())),
        profile=_profile(scored, probabilities),
    )
    if work.folder is not None:
        if bad:  # first, since the part says that the quarantine is there
            storage.publish(storage.join(work.folder, record.quarantine), _quarantine(bad))
        content = _part_file(ids, origins, probabilities, work, record)
        storage.publish(storage.join(work.folder, record.path), content)
    return record


def _batches(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in arrays of so many, the last one shorter."""
    waiting: list[np.ndarray] = []
    count = 0
    for block in blocks:
        first = 0
        while first < len(block):
            taken = block[first : first + rows - count]
            waiting.append(taken)
            first, count = first + len(taken), count + len(taken)
            if count == rows:
                yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _profile(scored: list[Decoded], probabilities: np.ndarray) -> profile.Profile:
    answers = profile.profile_of_answers(probabilities)
    sums = np.sum([piece.figures["channel_sums"] for piece in scored], axis=0).tolist()
    sides = sum((piece.sides for piece in scored), Counter[str]())
    return profile.Profile(
        images=len(probabilities),
        pixels=sum(int(piece.figures["pixels"]) for piece in scored),
        channel_sums=(tuple(sums[0]), tuple(sums[1])),
        brightness=tuple(np.sum([piece.figures["brightness"] for piece in scored], axis=0).tolist()),
        contrast=tuple(np.sum([piece.figures["contrast"] for piece in scored], axis=0).tolist()),
        shorter_sides=dict(sorted(sides.items())),
        classes=tuple(answers["classes"].tolist()),
        confidence=tuple(answers["confidence"].tolist()),
        confidence_sum=float(answers["confidence_sum"]),
    )


def _part_file(ids: np.ndarray, origins: list[str], probabilities: np.ndarray, work: Work, record: PartRecord) -> bytes:
    rows, classes = probabilities.shape
    names = pa.array(work.classes, pa.string())
    columns = {
        "id": pa.array(ids, pa.int64()),
        "class": names.take(pa.array(probabilities.argmax(axis=1))),
        "probabilities": pa.ListArray.from_arrays(
            pa.array(np.arange(0, rows * classes + 1, classes, dtype=np.int32)), pa.array(probabilities.reshape(-1))
        ),
        "origin": pa.array(origins, pa.string()),
        "model": pa.array([work.model], pa.string()).take(pa.array(np.zeros(rows, np.int64))),
        "score_version": pa.array(np.full(rows, work.version, np.int32)),
    }
    table = pa.table(columns).replace_schema_metadata({RECORD_KEY: record.model_dump_json().encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=["class", "model", "score_version"])
    return buffer.getvalue()


def _quarantine(bad: list[tuple[int, str, str]]) -> bytes:
    ids, origins, why = zip(*bad, strict=True)
    buffer = io.BytesIO()
    pq.write_table(pa.table([ids, _shown(list(origins)), why], schema=_QUARANTINE_SCHEMA), buffer)
    return buffer.getvalue()


def _shown(origins: list[str]) -> list[str]:
    """Paths and names of rows without passwords that an address among them may hold."""
    return masked(origins) if any("://" in origin for origin in origins) else origins
