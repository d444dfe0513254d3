"""A real standalone cluster on this machine: one Master, Workers that each have their own environment and GPUs, all on
this host or on those of `two_hosts.py`.

The GPUs are addresses that a script prints: Spark schedules them like real ones. Drivers run as processes of their
own (`run_driver`), because a test process has a local session already. Nothing here waits without a bound, and only
processes that were started here are ended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pyspark

REPOSITORY = Path(__file__).parents[2]
SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
START_SECONDS = 120  # seconds on a quiet machine; a busy one takes long
END_SECONDS = 10


class Host(Protocol):
    """Where a process of the cluster runs.

    address : that it binds, and at which others reach it
    enter : the words that, put before a command, let it run there
    """

    @property
    def address(self) -> str: ...

    def enter(self) -> list[str]: ...


class ThisHost:
    """The host of the test."""

    address = "127.0.0.1"

    def enter(self) -> list[str]:
        return []


THIS_HOST = ThisHost()


@dataclass(frozen=True)
class WorkerOffer:
    """What one Worker offers.

    gpus : addresses that its discovery script prints
    environment : variables of the Worker, which its executors and their Python workers inherit; PYTHONPATH is this
        repository unless it is given
    """

    cores: int = 2
    memory: str = "1g"
    gpus: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    host: Host = THIS_HOST


@dataclass
class Cluster:
    """A running cluster; ``master`` is its address, ``spark://HOST:PORT``."""

    master: str
    workers: list[subprocess.Popen]
    folder: Path

    def kill_worker(self, index: int) -> None:
        """SIGKILL one Worker, its executors and their Python workers: a machine that is gone for good."""
        _kill(_family(self.workers[index].pid))
        self.workers[index].wait(END_SECONDS)


@contextmanager
def standalone_cluster(offers: Sequence[WorkerOffer], folder: Path, *, host: Host = THIS_HOST) -> Iterator[Cluster]:
    """Start a Master and one Worker for each offer, wait until all are registered, and end them all.

    Parameters
    ----------
    folder : for logs, work folders and discovery scripts
    host : of the Master

    Raises
    ------
    RuntimeError
        A process ended, or was not ready after START_SECONDS; the message has the end of its log.
    """
    started: list[subprocess.Popen] = []
    log = folder / "master.log"
    try:
        started.append(_spark_class("org.apache.spark.deploy.master.Master", ["--port", "0"], log, {}, host))
        master = _in_log(log, r"Starting Spark master at (spark://\S+:\d+)", started[0]).group(1)
        for index, offer in enumerate(offers):
            started.append(_start_worker(master, offer, folder, index))
        for index, process in enumerate(started[1:]):
            _in_log(folder / f"worker-{index}.log", "Successfully registered with master", process)
        yield Cluster(master, started[1:], folder)
    finally:
        _end(started)


def _start_worker(master: str, offer: WorkerOffer, folder: Path, index: int) -> subprocess.Popen:
    words = ["--cores", str(offer.cores), "--memory", offer.memory, "--work-dir", str(folder / f"work-{index}"), master]
    environment = dict(offer.environment)
    if offer.gpus:
        script = folder / f"gpus-{index}.sh"
        script.write_text(f"#!/bin/sh\necho '{json.dumps({'name': 'gpu', 'addresses': list(offer.gpus)})}'\n")
        script.chmod(0o755)
        environment["SPARK_WORKER_OPTS"] = (
            f"-Dspark.worker.resource.gpu.amount={len(offer.gpus)} -Dspark.worker.resource.gpu.discoveryScript={script}"
        )
    log = folder / f"worker-{index}.log"
    return _spark_class("org.apache.spark.deploy.worker.Worker", words, log, environment, offer.host)


def _spark_class(
    name: str, words: Sequence[str], log: Path, environment: Mapping[str, str], host: Host
) -> subprocess.Popen:
    # spark-class ends in `exec java`, so the process started here is the JVM itself.
    with log.open("w") as output:
        return subprocess.Popen(
            [*host.enter(), SPARK_CLASS, name, "--host", host.address, "--webui-port", "0", *words],
            env={
                **_plain_environment(host),
                "SPARK_DAEMON_MEMORY": "256m",
                "PYTHONPATH": str(REPOSITORY),
                **environment,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def _plain_environment(host: Host) -> dict[str, str]:
    """This process's environment without what a session in it, or its user, has set for Spark and Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYSPARK_", "PYTHON"))}
    # Without the second compiler and a parallel collector, six JVMs take half the processor time to start.
    java = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    return {**kept, "SPARK_LOCAL_IP": host.address, "PYSPARK_PYTHON": sys.executable, "JDK_JAVA_OPTIONS": java}


def _in_log(log: Path, pattern: str, process: subprocess.Popen) -> re.Match:
    """The first match of ``pattern`` in a log that is being written."""
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(pattern, text := log.read_text(errors="replace"))):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{log.name} (exit code {process.returncode}) has no {pattern!r}: {text[-2000:]}")
        time.sleep(0.05)
    return found


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it; listed before any is killed, since orphans get another parent."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares the start time: never another process with a reused id


def _end(started: Sequence[subprocess.Popen]) -> None:
    families = [member for process in started if process.poll() is None for member in _family(process.pid)]
    for process in started:
        process.terminate()
    _, left = psutil.wait_procs(families, END_SECONDS)
    _kill(left)
    for process in started:
        process.wait(END_SECONDS)


def run_driver(script: str, master: str, *args: str, timeout: float = 300, host: Host = THIS_HOST) -> str:
    """Run a Python script as a Spark driver on a host and return what it printed.

    The script may import this project and the modules of ``tests/``; ``sys.argv[1]`` is the master, the rest ``args``.
    Its functions travel to the executors by value, as ``__main__``'s do.

    Raises
    ------
    AssertionError
        The script's exit code is not 0; the message has the end of its standard error.
    subprocess.TimeoutExpired
        It was killed after ``timeout`` seconds.
    """
    done = subprocess.run(
        [*host.enter(), sys.executable, "-c", script, master, *args],
        env={**_plain_environment(host), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def shipped_properties(name: str) -> dict[str, str]:
    """The properties of a file in ``conf/spark``, as spark-submit reads them."""
    lines = (REPOSITORY / "conf" / "spark" / name).read_text().splitlines()
    return dict(line.split(None, 1) for line in lines if line.strip() and not line.startswith("#"))


def driver_session(master: str, conf: Mapping[str, str]) -> Any:
    """For scripts of `run_driver`: a session of small executors on ``master``."""
    from pipeline.cluster.session import get_session
    from pipeline.config.cluster import SparkSettings

    small = {
        "spark.driver.host": os.environ["SPARK_LOCAL_IP"],
        "spark.driver.bindAddress": os.environ["SPARK_LOCAL_IP"],
        "spark.ui.enabled": "false",
        "spark.driver.memory": "512m",
        "spark.executor.memory": "512m",
        "spark.sql.shuffle.partitions": "4",
    }
    return get_session(SparkSettings(master=master, conf={**small, **conf}), "sparknorm tests")
