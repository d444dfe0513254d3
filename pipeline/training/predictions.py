"""What the network that a training ends with found of each image: ``predictions.parquet`` in the folder of its job."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

FILE = "predictions.parquet"
_SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "label": pa.int32(),
        "prediction": pa.int32(),
        "confidence": pa.float32(),
        "loss": pa.float32(),
    }
)


@dataclass(frozen=True)
class Predictions:
    """What an evaluation found of each image of a split, sorted by id: arrays of shape (rows,).

    The numbers of an image do not depend on the number of ranks but for the rounding of its batch, whose size may
    differ. Where the logits of a network that has diverged are not finite, neither are confidence and loss.

    id : int64, that of the dataset
    label : int32
    prediction : int32, the class of the largest logit
    confidence : float32, softmax of the predicted class
    loss : float32, cross-entropy in nats: minus the logarithm of the label's softmax
    """

    id: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.id)


def write(path: str, predictions: Predictions) -> None:
    """Publish the predictions as one Parquet file, atomically: a column for each field, a row for each image.

    Raises
    ------
    OSError
        The storage does not take it.
    """
    # Not `pa.array`, which imports pandas: half a second at the end of every training.
    columns = [
        pa.Array.from_buffers(
            field.type, len(predictions), [None, pa.py_buffer(np.ascontiguousarray(getattr(predictions, field.name)))]
        )
        for field in _SCHEMA
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), buffer, compression="zstd")
    storage.publish(path, buffer.getvalue())


def read(path: str) -> Predictions:
    """The predictions that `write` has published.

    Raises
    ------
    OSError
        The file is not there, or cannot be read.
    ValueError
        It is no Parquet file, or has other columns.
    """
    table = pq.read_table(io.BytesIO(storage.read_bytes(path)))
    if not table.schema.equals(_SCHEMA):
        columns = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        expected = ", ".join(f"{field.name} {field.type}" for field in _SCHEMA)
        raise ValueError(f"{path} has the columns {columns} instead of {expected}: it holds no predictions")
    return Predictions(**{name: np.from_dlpack(_whole(table[name])) for name in _SCHEMA.names})


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The rows of all parts, sorted by id."""
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Predictions)
    }
    order = np.argsort(columns["id"], kind="stable")
    return Predictions(**{name: column[order] for name, column in columns.items()})
