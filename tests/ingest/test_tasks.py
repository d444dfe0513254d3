"""What tasks leave behind when Spark runs them twice."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config.dataset import DeformSettings
from pipeline.ingest import tasks
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.layout import Layout

SHAPE = (1, 4, 4)


def attempt(layout):
    """One attempt at the task that writes the only shard."""
    rows = pa.record_batch(
        {
            "shard": pa.array([0] * 20, pa.int32()),
            "id": range(20),
            "label": pa.array([0, 1] * 10, pa.int32()),
            "image": [bytes([number]) * 16 for number in range(20)],
            "origin": [""] * 20,
            "reason": pa.array([None] * 20, pa.string()),
            "copy": np.zeros(20, np.int32),
            "duplicate": [False] * 20,
        }
    )
    (record,) = tasks.write(iter([rows]), layout)
    return tasks.read_record(record["record"][0].as_py()).shard


def test_no_attempt_replaces_what_another_has_written(tmp_path):
    layout = Layout(
        dataset=str(tmp_path), prefix="part-0", splits=(("train", 1),), form="pixels", pixel_shape=SHAPE,
        image=ImageSpec(SHAPE), num_classes=2, row_group_rows=30, compression="none", expand=1,
        deform=DeformSettings(), seed=0,
    )  # fmt: skip
    first = attempt(layout)
    file = tmp_path / first.path
    assert file.name == f"part-0-00000-{first.sha256[:12]}.parquet"
    written = file.stat().st_mtime_ns
    # As another version of pyarrow might: the same rows, and other bytes.
    other = attempt(dataclasses.replace(layout, compression="zstd"))
    assert other.sha256 != first.sha256
    for shard in (first, other):
        assert hashlib.sha256(Path(tmp_path, shard.path).read_bytes()).hexdigest() == shard.sha256
    assert attempt(layout) == first
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-1])  # cut: it is not what its name says
    assert attempt(layout) == first
    assert hashlib.sha256(file.read_bytes()).hexdigest() == first.sha256
