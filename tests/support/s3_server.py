"""A real S3 server on this machine, behind a proxy that can make faults.

Its address and the keys to it are in the environment of the tests from their start, since executors of Spark inherit
that of the JVM, which several tests share.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import fsspec
from fault_proxy import FaultProxy
from mlflow_server import free_port

START_SECONDS = 60.0
# Anything will do as keys. One attempt: what botocore does not try again, sparknorm has to.
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "only-for-tests",
    "AWS_SECRET_ACCESS_KEY": "only-for-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
}


def reserve_address() -> socket.socket:
    """Take a port of the loopback address for the proxy, and say so in the environment."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    os.environ |= {**_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
    return listener


class S3Server:
    """moto's server as a process of its own, its log in ``folder``; requests come through `faults`.

    faults : the proxy; without being told otherwise, it makes none
    """

    def __init__(self, folder: Path, listener: socket.socket):
        port = free_port()
        self._log = folder / "s3.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        give_up_at = time.monotonic() + START_SECONDS
        while not self._answers(port):
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self._process.kill()
                raise RuntimeError(f"no S3 server: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.faults = FaultProxy(listener, port)

    def _answers(self, port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                return True
        except OSError:
            return False

    def new_bucket(self) -> str:
        """The address of a new, empty bucket."""
        name = f"test-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(name)
        return f"s3://{name}"

    def close(self) -> None:
        self.faults.close()
        self._process.kill()
        self._process.wait(timeout=30)
