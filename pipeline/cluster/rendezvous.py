"""How the ranks of a gang find together before the function runs, and part when it has ended.

Every rank tells all others its facts through Spark's barrier; what must be equal and is not is an error before step
one. Rank 0 opens the store through which all then join one process group (`store.py`).
"""

from __future__ import annotations

import ipaddress
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.cluster.failures import FailedError, Failure, failure_from
from pipeline.cluster.store import connected_store, listening_socket, open_store
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.interfaces import Endpoint, find_endpoint
from pipeline.telemetry import heartbeat

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from pyspark import BarrierTaskContext

# Names and JSON values of what all ranks must see alike.
Facts = Mapping[str, object]


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


@dataclass(frozen=True)
class Introduction:
    """What one rank tells all others.

    ``endpoint`` is where it listens. ``port`` and ``attempt`` come from rank 0: the port of its store, and the number
    and id of this gang where the job has a folder. A rank that cannot take part has an ``error`` and nothing else.
    """

    facts: Facts = field(default_factory=dict)
    gpu: str | None = None
    endpoint: Endpoint | None = None
    port: int | None = None
    attempt: heartbeat.Attempt | None = None
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Introduction:
        fields = json.loads(text)
        for name, part in (("attempt", heartbeat.Attempt), ("endpoint", Endpoint)):
            fields[name] = part(**fields[name]) if fields[name] else None
        return cls(**fields)


def host_of(task_address: str) -> str:
    """The host in Spark's address of a task, ``host:port`` or ``[IPv6 address]:port``."""
    host = (task_address.rpartition(":")[0] or task_address).strip("[]").partition("%")[0]
    with suppress(ValueError):  # a name
        return str(ipaddress.ip_address(host))  # Java writes all zeros of an IPv6 address
    return host


def exchange_facts(
    context: BarrierTaskContext,
    me: RankState,
    workers: WorkerSettings,
    facts_of_function: Callable[[], Facts],
    folder: str | None,
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
    """
    with ExitStack() as sockets:  # open until all ranks have reached each other
        store, introductions = _introduce_all(
            context, me, lambda: _introduction(context, me, workers, facts_of_function, folder, sockets)
        )
        check_agreement([other.facts for other in introductions], me.hosts)
        one_gpu_each([other.gpu for other in introductions], me.hosts)
        me.endpoints = [other.endpoint for other in introductions if other.endpoint is not None]
        first = introductions[0]
        assert first.port is not None, "rank 0 names the port of its store"
        # Only now, when all ranks are known to be able to: a connection that fails must not leave the others waiting.
        store = connected_store(store, me.rank, me.endpoints, first.port, workers)
        return store, first.attempt or heartbeat.Attempt(1, "")


def _introduce_all(
    context: BarrierTaskContext, me: RankState, introduce: Callable[[], tuple[dist.Store | None, Introduction]]
) -> tuple[dist.Store | None, list[Introduction]]:
    """Rank 0's store, on rank 0, and the introductions of all ranks."""
    store, error = None, None
    try:
        store, introduction = introduce()
        text = introduction.to_json()
    except (Exception, SystemExit) as raised:  # noqa: BLE001 - told to the other ranks first, then to the driver
        error, text = raised, Introduction(error=str(raised)).to_json()
    # Spark looks once a second whether all have spoken, which one rank alone need not wait for.
    texts = context.allGather(text) if me.world_size > 1 else [text]
    introductions = [Introduction.from_json(other) for other in texts]
    if error is not None:
        raise FailedError(me.failure(error)) from error
    if any(other.error is not None for other in introductions):
        raise FailedError(me.failure(RuntimeError("another rank failed before the start"), echo=True))
    return store, introductions


def _introduction(
    context: BarrierTaskContext,
    me: RankState,
    workers: WorkerSettings,
    facts_of_function: Callable[[], Facts],
    folder: str | None,
    sockets: ExitStack,
) -> tuple[dist.Store | None, Introduction]:
    """What can fail on one rank alone: imports, device, address, facts and, on rank 0, the store."""
    import torch

    from pipeline.distributed.device import choose_device, try_device
    from pipeline.distributed.worker import default_backend

    torch.set_num_threads(workers.threads)
    assigned = context.resources().get("gpu")
    me.gpu = assigned.addresses[0] if assigned else None
    # A GPU that Spark did not assign belongs to somebody else, so `auto` leaves it alone.
    requested = "cpu" if workers.device == "auto" and me.gpu is None else workers.device
    me.device = choose_device(requested, me.gpu, me.local_rank)
    try_device(me.device, me.rank)
    facts = {**_versions(), "device": me.device.type, **facts_of_function()}
    endpoint = find_endpoint(me.hosts[me.rank], me.other_hosts, default_backend(me.device))
    if me.other_hosts and me.local_rank == 0:
        endpoint = replace(endpoint, port=sockets.enter_context(listening_socket(endpoint.address)).getsockname()[1])
    if me.rank > 0:
        return None, Introduction(facts, me.gpu, endpoint)
    store = open_store(endpoint.address, me.world_size, workers)
    attempt = heartbeat.next_attempt(folder) if folder is not None else None
    return store, Introduction(facts, me.gpu, endpoint, store.port, attempt)


def check_agreement(facts: Sequence[Facts], hosts: Sequence[str]) -> None:
    """Raise ValueError where a rank's facts are not those of rank 0, naming the fact and both values."""
    for name in sorted({name for rank_facts in facts for name in rank_facts}):
        for rank, rank_facts in enumerate(facts):
            if rank_facts.get(name) != facts[0].get(name):
                raise ValueError(
                    f"ranks disagree about {name}: rank 0 on {hosts[0]} has {facts[0].get(name)}, "
                    f"rank {rank} on {hosts[rank]} has {rank_facts.get(name)}"
                )


def one_gpu_each(gpus: Sequence[str | None], hosts: Sequence[str]) -> None:
    """Raise ValueError where two ranks of a host have the same GPU: NCCL would refuse them later, in its own words."""
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, gpu) in enumerate(zip(hosts, gpus, strict=True)):
        if gpu is not None and (other := owners.setdefault((host, gpu), rank)) != rank:
            raise ValueError(
                f"ranks {other} and {rank} on {host} were both assigned GPU {gpu}: set workers.task_gpus=1"
            )


def _versions() -> dict[str, str]:
    import numpy
    import pyarrow
    import torch

    from pipeline import __version__

    return {
        "sparknorm": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
    }
