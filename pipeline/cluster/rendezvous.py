"""How the ranks of a gang find together before the function runs, and part when it has ended.

Rank 0 listens, and the others learn where (`rendezvous_address.py`). Every rank then tells all others its facts over
rank 0 (`gather.py`); what must be equal and is not is an error before step one. At the same port rank 0 opens the store
through which all join one process group (`store.py`).
"""

from __future__ import annotations

import ipaddress
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.cluster.failures import FailedError, Failure, GangBrokenError, failure_from
from pipeline.cluster.gather import FirstRankFailedError, gather_as_first, gather_from_first
from pipeline.cluster.introduction import Facts, Introduction, check_agreement, one_gpu_each, package_versions
from pipeline.cluster.rendezvous_address import AddressByBarrier, AddressExchange, AddressInStorage, RendezvousAddress
from pipeline.cluster.store import connected_store, listening_socket, open_store, rendezvous_socket
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.interfaces import Endpoint, find_endpoint
from pipeline.telemetry import heartbeat

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from pyspark import BarrierTaskContext


@dataclass
class RankState:
    """What a rank knows of itself while the gang finds together.

    Parameters
    ----------
    rank
        The number of this rank.
    hosts
        The host of every rank as the cluster knows it, in rank order.
    status
        What the rank is doing.
    device
        Where it trains; None before one was chosen.
    gpu
        The address of the GPU that Spark assigned, if it assigned one.
    endpoints
        Where every rank listens, in rank order; empty before all have said so.
    """

    rank: int
    hosts: Sequence[str]
    status: heartbeat.Status = field(default_factory=heartbeat.Status)
    device: torch.device | None = None
    gpu: str | None = None
    endpoints: Sequence[Endpoint] = ()

    @property
    def world_size(self) -> int:
        return len(self.hosts)

    @property
    def other_hosts(self) -> list[str]:
        """The hosts of other ranks that are not the one of this rank, in rank order."""
        return [host for host in dict.fromkeys(self.hosts) if host != self.hosts[self.rank]]

    @property
    def local_rank(self) -> int:
        return self.hosts[: self.rank].count(self.hosts[self.rank])

    @property
    def local_world_size(self) -> int:
        return self.hosts.count(self.hosts[self.rank])

    def failure(self, error: BaseException, *, echo: bool = False) -> Failure:
        """The failure of this rank that an exception stands for."""
        return failure_from(
            error, rank=self.rank, device=str(self.device or ""), where=str(self.status.position), echo=echo
        )


def host_of(task_address: str) -> str:
    """The host in Spark's address of a task, ``host:port`` or ``[IPv6 address]:port``."""
    host = (task_address.rpartition(":")[0] or task_address).strip("[]").partition("%")[0]
    with suppress(ValueError):  # a name
        return str(ipaddress.ip_address(host))  # Java writes all zeros of an IPv6 address
    return host


# How long ranks wait for each other at least: some import torch from a cold disk, others have it.
LEAST_WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class Launch:
    """What a rank is launched with, as far as finding the others is concerned.

    Parameters
    ----------
    id
        Of the launch; Spark may start several gangs for it, one after the other.
    folder
        The folder of the job; None for a function that has none.
    is_shared
        Whether all ranks are known to see the folder.
    """

    id: str
    folder: str | None = None
    is_shared: bool = True

    def address_exchange(self, context: BarrierTaskContext, seconds: float) -> AddressExchange:
        """How a rank learns where rank 0 listens. ``seconds`` is how long rank 0 waits for the others."""
        if self.folder is None or not self.is_shared:
            return AddressByBarrier(context)
        return AddressInStorage(self.folder, self.id, first_task(context), seconds)


def first_task(context: BarrierTaskContext) -> int:
    """Spark's number of rank 0's task: it starts a gang's tasks together, and numbers them in rank order."""
    return int(context.taskAttemptId()) - int(context.partitionId())


@dataclass
class _Own:
    """What this rank brings to the exchange: on rank 0 a socket at which the others find it."""

    introduction: Introduction
    listener: socket.socket | None = None
    error: BaseException | None = None


def exchange_facts(
    context: BarrierTaskContext,
    me: RankState,
    workers: WorkerSettings,
    facts_of_function: Callable[[], Facts],
    launch: Launch,
) -> tuple[dist.Store, heartbeat.Attempt]:
    """Tell all ranks who this one is, and hear who they are.

    Every rank takes part in the exchange, also one that has failed: the others learn of it here instead of waiting.

    Returns
    -------
    store, attempt
        The store that all ranks share, and this gang's number and id.

    Raises
    ------
    FailedError
        This rank cannot take part, or another one cannot.
    ValueError
        The ranks disagree, or two of them have the same GPU.
    ConnectionError
        A rank does not reach another one; the message names both addresses.
    GangBrokenError
        A rank has died meanwhile, or this one can neither take part nor tell the others so.
    """
    with ExitStack() as sockets:  # open until all ranks have reached each other
        own = _own(context, me, workers, facts_of_function, launch, sockets)
        introductions = _introduce_all(context, me, own, workers, launch)
        check_agreement([other.facts for other in introductions], me.hosts)
        one_gpu_each([other.gpu for other in introductions], me.hosts)
        me.endpoints = [other.endpoint for other in introductions if other.endpoint is not None]
        first = introductions[0]
        assert first.port is not None, "rank 0 names the port of its store"
        # Only now, when all ranks are known to be able to: a connection that fails must not leave the others waiting.
        store = None if own.listener is None else open_store(own.listener, me.world_size, workers)
        store = connected_store(store, me.rank, me.endpoints, first.port, workers)
        return store, first.attempt or heartbeat.Attempt(1, "")


def _own(
    context: BarrierTaskContext,
    me: RankState,
    workers: WorkerSettings,
    facts_of_function: Callable[[], Facts],
    launch: Launch,
    sockets: ExitStack,
) -> _Own:
    """What can fail on one rank alone: imports, device, address, facts and, on rank 0, the port."""
    try:
        introduction = _introduction(context, me, workers, facts_of_function, sockets)
        if me.rank > 0:
            return _Own(introduction)
        assert introduction.endpoint is not None, "a rank that can take part has an endpoint"
        listener = sockets.enter_context(rendezvous_socket(introduction.endpoint.address, workers.port))
        attempt = heartbeat.next_attempt(launch.folder) if launch.folder is not None else None
        return _Own(replace(introduction, port=listener.getsockname()[1], attempt=attempt), listener)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told to the other ranks first, then to the driver
        return _Own(Introduction(error=str(error)), error=error)


def _introduce_all(
    context: BarrierTaskContext, me: RankState, own: _Own, workers: WorkerSettings, launch: Launch
) -> list[Introduction]:
    """The introductions of all ranks, none of which has an error."""
    if me.world_size > 1:
        seconds = max(workers.collective_timeout_seconds, LEAST_WAIT_SECONDS)
        exchange = launch.address_exchange(context, seconds)
        if own.error is not None and not _can_tell(exchange):
            raise GangBrokenError(f"{type(own.error).__name__}: {own.error}") from own.error
        if me.rank == 0:
            texts = _texts_on_first(me, own, exchange, RendezvousAddress(launch.id, first_task(context)))
        else:
            texts = _texts_on_others(me, own, exchange, seconds)
    if own.error is not None:
        raise FailedError(me.failure(own.error)) from own.error
    introductions = [Introduction.from_json(text) for text in texts] if me.world_size > 1 else [own.introduction]
    if any(other.error is not None for other in introductions):
        raise FailedError(me.failure(RuntimeError("another rank failed before the start"), echo=True))
    return introductions


def _can_tell(exchange: AddressExchange) -> bool:
    """Whether the others will hear of this rank. Where not, its task has to fail: Spark then ends theirs."""
    try:
        return exchange.is_shared()
    except OSError:
        return False


def _texts_on_first(me: RankState, own: _Own, exchange: AddressExchange, address: RendezvousAddress) -> Sequence[str]:
    if own.listener is None:
        exchange.publish(replace(address, error=own.introduction.error))
        return ()
    host, port, *_ = own.listener.getsockname()
    address = replace(address, token=uuid.uuid4().hex, address=host, port=port)

    def end_if_unreachable() -> None:
        with suppress(OSError), storage.retry_for(0):
            if exchange.read_unreachable(address) is not None:
                raise FailedError(me.failure(RuntimeError("another rank cannot reach this one"), echo=True))

    exchange.publish(address)
    try:
        return gather_as_first(
            own.listener, own.introduction.to_json(), me.hosts,
            token=address.token, seconds=exchange.seconds, check=end_if_unreachable,
        )  # fmt: skip
    except GangBrokenError:
        raise
    except Exception as error:
        with suppress(OSError), storage.retry_for(0):  # for those that have not come yet
            exchange.publish(replace(address, error=str(error)))
        raise


def _texts_on_others(me: RankState, own: _Own, exchange: AddressExchange, seconds: float) -> Sequence[str]:
    at = str(own.introduction.endpoint or me.hosts[me.rank])
    try:
        return gather_from_first(exchange, me.rank, own.introduction.to_json(), me=at, seconds=seconds)
    except (FirstRankFailedError, ConnectionError) as error:
        if own.error is not None:
            return ()  # its own error is the one to show
        if isinstance(error, FirstRankFailedError):
            raise FailedError(me.failure(error, echo=True)) from error
        raise


def _introduction(
    context: BarrierTaskContext,
    me: RankState,
    workers: WorkerSettings,
    facts_of_function: Callable[[], Facts],
    sockets: ExitStack,
) -> Introduction:
    import torch

    from pipeline.distributed.device import choose_device, try_device
    from pipeline.distributed.host_memory import keep_freed_memory
    from pipeline.distributed.worker import default_backend

    torch.set_num_threads(workers.threads)
    keep_freed_memory()
    assigned = context.resources().get("gpu")
    me.gpu = assigned.addresses[0] if assigned else None
    # A GPU that Spark did not assign belongs to somebody else, so `auto` leaves it alone.
    requested = "cpu" if workers.device == "auto" and me.gpu is None else workers.device
    me.device = choose_device(requested, me.gpu, me.local_rank)
    try_device(me.device, me.rank)
    facts = {**package_versions(), "device": me.device.type, **facts_of_function()}
    endpoint = find_endpoint(me.hosts[me.rank], me.other_hosts, default_backend(me.device))
    if me.other_hosts and me.local_rank == 0:
        endpoint = replace(endpoint, port=sockets.enter_context(listening_socket(endpoint.address)).getsockname()[1])
    return Introduction(facts, me.gpu, endpoint)
