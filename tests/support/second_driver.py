"""A driver beside pytest's, in a process of its own, that does what it is told; with a Spark session where it asks.

Spark allows one session in a process. Each line of the program's input is JSON, the arguments of what it does; it
answers each with a line of JSON, what that returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from connect_server import plain_environment


class SecondDriver:
    """The program, running, and the file of its standard error."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self._log = process, log

    def begin(self, *request: Any) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        """What it has returned there."""
        line = self.process.stdout.readline()
        assert line, f"it ended with exit code {self.process.wait(60)}: {self._log.read_text()[-2000:]}"
        return json.loads(line)


@contextmanager
def second_driver(program: str, log: Path, *path: str, **environment: str) -> Iterator[SecondDriver]:
    """Start a program that calls `answer` or `answer_without_spark`, and end it.

    Parameters
    ----------
    log : file for its standard error
    path : more folders of its PYTHONPATH
    environment : more variables
    """
    code = os.pathsep.join([*path, str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, program],
            env={**plain_environment(), "PYTHONPATH": code, "PYSPARK_PYTHON": sys.executable, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        running = SecondDriver(process, log)
        try:
            assert running.result() == "ready"
            yield running
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()


def answer(act: Callable[..., Any], *, master: str) -> None:
    """In the program: make a session, and do ``act(spark, *request)`` for each line, whose result is the answer.

    What it prints itself goes to standard error.
    """
    from pipeline.cluster.session import get_session
    from pipeline.config.cluster import SparkSettings

    told, sys.stdout = sys.stdout, sys.stderr
    conf = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2", "spark.driver.memory": "512m"}
    spark = get_session(SparkSettings(master=master, conf=conf), "second driver")
    _answer(partial(act, spark), told)
    spark.stop()


def answer_without_spark(act: Callable[..., Any]) -> None:
    """In the program: do ``act(*request)`` for each line; see `answer`."""
    told, sys.stdout = sys.stdout, sys.stderr
    _answer(act, told)


def _answer(act: Callable[..., Any], told: TextIO) -> None:
    print(json.dumps("ready"), file=told, flush=True)
    for line in sys.stdin:
        print(json.dumps(act(*json.loads(line))), file=told, flush=True)
