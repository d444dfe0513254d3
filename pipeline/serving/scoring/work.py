"""What a task of `score` must know, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.config.frozen import FrozenModel
from pipeline.serving.scoring.scores import PartRecord
from pipeline.serving.scoring.source import StoredForm

if TYPE_CHECKING:
    import pyarrow as pa


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
