"""What executors do in the job of `score`: ask the network of images as they are decoded, publish parts. No MLflow.

A worker process loads the model once and keeps it for the tasks that follow.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.secrets import masked
from pipeline.data import profile
from pipeline.serving.scoring.decode import Decoded, decoded_ahead
from pipeline.serving.scoring.scores import PARTS, QUARANTINE, RECORD_KEY, PartRecord
from pipeline.serving.scoring.work import TaskRecord, Work
from pipeline.storage.writable import naming_setting

if TYPE_CHECKING:
    from pipeline.serving.predictor import Predictor

_QUARANTINE_SCHEMA = pa.schema([("id", pa.int64()), ("origin", pa.string()), ("reason", pa.string())])
# The model of this process: what it was loaded from and where to, and the model.
_loaded: dict[tuple[str, str], Predictor] = {}


def score_parts(batches: Iterator[pa.RecordBatch], work: Work) -> Iterator[pa.RecordBatch]:
    """Items that are sorted by part -> a record (JSON) of each part, once it is published."""
    predictor, loaded = _predictor(work)
    decoded = decoded_ahead(batches, work, predictor)
    for part, pieces in itertools.groupby(decoded, key=lambda piece: piece[0]):
        record = _score_part(part, (piece for _, piece in pieces), work, predictor)
        process = f"{socket.gethostname()}:{os.getpid()}"
        told = TaskRecord(part=record, process=process, loaded_model=loaded)
        loaded = False
        yield pa.RecordBatch.from_pydict({"record": pa.array([told.model_dump_json()], pa.string())})
    _give_back(predictor)


def _predictor(work: Work) -> tuple[Predictor, bool]:
    """The model on this task's device, and whether it was loaded just now."""
    import torch
    from pyspark import SparkFiles, TaskContext

    from pipeline.distributed.device import choose_device
    from pipeline.distributed.host_memory import keep_freed_memory
    from pipeline.serving.predictor import Predictor

    context = TaskContext.get()
    assert context is not None, "Spark calls this in its tasks"
    torch.set_num_threads(max(1, context.cpus()))
    keep_freed_memory()
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


def _give_back(predictor: Predictor) -> None:
    """Leave a GPU to others but for the model, which stays for the tasks that follow."""
    if predictor.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


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
        content = _part_file(ids, origins, probabilities, work, record)
        with naming_setting("score.output", work.folder):
            if bad:  # first, since the part says that the quarantine is there
                storage.publish(storage.join(work.folder, record.quarantine), _quarantine(bad))
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
