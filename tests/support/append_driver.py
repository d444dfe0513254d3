"""A process that appends to a dataset whenever it is told to.

A program of its own (`python append_driver.py`), since Spark allows one session in a process and pytest's has one.
Each line of its input is JSON, the arguments of `append`; it answers each with a line of JSON, what `append` returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from connect_server import plain_environment
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


def append(spark: SparkSession, dataset: str, source: str, wait_seconds: float) -> str:
    """Append a source to a dataset after a while; empty where that is done, or why it is not."""
    from pipeline.ingest.job import ingest_dataset

    time.sleep(wait_seconds)
    try:
        ingest_dataset(spark, dataset_settings(dataset, Path(source), append=True, shard_bytes=1 << 20), cache="unused")
    except ValueError as error:
        return str(error)
    return ""


class Appender:
    """The program, running."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def begin(self, dataset: str, source: str, wait_seconds: float = 0.0) -> None:
        self.process.stdin.write(json.dumps([dataset, source, wait_seconds]) + "\n")
        self.process.stdin.flush()

    def result(self) -> str:
        """What `append` has returned there."""
        line = self.process.stdout.readline()
        assert line, f"it ended with exit code {self.process.wait(60)}"
        return json.loads(line)


@contextmanager
def appender(log: Path, *path: str, **environment: str) -> Iterator[Appender]:
    """Start the program, and end it.

    Parameters
    ----------
    log : file for its standard error
    path : more folders of its PYTHONPATH
    environment : more variables
    """
    code = os.pathsep.join([*path, str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__],
            env=_environment(code, environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        running = Appender(process)
        try:
            assert running.result() == "ready", log.read_text()[-2000:]
            yield running
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()


def _environment(code: str, more: Mapping[str, str]) -> dict[str, str]:
    return {**plain_environment(), "PYTHONPATH": code, "PYSPARK_PYTHON": sys.executable, **more}


def main() -> None:
    from pipeline.cluster.session import get_session
    from pipeline.config.cluster import SparkSettings

    conf = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2", "spark.driver.memory": "512m"}
    spark = get_session(SparkSettings(master="local[1]", conf=conf), "appends")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(append(spark, *json.loads(line))), flush=True)
    spark.stop()


if __name__ == "__main__":
    main()
