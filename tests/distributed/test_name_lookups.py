"""No rank waits for a nameserver: in a network of its own, with one that never answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from debian import need, skip_unless_ci

RANKS_JOIN = """
import socket, threading

nameserver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
nameserver.bind(("127.0.0.1", 53))
nameserver.setblocking(False)

def asked():
    questions = []
    while True:
        try:
            questions.append(nameserver.recv(512))
        except BlockingIOError:
            return questions

from pipeline.cluster.store import connected_store, listening_socket, open_store
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.interfaces import Endpoint

endpoints, workers = [Endpoint("127.0.0.1")] * 2, WorkerSettings(count=2)
listener = listening_socket("127.0.0.1")
port = listener.getsockname()[1]
first = open_store(listener, 2, workers)
other = threading.Thread(target=connected_store, args=(None, 1, endpoints, port, workers))
other.start()
connected_store(first, 0, endpoints, port, workers)
other.join()
print("asked by ranks:", len(asked()))
try:
    socket.getnameinfo(("10.9.8.7", 80), socket.NI_NUMERICSERV)
except socket.gaierror:  # nobody has answered
    pass
print("asked by this test:", len(asked()))
"""


@pytest.fixture
def enter(tmp_path) -> list[str]:
    """The words that, put before a command, let it run with a nameserver at its own loopback address."""
    need("ip", package="iproute2")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    mounts = [f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("resolv.conf", "nsswitch.conf")]
    words = ["unshare", "--net", "--mount", "sh", "-c", " && ".join(["ip link set lo up", *mounts, 'exec "$0" "$@"'])]
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        skip_unless_ci(f"no network of its own with a nameserver: {tried.stderr.strip()}")
    return words


def test_ranks_that_join_ask_no_nameserver(enter):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*enter, sys.executable, "-c", RANKS_JOIN]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["asked by ranks: 0", "asked by this test: 1"]
    assert "cannot be retrieved" not in done.stderr
