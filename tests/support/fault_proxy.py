"""A proxy in front of an S3 server that answers some requests as a store does on a bad day.

Which requests, a seed decides: each fault comes as a spell, some requests for the same object long, so that it outlasts
what drivers try again by themselves.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_ERRORS = {
    "slow_down": (503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    "unavailable": (503, "Service Unavailable", "ServiceUnavailable", "Service Unavailable"),
    "internal": (500, "Internal Server Error", "InternalError", "We encountered an internal error."),
    "expired": (400, "Bad Request", "ExpiredToken", "The provided token has expired."),
    "unknown_key": (403, "Forbidden", "InvalidAccessKeyId", "The key is not in our records."),
    "forbidden": (403, "Forbidden", "AccessDenied", "Access Denied"),
}
KINDS = ("slow_down", "unavailable", "internal", "expired", "reset", "answer_lost", "cut", "slow")
_SLOW_SECONDS = 0.3  # for the second half of a body


@dataclass
class _Faults:
    """What to do to whom. ``share`` of the requests begin a spell of one to ``longest`` requests for their object."""

    random: random.Random = field(default_factory=random.Random)
    share: float = 0.0
    longest: int = 1
    kinds: tuple[str, ...] = KINDS
    only: str = ""  # a pattern of methods and paths
    down_until: float = 0.0
    spells: dict[str, list[str]] = field(default_factory=dict)

    def next(self, method: str, path: str) -> str:
        """The fault of one request; "" for none."""
        if time.monotonic() < self.down_until:
            return "unavailable"
        if not re.search(self.only, f"{method} {path}"):
            return ""
        spell = self.spells.setdefault(path, [])
        if not spell and self.random.random() < self.share:
            spell += self.random.choices(self.kinds, k=self.random.randint(1, self.longest))
        return spell.pop() if spell else ""


class Request(NamedTuple):
    """One request that came.

    kind : its method, or ``LIST`` for a page of a listing
    path : of the object, or of the folder that is listed
    at : time.monotonic(), in seconds
    """

    kind: str
    path: str
    at: float


class FaultProxy:
    """Listens on a bound socket, in a thread of its own, and passes requests on to a port of this machine.

    made : faults made so far, by kind
    requests : all that came, in their order
    """

    def __init__(self, listener: socket.socket, port: int):
        self._port, self._listener = port, listener
        self._faults = _Faults()
        self.made: collections.Counter[str] = collections.Counter()
        self.requests: list[Request] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, sock=self._listener)

    @contextlib.contextmanager
    def at_random(
        self, seed: int, share: float, *, longest: int = 1, kinds: tuple[str, ...] = KINDS, only: str = ""
    ) -> Iterator[collections.Counter[str]]:
        """Make faults within this context, and count them."""
        self.made.clear()
        self._faults = _Faults(random.Random(seed), share, longest, kinds, only)
        try:
            yield self.made
        finally:
            self._faults = _Faults()

    def down(self, seconds: float) -> None:
        """From now on, and for so long, there is no service."""
        self._faults.down_until = time.monotonic() + seconds

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, after which the connection is closed."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, path, _ = head.split(" ", 2)
            if re.search(r"(?i)\r\nexpect: *100-continue", head):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = re.search(r"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            path, _, query = path.partition("?")
            self.requests.append(_request(method, path, query))
            fault = self._faults.next(method, path)
            self.made.update([fault] if fault else [])
            if fault in _ERRORS:
                writer.write(_error(fault, with_body=method != "HEAD"))
            elif fault != "reset":
                await self._pass_on(head, body, writer, fault)
            if fault in ("reset", "answer_lost", "cut"):  # closed with bytes to send lost, it is reset
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                await writer.drain()
        writer.close()

    async def _pass_on(self, head: str, body: bytes, writer: asyncio.StreamWriter, fault: str) -> None:
        head = re.sub(r"(?i)\r\n(connection|expect):[^\r]*", "", head)
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._port)
        upstream.write(head.replace("\r\n", "\r\nConnection: close\r\n", 1).encode("latin-1") + body)
        answer = await upstream_reader.read()
        upstream.close()
        start = answer.find(b"\r\n\r\n") + 4
        half = start + (len(answer) - start) // 2
        if fault == "answer_lost":  # the server did as it was told, and nobody knows
            return
        writer.write(answer[:half])
        if fault in ("cut", "slow"):
            await writer.drain()
            await asyncio.sleep(_SLOW_SECONDS if fault == "slow" else 0)
        if fault != "cut":
            writer.write(answer[half:])


def _request(method: str, path: str, query: str) -> Request:
    if method != "GET" or "list-type=" not in query:
        return Request(method, path, time.monotonic())
    prefix = urllib.parse.parse_qs(query).get("prefix", [""])[0]
    return Request("LIST", f"{path.rstrip('/')}/{prefix}", time.monotonic())


def _error(fault: str, *, with_body: bool) -> bytes:
    number, reason, code, message = _ERRORS[fault]
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>' if with_body else ""
    head = f"HTTP/1.1 {number} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()
