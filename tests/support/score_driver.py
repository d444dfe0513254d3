"""A process that scores whenever it is told to, on a local cluster whose executors and Python workers tests may kill.

A program of its own (`python score_driver.py MASTER`), since Spark allows one session in a process and pytest's has
one. Each line of its input is JSON, the settings; it answers each with a line of JSON, the error or "".
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from connect_server import plain_environment

# So that a claim of a job which was killed is soon seen to be one's.
LEASE_SECONDS = 2.0


class Scorer:
    """The program, running."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def begin(self, settings: str) -> None:
        """Let it score with settings (JSON)."""
        assert self.process.stdin is not None
        self.process.stdin.write(settings + "\n")
        self.process.stdin.flush()

    def result(self) -> str:
        """The error that `score` has ended with there, or ""."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with exit code {self.process.wait(60)}"
        return json.loads(line)

    def kill_one(self, victim: str, seed: random.Random) -> bool:
        """SIGKILL a Python worker or an executor; False where there is none at this moment."""
        found = [each for each in psutil.Process(self.process.pid).children(recursive=True) if _is(each, victim)]
        if found:
            seed.choice(found).kill()
        return bool(found)


def _is(process: psutil.Process, victim: str) -> bool:
    try:
        words = " ".join(process.cmdline())
        if victim == "executor":
            return "CoarseGrainedExecutorBackend" in words
        parent = process.parent()
        return "daemon" in words and parent is not None and "daemon" in " ".join(parent.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False


@contextmanager
def scorer(master: str, log: Path) -> Iterator[Scorer]:
    """Start the program, and end it with all that it has started.

    Parameters
    ----------
    log : file for its standard error
    """
    code = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    environment = {**plain_environment(), "PYTHONPATH": code, "PYSPARK_PYTHON": sys.executable}
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, master],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    family = []
    try:
        running = Scorer(process)
        assert running.result() == "ready", log.read_text()[-2000:]
        yield running
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(60)
        for each in family:
            if each.is_running():
                each.kill()


def main(master: str) -> None:
    from pipeline.cluster.session import get_session
    from pipeline.config.cluster import SparkSettings
    from pipeline.config.settings import Settings
    from pipeline.ingest import claim
    from pipeline.serving import score

    claim.LEASE_SECONDS = LEASE_SECONDS
    conf = {
        "spark.sql.shuffle.partitions": "2",
        "spark.driver.memory": "512m",
        "spark.python.daemon.module": "pipeline.daemon",
    }
    spark = get_session(SparkSettings(master=master, conf=conf), "scores", trains=True)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        error = ""
        try:
            score(spark, Settings.model_validate_json(line))
        except Exception as failed:  # noqa: BLE001 - the answer
            error = f"{type(failed).__name__}: {failed}"
        print(json.dumps(error), flush=True)
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
