"""What executors do where only names of files are shuffled: the task that writes a shard reads and makes its images.

Images then travel nowhere between tasks. Which of them cannot be used is known only then, so that these rows are told
of, and one last task writes them all, as it does where images are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ingest import tasks
from pipeline.ingest.layout import Layout

# A record of a published shard, or a row to set aside.
WRITTEN = "record string, id long, origin string, reason string"
_WRITTEN_SCHEMA = pa.schema(
    [("record", pa.string()), ("id", pa.int64()), ("origin", pa.string()), ("reason", pa.string())]
)


def write(
    batches: Iterator[pa.RecordBatch], read: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]], layout: Layout
) -> Iterator[pa.RecordBatch]:
    """Publish the images of items that are sorted by shard and key, a file for each shard; yield rows of `WRITTEN`."""
    for shard, items in tasks.by_shard(batches):
        good: list[pa.RecordBatch] = []
        for rows in tasks.check(iter(items.to_batches()), read, layout):
            is_bad = rows.column("reason").is_valid()
            good.append(rows.filter(pc.invert(is_bad)))
            if bad := rows.filter(is_bad).select(["id", "origin", "reason"]).to_pylist():
                yield pa.RecordBatch.from_pylist(bad, schema=_WRITTEN_SCHEMA)
        images = pa.Table.from_batches(good)
        if images.num_rows:
            images = images.append_column("copy", pa.array(np.zeros(images.num_rows, np.int32)))
            split, path = layout.file_of(shard)
            written = tasks.write_shard(split, path, images, layout)
            yield pa.RecordBatch.from_pylist([{"record": written.model_dump_json()}], schema=_WRITTEN_SCHEMA)


def write_quarantine(batches: Iterator[pa.RecordBatch], layout: Layout) -> Iterator[pa.RecordBatch]:
    """Rows of `WRITTEN`, those to set aside sorted by key -> records alone: those of shards, and one of a file of what
    was set aside, if anything was."""
    bad: list[pa.RecordBatch] = []
    for batch in batches:
        is_record = batch.column("record").is_valid()
        yield batch.filter(is_record).select(["record"])
        bad.append(batch.filter(pc.invert(is_record)))
    rows = pa.Table.from_batches(bad, schema=None if bad else _WRITTEN_SCHEMA)
    if rows.num_rows:
        _, path = layout.file_of(sum(shards for _, shards in layout.splits) - 1)
        written = tasks.write_quarantine(layout.dataset, path, rows)
        yield pa.RecordBatch.from_pydict({"record": pa.array([written.model_dump_json()], pa.string())})
