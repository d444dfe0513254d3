"""How ranks reach each other: rank 0's store, through which they join one process group, and part when all have ended.

Whether every rank reaches every other host is tried first: gloo waits for five times its timeout for a rank that does
not come through, and does not say for which.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.cluster.failures import GangBrokenError
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.interfaces import Endpoint

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# How long a rank tries to reach another one, whose sockets are open before any rank is told of them.
CONNECT_SECONDS = 30
# How much longer the others wait for it, so that the rank that cannot get through says so first.
CONNECT_GRACE_SECONDS = 5
# How long a rank that has ended waits for the others to end.
END_SECONDS = 30
# How long a port of the user's choice may still be held by the gang that was there before a restart.
PORT_SECONDS = 12

ADVICE = "look at the routes and firewalls between them"


def rendezvous_socket(address: str, port: int) -> socket.socket:
    """Where rank 0 listens, at an address of its host. Port 0: the system picks a free one, so two launches never race
    for the same.

    Raises
    ------
    ValueError
        ``workers.port`` cannot be opened.
    """
    give_up_at = time.monotonic() + PORT_SECONDS
    while True:  # a plain loop: executors have no tenacity
        try:
            return listening_socket(address, port)
        except OSError as error:
            if port == 0:
                raise
            if time.monotonic() > give_up_at:
                raise ValueError(
                    f"workers.port {port} cannot be opened on {address}: choose another, or 0 for a free one ({error})"
                ) from error
        time.sleep(0.5)


def listening_socket(address: str, port: int = 0) -> socket.socket:
    """A socket at a port, 0 for any free one. Nobody has to accept: the system answers those that try to connect."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)


def open_store(listener: socket.socket, world_size: int, workers: WorkerSettings) -> Any:
    """Rank 0's store at the port at which it listens; the socket belongs to the store from then on."""
    import torch.distributed as dist

    from pipeline.distributed.name_lookups import stop_name_lookups

    stop_name_lookups()
    address, port, *_ = listener.getsockname()
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=workers.collective_timeout_seconds),
        master_listen_fd=listener.detach(),
    )


def connected_store(
    store: dist.Store | None, rank: int, endpoints: Sequence[Endpoint], port: int, workers: WorkerSettings
) -> dist.Store:
    """Rank 0's store, once all ranks have reached it and each other's hosts; after a bounded time.

    Parameters
    ----------
    store : on rank 0, the store that it has opened
    port : of that store

    Raises
    ------
    ConnectionError
        This rank, or another one, does not get through; the message names both addresses.
    """
    if store is None:
        store = _reach_store(rank, endpoints, port)
    _reach_hosts(rank, endpoints)
    _wait_until_connected(store, rank, endpoints, port)
    store.set_timeout(timedelta(seconds=workers.collective_timeout_seconds))
    return store


def _reach_store(rank: int, endpoints: Sequence[Endpoint], port: int) -> dist.Store:
    import torch.distributed as dist

    from pipeline.distributed.name_lookups import stop_name_lookups

    stop_name_lookups()
    first, timeout = endpoints[0], timedelta(seconds=CONNECT_SECONDS)
    try:
        return dist.TCPStore(
            first.address, port, len(endpoints), is_master=False, wait_for_workers=False, timeout=timeout
        )
    except RuntimeError as error:  # torch's DistNetworkError
        raise ConnectionError(
            f"rank {rank} at {endpoints[rank]} cannot reach the rendezvous of rank 0 at {first.at(port)} "
            f"within {CONNECT_SECONDS} s: {ADVICE}; workers.port sets the port ({_first_line(error)})"
        ) from error


def _reach_hosts(rank: int, endpoints: Sequence[Endpoint]) -> None:
    for other, endpoint in enumerate(endpoints):
        if not endpoint.port or other == rank:
            continue
        try:
            _try_to_connect(endpoint)
        except OSError as error:
            raise ConnectionError(
                f"rank {rank} at {endpoints[rank]} cannot reach rank {other} at {endpoint.at(endpoint.port)} "
                f"within {CONNECT_SECONDS} s: {ADVICE}; workers connect to each other at ports that the system picks "
                f"({error})"
            ) from error


def _try_to_connect(endpoint: Endpoint) -> None:
    give_up_at = time.monotonic() + CONNECT_SECONDS
    while True:  # a host that does not answer in the network's own way is an error at once, and may be there soon
        try:
            socket.create_connection((endpoint.address, endpoint.port), CONNECT_SECONDS).close()
        except OSError:
            if time.monotonic() > give_up_at:
                raise
        else:
            return
        time.sleep(0.5)


def _wait_until_connected(store: dist.Store, rank: int, endpoints: Sequence[Endpoint], port: int) -> None:
    timeout = timedelta(seconds=CONNECT_SECONDS + CONNECT_GRACE_SECONDS)
    everyone = range(len(endpoints))
    try:
        store.set(f"connected/{rank}", "1")
        store.wait([f"connected/{other}" for other in everyone], timeout)
    except RuntimeError as error:  # the time is over, or rank 0 has left
        with contextlib.suppress(RuntimeError):
            missing = [other for other in everyone if not store.check([f"connected/{other}"])]
            who = ", ".join(f"rank {other} at {endpoints[other]}" for other in missing)
            raise ConnectionError(
                f"{who} did not get through to the others, and to the rendezvous of rank 0 at "
                f"{endpoints[0].at(port)}, within {timeout.seconds} s: {ADVICE}"
            ) from error
        raise ConnectionError(f"rank {rank} at {endpoints[rank]} lost rank 0 at {endpoints[0].at(port)}") from error


@contextlib.contextmanager
def joined_group(
    store: dist.Store, rank: int, endpoints: Sequence[Endpoint], device: torch.device, timeout: timedelta
) -> Iterator[None]:
    """Join the process group, and wait until all ranks are in it: one that had nothing to do would leave while another
    still connects.

    Raises
    ------
    GangBrokenError
        It could not be joined. torch counts groups, and a process that has failed to join one does not find the next:
        it must not be used again, as Spark would use it if this were a result.
    """
    from pipeline.distributed.worker import process_group

    world_size = len(endpoints)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(process_group(store, rank, world_size, device, timeout, endpoint=endpoints[rank]))
            store.set(f"joined/{rank}", "1")
            store.wait([f"joined/{other}" for other in range(world_size)], timeout)
        except Exception as error:
            others = ", ".join(f"rank {other} at {at}" for other, at in enumerate(endpoints) if other != rank)
            raise GangBrokenError(
                f"rank {rank} at {endpoints[rank]} could not join the process group with {others}: {_first_line(error)}"
            ) from error
        yield


def wait_for_all_ranks(store: dist.Store, rank: int, world_size: int) -> None:
    """Return when all ranks have ended, after a bounded time.

    A task that ends well just after another rank died would be missing from the gang that Spark starts then: Spark has
    its output, runs the other tasks alone, and they wait for it forever. So no rank ends before the others do; Spark
    ends those that wait for a dead one.

    Raises
    ------
    GangBrokenError
        Rank 0, which holds the store, is gone without having waited.
    """
    import torch.distributed as dist

    ranks = range(world_size)
    try:
        store.set(f"ended/{rank}", "1")
        store.wait([f"ended/{other}" for other in ranks], timedelta(seconds=END_SECONDS))
        store.set(f"left/{rank}", "1")  # rank 0 keeps the store open until all have seen that all have ended
        if rank == 0:
            store.wait([f"left/{other}" for other in ranks], timedelta(seconds=END_SECONDS))
    except dist.DistStoreError:  # the time is over: somebody hangs, which is the watch's business
        return
    except Exception as error:
        if rank > 0:
            raise GangBrokenError(f"rank {rank} lost rank 0: {error}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
