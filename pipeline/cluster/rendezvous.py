"""How the ranks of a gang find together before the function runs, and part when it has ended.

Every rank tells all others its facts through Spark's barrier; what must be equal and is not is an error before step
one. Rank 0 opens a store, through which all join one process group. No rank leaves before all have ended.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.cluster.failures import FailedError, Failure, GangBrokenError, failure_from
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry import heartbeat

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from pyspark import BarrierTaskContext

# How long a rank that has ended waits for the others to end.
END_SECONDS = 30
# How long a port of the user's choice may still be held by the gang that was there before a restart.
PORT_SECONDS = 12

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
        The host of every rank, in rank order.
    status
        What the rank is doing.
    device
        Where it trains; None before one was chosen.
    gpu
        The address of the GPU that Spark assigned, if it assigned one.
    """

    rank: int
    hosts: Sequence[str]
    status: heartbeat.Status = field(default_factory=heartbeat.Status)
    device: torch.device | None = None
    gpu: str | None = None

    @property
    def world_size(self) -> int:
        return len(self.hosts)

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

    ``port`` and ``attempt`` come from rank 0: the port of its store, and the number and id of this gang where the job
    has a folder. A rank that cannot take part has an ``error`` and nothing else.
    """

    facts: Facts = field(default_factory=dict)
    gpu: str | None = None
    port: int | None = None
    attempt: heartbeat.Attempt | None = None
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Introduction:
        fields = json.loads(text)
        attempt = fields.pop("attempt")
        return cls(**fields, attempt=heartbeat.Attempt(**attempt) if attempt else None)


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
    """
    store, error = None, None
    try:
        store, introduction = _introduction(context, me, workers, facts_of_function, folder)
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
    check_agreement([other.facts for other in introductions], me.hosts)
    one_gpu_each([other.gpu for other in introductions], me.hosts)
    first = introductions[0]
    # Only now, when all ranks are known to be able to: a connection that fails must not leave the others waiting.
    return store or _connect(me, first.port, workers), first.attempt or heartbeat.Attempt(1, "")


def _introduction(
    context: BarrierTaskContext,
    me: RankState,
    workers: WorkerSettings,
    facts_of_function: Callable[[], Facts],
    folder: str | None,
) -> tuple[dist.Store | None, Introduction]:
    """What can fail on one rank alone: imports, device, facts and, on rank 0, the store."""
    import torch

    from pipeline.distributed.device import choose_device

    torch.set_num_threads(workers.threads)
    assigned = context.resources().get("gpu")
    me.gpu = assigned.addresses[0] if assigned else None
    # A GPU that Spark did not assign belongs to somebody else, so `auto` leaves it alone.
    requested = "cpu" if workers.device == "auto" and me.gpu is None else workers.device
    me.device = choose_device(requested, me.gpu, me.local_rank)
    facts = {**_versions(), "device": me.device.type, **facts_of_function()}
    if me.rank > 0:
        return None, Introduction(facts, me.gpu)
    store = _open_store(me.hosts, workers)
    attempt = heartbeat.next_attempt(folder) if folder is not None else None
    return store, Introduction(facts, me.gpu, store.port, attempt)


def _open_store(hosts: Sequence[str], workers: WorkerSettings) -> Any:
    """Rank 0's store. Port 0: the system picks a free one, so two launches never race for the same."""
    import torch.distributed as dist

    timeout = timedelta(seconds=workers.collective_timeout_seconds)
    give_up_at = time.monotonic() + PORT_SECONDS
    while True:  # a plain loop: executors have no tenacity
        try:
            return dist.TCPStore(
                hosts[0], workers.port, len(hosts), is_master=True, wait_for_workers=False, timeout=timeout
            )
        except RuntimeError as error:  # torch's DistNetworkError
            if workers.port == 0:
                raise
            if time.monotonic() > give_up_at:
                raise ValueError(
                    f"workers.port {workers.port} cannot be opened on {hosts[0]}: "
                    f"choose another, or 0 for a free one ({error})"
                ) from error
        time.sleep(0.5)


def _connect(me: RankState, port: int | None, workers: WorkerSettings) -> dist.Store:
    import torch.distributed as dist

    assert port is not None, "rank 0 names the port of its store"
    timeout = timedelta(seconds=workers.collective_timeout_seconds)
    return dist.TCPStore(me.hosts[0], port, me.world_size, is_master=False, timeout=timeout)


@contextlib.contextmanager
def joined_group(store: dist.Store, me: RankState, timeout: timedelta) -> Iterator[None]:
    """Join the process group, and wait until all ranks are in it: one that had nothing to do would leave while another
    still connects.

    Raises
    ------
    GangBrokenError
        It could not be joined. torch counts groups, and a process that has failed to join one does not find the next:
        it must not be used again, as Spark would use it if this were a result.
    """
    from pipeline.distributed.worker import process_group

    with contextlib.ExitStack() as stack:
        try:
            assert me.device is not None, "a device was chosen when facts were exchanged"
            stack.enter_context(process_group(store, me.rank, me.world_size, me.device, timeout))
            store.set(f"joined/{me.rank}", "1")
            store.wait([f"joined/{other}" for other in range(me.world_size)], timeout)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise GangBrokenError(f"rank {me.rank} could not join the process group: {reason}") from error
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
