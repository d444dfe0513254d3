"""A process that appends to a dataset whenever it is told to.

A program of its own (`python append_driver.py`), since Spark allows one session in a process and pytest's has one.
It is asked with the arguments of `append`, and answers with what that returns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from second_driver import SecondDriver, answer, second_driver
from small_data import dataset_settings, make_images, write_idx

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS = {"train": 25, "t10k": 6}


def write_source(folder: Path, number: int) -> Path:
    """31 images that no source of another number has; see `images_of`."""
    folder.mkdir(parents=True)
    for seed, (prefix, rows) in enumerate(ROWS.items()):
        images, labels = make_images(rows, 2 * number + seed)
        write_idx(folder, f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder, f"{prefix}-labels-idx1-ubyte", labels)
    return folder


def images_of(number: int) -> list[bytes]:
    """The images of a source, as a raw dataset holds them."""
    return [
        image.tobytes() for seed, rows in enumerate(ROWS.values()) for image in make_images(rows, 2 * number + seed)[0]
    ]


def append(spark: SparkSession, dataset: str, source: str, wait_seconds: float = 0.0) -> str:
    """Append a source to a dataset after a while; empty where that is done, or why it is not."""
    from pipeline.ingest.job import ingest_dataset

    time.sleep(wait_seconds)
    try:
        ingest_dataset(spark, dataset_settings(dataset, Path(source), append=True, shard_bytes=1 << 20), cache="unused")
    except ValueError as error:
        return str(error)
    return ""


def appender(log: Path, *path: str, **environment: str) -> AbstractContextManager[SecondDriver]:
    """The program, running; see `second_driver`."""
    return second_driver(__file__, log, *path, **environment)


if __name__ == "__main__":
    answer(append, master="local[1]")
