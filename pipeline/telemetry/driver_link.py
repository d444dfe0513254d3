"""Signs of life that ranks give straight to the driver, where it can be reached: no object store is asked for them.

A rank connects for each beat, sends it as a line and waits for the answer: nothing stays open that could break, and the
driver serves ranks that come and go. One that gets no answer, since a firewall is between them or the driver is
gone, says so in storage (`heartbeat.py`), and tries again after a while.
"""

from __future__ import annotations

import hmac
import json
import logging
import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)

# One connection takes so long at most, on either side.
TELL_SECONDS = 2.0
# A rank that did not get through leaves the driver alone for so long.
AGAIN_SECONDS = 60.0
# The driver looks so often whether it is to listen no more.
_END_LOOK_SECONDS = 0.1
# No beat is as long as this, with the stacks of all threads in it.
_LONGEST_LINE = 4 << 20
_HEARD = b"heard\n"


@dataclass(frozen=True)
class DriverAddress:
    """Where the driver listens during one launch.

    host : its name or address, as executors know it
    token : who does not send it is a stranger, and is not answered
    """

    host: str
    port: int
    token: str


class DriverLink:
    """The way of one rank to its driver.

    address : None where the driver does not listen
    """

    def __init__(self, address: DriverAddress | None):
        self._address, self._again_at = address, 0.0

    def tell(self, beat: str) -> bool:
        """Whether the driver has this beat now; the call takes 2 s at most for each thing that it waits for."""
        if self._address is None or time.monotonic() < self._again_at:
            return False
        if _tell(self._address, beat):
            return True
        self._again_at = time.monotonic() + AGAIN_SECONDS
        return False


def _tell(driver: DriverAddress, beat: str) -> bool:
    message = json.dumps({"token": driver.token, "beat": beat}).encode() + b"\n"
    try:
        with socket.create_connection((driver.host, driver.port), TELL_SECONDS) as connection:
            connection.sendall(message)
            return connection.recv(len(_HEARD)) == _HEARD
    except OSError as error:
        log.debug("the driver cannot be told at %s, port %d: %s", driver.host, driver.port, error)
        return False


@contextmanager
def listening(host: str, bind_address: str, hear: Callable[[str], None]) -> Iterator[DriverAddress | None]:
    """Listen for beats, as the driver, while the block runs.

    Parameters
    ----------
    host : name or address by which executors know the driver
    bind_address : at which it listens, at any free port; an IPv6 address may be in brackets, as Spark writes it
    hear : called with each beat, from several threads; a ValueError says that it is none

    Returns
    -------
    What ranks need to know; None where the driver cannot listen there.
    """
    host, bind_address, token = host.strip("[]"), bind_address.strip("[]"), uuid.uuid4().hex
    try:
        server = _Server(bind_address, token, hear)
    except OSError as error:
        log.debug("the driver cannot listen for signs of life at %s: %s", bind_address, error)
        yield None
        return
    thread = threading.Thread(
        target=server.serve_forever, args=(_END_LOOK_SECONDS,), name="sparknorm-beats", daemon=True
    )
    thread.start()
    try:
        yield DriverAddress(host, server.server_address[1], token)
    finally:
        server.shutdown()
        server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = socket.SOMAXCONN

    def __init__(self, bind_address: str, token: str, hear: Callable[[str], None]):
        self.address_family = socket.AF_INET6 if ":" in bind_address else socket.AF_INET
        self.token, self.hear = token, hear
        super().__init__((bind_address, 0), _Beat)

    def handle_error(self, request: object, client_address: object) -> None:
        """A rank that breaks off, or a stranger, is no error of the driver's: the rank says it in storage."""
        log.debug("a sign of life from %s was lost", client_address, exc_info=True)


class _Beat(socketserver.StreamRequestHandler):
    """Hears one beat and says so; what is none, or comes from a stranger, is not answered."""

    timeout = TELL_SECONDS
    server: _Server

    def handle(self) -> None:
        message = json.loads(self.rfile.readline(_LONGEST_LINE))
        if hmac.compare_digest(str(message["token"]).encode(), self.server.token.encode()):
            self.server.hear(message["beat"])
            self.wfile.write(_HEARD)
