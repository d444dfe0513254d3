"""A real Spark Connect server on this machine, a process of its own whose Python has the dependencies but not us.

So the code must reach its executors as it reaches those of a remote cluster: in a zip. Nothing here waits without a
bound, and only the process that was started here is ended.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyspark

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120  # a busy machine takes long; a quiet one takes 6 s
END_SECONDS = 20
_STARTED = re.compile(r"Spark Connect server started at: .*:(\d+)$", re.MULTILINE)


@contextmanager
def connect_server(folder: Path) -> Iterator[str]:
    """Start a server with two slots, wait until it listens, and end it.

    Parameters
    ----------
    folder : for everything that the server writes, with its log in ``server.log``

    Yields
    ------
    its address, ``sc://127.0.0.1:PORT``

    Raises
    ------
    RuntimeError
        It ended, or did not listen after START_SECONDS; the message has the end of its log.
    """
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            _command(folder), cwd=folder, env={**plain_environment(), "PYSPARK_PYTHON": str(_bare_python(folder))},
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield f"sc://127.0.0.1:{_port(server, log)}"
    finally:
        server.terminate()
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(END_SECONDS)


def _command(folder: Path) -> list[str]:
    # spark-submit ends in `exec java`, so the process started is the JVM itself; start-connect-server.sh would leave
    # a daemon. Port 0: the system picks a free one.
    properties = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": "0",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.local.dir": str(folder),
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.sql.shuffle.partitions": "4",
        "spark.barrier.sync.timeout": "300",
    }
    return [
        str(Path(pyspark.__file__).parent / "bin" / "spark-submit"),
        "--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "--master", "local[2]",
        "--driver-memory", "1g", "--driver-java-options", f"-Djava.io.tmpdir={folder}",
        *(word for name, value in properties.items() for word in ("--conf", f"{name}={value}")),
    ]  # fmt: skip


def _port(server: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        if found := _STARTED.search(log.read_text()):
            return found.group(1)
        time.sleep(0.2)
    raise RuntimeError(f"no Spark Connect server (exit code {server.poll()}):\n{log.read_text()[-2000:]}")


def _bare_python(folder: Path) -> Path:
    """A Python that sees what is installed but not this project: -S leaves out the editable install."""
    path = folder / "python"
    site = Path(pyspark.__file__).parents[1]  # this environment's own folder, or one that a .pth names
    path.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return path


def code_zip(path: Path) -> Path:
    """What `make dist` makes for executors, of the files as they are now."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted([*(REPOSITORY / "pipeline").rglob("*"), *(REPOSITORY / "models").rglob("*")]):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(REPOSITORY))
    return path


def plain_environment() -> Mapping[str, str]:
    """This process's environment without what a session in it, or its user, has set for Spark and Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARK_", "PYSPARK_", "PYTHON"))}
    return {**kept, "SPARK_LOCAL_IP": "127.0.0.1"}
