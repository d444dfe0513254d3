"""One barrier task on an executor: rendezvous, agreement, the user's function, its result or its failure as a row.

The one place where Spark and torch.distributed meet. `barrier.run` is its other half, on the driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pipeline import storage
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry import heartbeat

SCHEMA = "rank int, failed boolean, payload binary"
# How long a rank that has ended waits for the others to end.
FAREWELL_SECONDS = 30
# How long a port of the user's choice may still be held by the gang that was there before a restart.
PORT_SECONDS = 12

Facts = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What every rank runs. Only plain values: it is pickled into the stage.

    folder : of the job, for heartbeats and failures; None for a function that has none
    """

    fn: Callable[..., Any]
    args: tuple
    workers: WorkerSettings
    facts: Facts | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why one rank stopped; an echo is the broken connection that another rank's failure left behind.

    where : what the rank was doing
    final : the exception has an attribute ``final`` that is true: it would be raised again
    """

    rank: int
    host: str
    error: str
    traceback: str
    echo: bool
    time: float
    device: str = ""
    where: str = ""
    final: bool = False


@dataclass
class _Self:
    """What a rank knows of itself by the time it fails."""

    rank: int
    hosts: list[str]
    status: heartbeat.Status = field(default_factory=heartbeat.Status)
    device: Any = None
    gpu: str | None = None

    @property
    def local_rank(self) -> int:
        return self.hosts[: self.rank].count(self.hosts[self.rank])


class GangBrokenError(RuntimeError):
    """The ranks did not find together, or rank 0 died: this task fails, so that Spark starts the whole gang anew."""


class _FailedError(Exception):
    def __init__(self, failure: Failure):
        super().__init__(failure.error)
        self.failure = failure


def run_task(task: Task, batches: Iterator[Any]) -> Iterator[Any]:
    """The body of one barrier task: one row with the pickled result or `Failure`.

    Raises
    ------
    GangBrokenError
        A process group could not be joined, or rank 0 is gone. Any other failure is a row: Spark would try again up to
        four times, and say why in Java's words.
    """
    import pyarrow as pa
    from pyspark import BarrierTaskContext

    for _ in batches:  # Spark keeps a Python worker, and the torch it has imported, only if its input is used up
        pass
    context = BarrierTaskContext.get()
    me = _Self(context.partitionId(), [info.address.rpartition(":")[0] or info.address
                                       for info in context.getTaskInfos()])  # fmt: skip
    try:
        payload, failed = pickle.dumps(_rendezvous_and_call(context, me, task)), False
    except GangBrokenError:
        raise
    except _FailedError as error:
        payload, failed = pickle.dumps(error.failure), True
    except (Exception, SystemExit) as error:  # noqa: BLE001 - reported to the driver, which raises it
        payload, failed = pickle.dumps(_failure(me, error, echo=False)), True
    yield pa.RecordBatch.from_pydict(
        {
            "rank": pa.array([me.rank], pa.int32()),
            "failed": pa.array([failed]),
            "payload": pa.array([payload], pa.binary()),
        }
    )


def _rendezvous_and_call(context: Any, me: _Self, task: Task) -> Any:
    store, first = _introduce(context, me, task)
    # Only now, when all ranks are known to be able to: an import that fails must not leave the others waiting.
    import torch.distributed as dist

    from pipeline.distributed.worker import Worker

    timeout = timedelta(seconds=task.workers.collective_timeout_seconds)
    world_size = len(me.hosts)
    if store is None:
        store = dist.TCPStore(me.hosts[0], first["port"], world_size, is_master=False, timeout=timeout)
    attempt = heartbeat.Attempt(**first["attempt"]) if "attempt" in first else heartbeat.Attempt(1, "")
    worker = Worker(me.rank, world_size, me.local_rank, me.hosts.count(me.hosts[me.rank]), me.device,
                    socket.gethostname(), me.gpu, attempt.number, me.status)  # fmt: skip
    with (
        contextlib.ExitStack() as at_end,
        _beating(me, task, attempt),
        _joined(store, me, world_size, timeout),
    ):
        at_end.callback(_farewell, store, me.rank, world_size)  # once the group is left, whatever happens
        with _announced_failure(store, me, task, attempt):
            return task.fn(worker, *task.args)


@contextlib.contextmanager
def _joined(store: Any, me: _Self, world_size: int, timeout: timedelta) -> Iterator[None]:
    """The process group, with all ranks in it: one that had nothing to do would leave while another still connects.

    Raises
    ------
    GangBrokenError
        It could not be joined. torch counts groups, and a process that has failed to join one does not find the next:
        it must not be used again, as Spark would use it if this were a result.
    """
    from pipeline.distributed.worker import process_group

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(process_group(store, me.rank, world_size, me.device, timeout))
            store.set(f"joined/{me.rank}", "1")
            store.wait([f"joined/{other}" for other in range(world_size)], timeout)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise GangBrokenError(f"rank {me.rank} could not join the process group: {reason}") from error
        yield


def _introduce(context: Any, me: _Self, task: Task) -> tuple[Any, dict[str, Any]]:
    """Tell all ranks who this one is and hear who they are: (the store on rank 0 or None, what rank 0 said).

    Every rank takes part in the exchange, also one that has failed: the others learn of it here instead of waiting.
    """
    store, error = None, None
    try:
        store, message = _prepare(context, me, task)
        text = json.dumps(message)
    except (Exception, SystemExit) as raised:  # noqa: BLE001 - told to the other ranks first, then to the driver
        error, text = raised, json.dumps({"error": str(raised)})
    # Spark looks once a second whether all have spoken, which one rank alone need not wait for.
    messages = [json.loads(other) for other in (context.allGather(text) if len(me.hosts) > 1 else [text])]
    if error is not None:
        raise _FailedError(_failure(me, error, echo=False)) from error
    if any("error" in other for other in messages):
        raise _FailedError(_failure(me, RuntimeError("another rank failed before the start"), echo=True))
    _agree([other["facts"] for other in messages], me.hosts)
    one_gpu_each([other["gpu"] for other in messages], me.hosts)
    return store, messages[0]


def _prepare(context: Any, me: _Self, task: Task) -> tuple[Any, dict[str, Any]]:
    """What can fail on one rank alone: imports, device, facts and, on rank 0, the store."""
    import torch

    from pipeline.distributed.device import choose_device

    workers = task.workers
    torch.set_num_threads(workers.threads)
    assigned = context.resources().get("gpu")
    me.gpu = assigned.addresses[0] if assigned else None
    # A GPU that Spark did not assign belongs to somebody else, so `auto` leaves it alone.
    requested = "cpu" if workers.device == "auto" and me.gpu is None else workers.device
    me.device = choose_device(requested, me.gpu, me.local_rank)
    facts = {**_versions(), "device": me.device.type, **(task.facts(*task.args) if task.facts else {})}
    message: dict[str, Any] = {"facts": facts, "gpu": me.gpu}
    if me.rank > 0:
        return None, message
    store = _open_store(me.hosts, workers)
    message["port"] = store.port
    if task.folder is not None:
        attempt = heartbeat.next_attempt(task.folder)
        message["attempt"] = {"number": attempt.number, "id": attempt.id}
    return store, message


def _open_store(hosts: list[str], workers: WorkerSettings) -> Any:
    """Rank 0's store. Port 0: the system picks a free one, so two launches never race for the same."""
    import torch.distributed as dist

    timeout = timedelta(seconds=workers.collective_timeout_seconds)
    give_up_at = time.monotonic() + PORT_SECONDS
    while True:
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


@contextlib.contextmanager
def _beating(me: _Self, task: Task, attempt: heartbeat.Attempt) -> Iterator[None]:
    if task.folder is None:
        yield
        return
    process = heartbeat.RankProcess(
        rank=me.rank, world_size=len(me.hosts), host=socket.gethostname(), pid=os.getpid(), device=str(me.device)
    )
    beat = heartbeat.Heartbeat(
        task.folder, me.status, attempt, process,
        seconds=task.workers.heartbeat_seconds, stall_seconds=task.workers.stall_seconds,
    )  # fmt: skip
    with beat.running():
        yield


@contextlib.contextmanager
def _announced_failure(store: Any, me: _Self, task: Task, attempt: heartbeat.Attempt) -> Iterator[None]:
    """Turn an exception into a `_FailedError` that knows whether it was the first.

    The store remembers the first rank that failed. That rank writes its name before it leaves the process group, so
    those that then find their connections broken see that theirs is an echo. It also publishes its failure: where the
    others do not notice (they wait in a collective of NCCL, or in native code), the driver ends the stage.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        try:
            echo = store.compare_set("first_failure", "", str(me.rank)).decode() != str(me.rank)
        except Exception:  # noqa: BLE001 - the store is gone, and rank 0, its host, with it
            echo = me.rank != 0
        failure = _failure(me, error, echo)
        if task.folder is not None and not echo:
            with contextlib.suppress(Exception):  # it also travels as a row
                storage.publish(failure_path(task.folder, attempt.id), json.dumps(failure.__dict__).encode())
        raise _FailedError(failure) from error


def failure_path(folder: str, attempt: str) -> str:
    """Where the first rank of an attempt that fails says so."""
    return storage.join(folder, "failures", f"{attempt}.json")


def _farewell(store: Any, rank: int, world_size: int) -> None:
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
        store.wait([f"ended/{other}" for other in ranks], timedelta(seconds=FAREWELL_SECONDS))
        store.set(f"left/{rank}", "1")  # rank 0 keeps the store open until all have seen that all have ended
        if rank == 0:
            store.wait([f"left/{other}" for other in ranks], timedelta(seconds=FAREWELL_SECONDS))
    except dist.DistStoreError:  # the time is over: somebody hangs, which is the watch's business
        return
    except Exception as error:
        if rank > 0:
            raise GangBrokenError(f"rank {rank} lost rank 0: {error}") from error


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


def _agree(facts: list[dict[str, Any]], hosts: list[str]) -> None:
    """Raise where a rank's facts are not those of rank 0, naming the fact and both values."""
    for name in sorted({name for fact in facts for name in fact}):
        for rank, fact in enumerate(facts):
            if fact.get(name) != facts[0].get(name):
                raise ValueError(
                    f"ranks disagree about {name}: rank 0 on {hosts[0]} has {facts[0].get(name)}, "
                    f"rank {rank} on {hosts[rank]} has {fact.get(name)}"
                )


def one_gpu_each(gpus: list[str | None], hosts: list[str]) -> None:
    """Raise ValueError where two ranks of a host have the same GPU: NCCL would refuse them later, in its own words."""
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, gpu) in enumerate(zip(hosts, gpus, strict=True)):
        if gpu is not None and (other := owners.setdefault((host, gpu), rank)) != rank:
            raise ValueError(
                f"ranks {other} and {rank} on {host} were both assigned GPU {gpu}: set workers.task_gpus=1"
            )


def _failure(me: _Self, error: BaseException, echo: bool) -> Failure:
    text = "".join(traceback.format_exception(error))
    return Failure(me.rank, socket.gethostname(), f"{type(error).__name__}: {error}", text, echo, time.time(),
                   str(me.device or ""), str(me.status.position), getattr(error, "final", False))  # fmt: skip


def first_of(failures: list[Failure]) -> Failure:
    """The first one that is no echo."""
    return min(failures, key=lambda failure: (failure.echo, failure.time))


def describe(failures: list[Failure]) -> str:
    """The first failure that is no echo, in full; equal failures of other ranks are only counted."""
    first = first_of(failures)
    others = [f.rank for f in failures if not f.echo and f.rank != first.rank]
    also = f" (also on ranks {sorted(others)})" if others else ""
    device = f" ({first.device})" if first.device else ""
    where = f" in {first.where}" if first.where else ""
    return f"rank {first.rank} on {first.host}{device}{also}{where}: {first.error}\n{first.traceback.rstrip()}"
