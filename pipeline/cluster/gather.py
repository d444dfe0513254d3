"""Every rank of a gang hears one text of each other rank, over sockets that rank 0 accepts. Neither Spark nor torch.

A message is one line of JSON. Rank r connects to rank 0 and sends ``{token, rank, text}``; when all have, rank 0 sends
every one of them ``{texts}``, or ``{error}`` if it gives up. A rank whose process dies closes its connection, which
tells rank 0 at once; and a rank that loses rank 0 knows that its gang has come to an end.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pipeline.cluster.failures import GangBrokenError
from pipeline.cluster.rendezvous_address import AddressExchange, RendezvousAddress
from pipeline.cluster.store import ADVICE, CONNECT_GRACE_SECONDS, CONNECT_SECONDS

# The pauses in which another rank looks for rank 0's address, which only on remote storage costs something, and rank 0
# for a rank that does not get through to it.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _LONGEST_REMOTE_PAUSE_SECONDS = 0.05, 0.2, 1.0
_FIRST_REPORT_SECONDS, _LONGEST_REPORT_SECONDS = 1.0, 5.0
# For how long an address that is of another gang, by Spark's numbers, is left alone: a worker whose task was ended
# lives for two seconds more and must neither be joined nor join. Where Spark numbers otherwise it is tried afterwards.
OTHER_GANG_SECONDS = 5.0
# One try to connect, of several.
_TRY_SECONDS = 5.0
_SEND_SECONDS = 10.0
# No text is as long as this; what a stranger sends is not kept.
_LONGEST_LINE = 16 << 20
_PIECE = 1 << 16


class FirstRankFailedError(RuntimeError):
    """Rank 0 does not take part, and its own failure says why."""


def gather_as_first(
    listener: socket.socket,
    text: str,
    hosts: Sequence[str],
    *,
    token: str,
    seconds: float,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """The texts of all ranks in rank order, on rank 0.

    Parameters
    ----------
    listener
        Where the other ranks connect; it stays open.
    text
        Of rank 0.
    hosts
        The host of every rank, for the error.
    token
        Who does not send it is a stranger, and is not answered.
    seconds
        How long the others are waited for.
    check
        Called now and then while rank 0 waits; what it raises ends the wait.

    Raises
    ------
    ConnectionError
        Not all ranks have come; those that have not are named.
    GangBrokenError
        A rank that had come is gone.
    """
    gathering = _Gathering(listener, text, hosts, token)
    try:
        gathering.wait(seconds, check)
    except GangBrokenError:
        raise  # the others see that their connections are closed
    except Exception as error:
        gathering.answer({"error": str(error)})
        raise
    else:
        texts = gathering.texts_in_order()
        gathering.answer({"texts": texts})
        return texts
    finally:
        gathering.close()


class _Gathering:
    """The connections of the other ranks to rank 0, and what has come over them so far."""

    def __init__(self, listener: socket.socket, text: str, hosts: Sequence[str], token: str):
        self._listener, self._hosts, self._token = listener, hosts, token
        self._texts = {0: text}
        self._received: dict[socket.socket, bytearray] = {}
        self._ranks: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, seconds: float, check: Callable[[], None]) -> None:
        """Return when all ranks have sent their texts."""
        give_up_at = time.monotonic() + seconds
        pause = _FIRST_REPORT_SECONDS
        check_at = time.monotonic() + pause
        while len(self._texts) < len(self._hosts):
            for key, _ in self._selector.select(max(0.0, min(give_up_at, check_at) - time.monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._receive(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() >= check_at:
                check()
                pause = min(2 * pause, _LONGEST_REPORT_SECONDS)
                check_at = time.monotonic() + pause
            if time.monotonic() >= give_up_at:
                raise ConnectionError(self._missing(seconds))

    def texts_in_order(self) -> list[str]:
        return [self._texts[rank] for rank in range(len(self._hosts))]

    def answer(self, message: dict[str, object]) -> None:
        """Send a line to every rank that has come. One that is gone meanwhile is noticed when all join."""
        line = json.dumps(message).encode() + b"\n"
        for connection in self._ranks:
            with suppress(OSError):
                connection.settimeout(_SEND_SECONDS)
                connection.sendall(line)

    def close(self) -> None:
        self._selector.close()
        for connection in self._received:
            connection.close()
        self._listener.setblocking(True)

    def _accept(self) -> None:
        with suppress(OSError):  # who wanted to connect is gone
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._received[connection] = bytearray()
            self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        received = self._received[connection]
        received += data
        if not data or len(received) > _LONGEST_LINE:
            self._drop(connection)
        elif connection not in self._ranks and received.endswith(b"\n"):
            self._introduce(connection, bytes(received))

    def _introduce(self, connection: socket.socket, line: bytes) -> None:
        try:
            message = json.loads(line)
            is_ours = message["token"] == self._token
            rank, text = (int(message["rank"]), str(message["text"])) if is_ours else (0, "")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # a stranger writes what it likes
            rank, text = 0, ""
        if not 0 < rank < len(self._hosts):
            self._drop(connection)
        else:
            self._ranks[connection], self._texts[rank] = rank, text

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._received[connection]
        rank = self._ranks.pop(connection, None)
        if rank is not None:
            raise GangBrokenError(f"rank {rank} on {self._hosts[rank]} was lost while the ranks found together")

    def _missing(self, seconds: float) -> str:
        missing = [rank for rank in range(len(self._hosts)) if rank not in self._texts]
        who = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in missing)
        host, port, *_ = self._listener.getsockname()
        return f"{who} did not come to the rendezvous of rank 0 at {host}, port {port}, within {seconds:g} s: {ADVICE}"


def gather_from_first(exchange: AddressExchange, rank: int, text: str, *, me: str, seconds: float) -> list[str]:
    """The texts of all ranks in rank order, on a rank that is not the first.

    Parameters
    ----------
    text
        Of this rank.
    me
        Where this rank listens, for the error.
    seconds
        How long rank 0's address is waited for, and then the others.

    Raises
    ------
    ConnectionError
        Rank 0 has published no address, or cannot be reached there, which it is told.
    FirstRankFailedError
        Rank 0 has failed, or given up.
    GangBrokenError
        Rank 0 is gone.
    """
    connection, address = _connect(exchange, rank, me, seconds)
    with connection:
        message = {"token": address.token, "rank": rank, "text": text}
        answer = b""
        with suppress(OSError):  # and then the answer is not whole
            connection.settimeout(exchange.seconds + CONNECT_GRACE_SECONDS)
            connection.sendall(json.dumps(message).encode() + b"\n")
            answer = _read_line(connection)
    if not answer.endswith(b"\n"):
        raise GangBrokenError(f"rank {rank} at {me} lost rank 0 at {address} while the ranks found together")
    told = json.loads(answer)
    if "error" in told:
        raise FirstRankFailedError(told["error"])
    return told["texts"]


def _read_line(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(_PIECE):
        pieces.append(piece)
        if piece.endswith(b"\n"):
            break
    return b"".join(pieces)


def _connect(exchange: AddressExchange, rank: int, me: str, seconds: float) -> tuple[socket.socket, RendezvousAddress]:
    """A connection to rank 0, once it listens; its address is read again and again meanwhile."""
    give_up_at = time.monotonic() + seconds
    pause, longest = (
        _FIRST_PAUSE_SECONDS,
        _LONGEST_REMOTE_PAUSE_SECONDS if exchange.is_remote else _LONGEST_PAUSE_SECONDS,
    )
    seen_at: dict[str, float] = {}
    while True:
        address = exchange.newest()
        if address is not None and address.error is not None:
            raise FirstRankFailedError(address.error)
        if address is not None:
            seen = seen_at.setdefault(address.token, time.monotonic())
            mine = exchange.is_of_this_gang(address)
            if mine or time.monotonic() - seen > OTHER_GANG_SECONDS:
                try:
                    return socket.create_connection((address.address, address.port), _TRY_SECONDS), address
                except OSError as error:
                    # An earlier gang's address, at which nobody listens any more, is going to be replaced.
                    if time.monotonic() > (seen + CONNECT_SECONDS if mine else give_up_at):
                        raise _unreachable(exchange, rank, me, address, error) from error
        if time.monotonic() > give_up_at:
            raise ConnectionError(f"rank {rank} at {me} was not told within {seconds:g} s where rank 0 listens")
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _unreachable(
    exchange: AddressExchange, rank: int, me: str, address: RendezvousAddress, error: OSError
) -> ConnectionError:
    text = (
        f"rank {rank} at {me} cannot reach the rendezvous of rank 0 at {address} within {CONNECT_SECONDS} s: "
        f"{ADVICE}; workers.port sets the port ({error})"
    )
    with suppress(OSError):  # rank 0 then waits until its own time is over
        exchange.report_unreachable(address, text)
    return ConnectionError(text)
