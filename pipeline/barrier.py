"""Run ``fn(worker, *args)`` on N barrier tasks: rendezvous, agreement, gang restart, errors, results.

The one place where Spark and torch.distributed meet. It knows nothing of CNNs: ``fn`` gets a `Worker` whose process
group is joined and returns anything that pickles.

A worker *process* that dies takes the stage down and Spark restarts the whole gang by itself (up to four attempts),
because ``repartition(1)`` before ``collect()`` makes the barrier stage a shuffle-map stage; a result stage would be
given up. An *exception* in ``fn`` would fail again, so it is not retried: it travels to the driver as a result, with
its rank, host and traceback, and is raised there as `WorkerError`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import platform
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.config import WorkerSettings
from pipeline.session import spark_reason

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

Facts = Callable[..., dict[str, Any]]

# How long rank 0 keeps the store open for the others to say why they left.
FAREWELL_SECONDS = 10


class LaunchError(RuntimeError):
    """The barrier stage could not be started, or Spark gave it up."""


class WorkerError(RuntimeError):
    """``fn`` raised on a worker. The message names rank and host and carries the worker's own traceback."""


@dataclass(frozen=True)
class _Failure:
    """Why one rank stopped; an echo is the broken connection that another rank's failure left behind."""

    rank: int
    host: str
    error: str
    traceback: str
    echo: bool
    time: float


def run(
    spark: SparkSession,
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: WorkerSettings,
    facts: Facts | None = None,
) -> list[Any]:
    """Run ``fn(worker, *args)`` on ``workers.count`` barrier tasks and return their results in rank order.

    Parameters
    ----------
    fn : a module-level function; executors import its module
    facts : ``facts(*args)`` runs on every rank before the process group is joined; ranks that disagree are an error

    Raises
    ------
    LaunchError
        Too few slots, or Spark gave the stage up (the cause is attached).
    WorkerError
        ``fn`` or ``facts`` raised, or the ranks disagree.
    """
    wait_for_slots(spark, workers)
    frozen_args = tuple(args)

    def task(batches: Iterator[Any]) -> Iterator[Any]:
        # Only plain values are captured: neither the session nor anything that holds it.
        yield from _task(fn, frozen_args, workers, facts)

    stage = spark.range(0, workers.count, 1, workers.count).mapInArrow(
        task, "rank int, failed boolean, payload binary", barrier=True
    )
    try:
        rows = stage.repartition(1).collect()
    except Exception as error:
        raise LaunchError(
            f"Spark gave up the barrier stage of {workers.count} workers: {spark_reason(error)}"
        ) from error
    failures = [pickle.loads(row.payload) for row in rows if row.failed]
    if failures:
        raise WorkerError(_describe(failures))
    return [pickle.loads(row.payload) for row in sorted(rows, key=lambda row: row.rank)]


def wait_for_slots(spark: SparkSession, workers: WorkerSettings) -> None:
    """Return once the cluster can run all tasks at once. Spark itself would wait ten minutes in silence.

    Raises
    ------
    LaunchError
        It cannot, ``workers.slots_wait_seconds`` after the first look (at once in local mode, where slots are fixed).
    """
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise LaunchError("barrier stages need fixed executors: set spark.dynamicAllocation.enabled=false")
    context = spark.sparkContext
    if context.getConf().get("spark.barrier.sync.timeout") is None:
        log.warning("spark.barrier.sync.timeout is not set, and Spark's own default is a year: set it to 300")
    master = str(context.master)
    local = master.startswith("local") and not master.startswith("local-cluster")
    deadline = time.monotonic() + (0 if local else workers.slots_wait_seconds)
    while (slots := _slots(context)) < workers.count:
        if time.monotonic() >= deadline:
            raise LaunchError(
                f"workers.count is {workers.count}, but {master} has {slots} slots: "
                f"set workers.count to at most {slots}, or give the cluster more cores"
                + (f" (master local[{workers.count}])" if local else " or executors")
            )
        time.sleep(0.5)


def _slots(context: Any) -> int:
    """Barrier tasks that can run at once: the number that Spark's own scheduler compares with."""
    scala = context._jsc.sc()
    return int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().defaultResourceProfile()))


def _task(fn: Callable[..., Any], args: tuple, workers: WorkerSettings, facts: Facts | None) -> Iterator[Any]:
    """One barrier task: one row with the pickled result or failure."""
    import pyarrow as pa
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    rank = context.partitionId()
    try:
        outcome, failed = _rendezvous_and_call(context, fn, args, workers, facts), False
        payload = pickle.dumps(outcome)
    except _FailedError as error:
        payload, failed = pickle.dumps(error.failure), True
    except (Exception, SystemExit) as error:  # noqa: BLE001 - reported to the driver, which raises it
        payload, failed = pickle.dumps(_failure(rank, error, echo=False)), True
    yield pa.RecordBatch.from_pydict(
        {
            "rank": pa.array([rank], pa.int32()),
            "failed": pa.array([failed]),
            "payload": pa.array([payload], pa.binary()),
        }
    )


class _FailedError(Exception):
    def __init__(self, failure: _Failure):
        super().__init__(failure.error)
        self.failure = failure


def _rendezvous_and_call(
    context: Any, fn: Callable[..., Any], args: tuple, workers: WorkerSettings, facts: Facts | None
) -> Any:
    rank = context.partitionId()
    hosts = [info.address.rpartition(":")[0] or info.address for info in context.getTaskInfos()]
    device, store, port = _introduce(context, hosts, args, workers, facts)
    # Only now, when all ranks are known to be able to: an import that fails must not leave the others waiting.
    import torch.distributed as dist

    from pipeline.worker import Worker, process_group

    timeout = timedelta(seconds=workers.collective_timeout_seconds)
    if store is None:
        store = dist.TCPStore(hosts[0], port, len(hosts), is_master=False, timeout=timeout)
    worker = Worker(rank, len(hosts), _local_rank(hosts, rank), hosts.count(hosts[rank]), device, socket.gethostname())
    try:
        with process_group(store, rank, len(hosts), device, timeout), _announced_failure(store, rank):
            return fn(worker, *args)
    finally:
        _farewell(store, rank, len(hosts))


def _introduce(
    context: Any, hosts: list[str], args: tuple, workers: WorkerSettings, facts: Facts | None
) -> tuple[Any, Any, int]:
    """Tell all ranks who this one is and hear who they are: (device, the store on rank 0 or None, its port).

    Every rank takes part in the exchange, also one that has failed: the others learn of it here instead of waiting.
    """
    rank = context.partitionId()
    device, store, error = None, None, None
    try:
        device, store, message = _prepare(context, hosts, args, workers, facts)
        text = json.dumps(message)
    except (Exception, SystemExit) as raised:  # noqa: BLE001 - told to the other ranks first, then to the driver
        error, text = raised, json.dumps({"error": str(raised)})
    messages = [json.loads(other) for other in context.allGather(text)]
    if error is not None:
        raise _FailedError(_failure(rank, error, echo=False)) from error
    if any("error" in other for other in messages):
        raise _FailedError(_failure(rank, RuntimeError("another rank failed before the start"), echo=True))
    _agree([other["facts"] for other in messages], hosts)
    return device, store, messages[0]["port"]


def _prepare(
    context: Any, hosts: list[str], args: tuple, workers: WorkerSettings, facts: Facts | None
) -> tuple[Any, Any, dict[str, Any]]:
    """What can fail on one rank alone: imports, device, facts and, on rank 0, the store."""
    import torch
    import torch.distributed as dist

    from pipeline.worker import choose_device

    rank = context.partitionId()
    torch.set_num_threads(workers.threads)
    gpu = context.resources().get("gpu")
    # A GPU that Spark did not assign belongs to somebody else, so `auto` leaves it alone.
    requested = "cpu" if workers.device == "auto" and gpu is None else workers.device
    device = choose_device(requested, gpu.addresses[0] if gpu else None, _local_rank(hosts, rank))
    message: dict[str, Any] = {
        "facts": {**_versions(), "device": device.type, **(facts(*args) if facts else {})},
    }
    store = None
    if rank == 0:
        # Port 0: the system picks a free one, so two launches never race for the same.
        timeout = timedelta(seconds=workers.collective_timeout_seconds)
        store = dist.TCPStore(hosts[0], 0, len(hosts), is_master=True, wait_for_workers=False, timeout=timeout)
        message["port"] = store.port
    return device, store, message


def _local_rank(hosts: list[str], rank: int) -> int:
    return hosts[:rank].count(hosts[rank])


@contextlib.contextmanager
def _announced_failure(store: Any, rank: int) -> Iterator[None]:
    """Turn an exception into a `_FailedError` that knows whether it was the first.

    The store remembers the first rank that failed. That rank writes its name before it leaves the process group, so
    those that then find their connections broken see that theirs is an echo.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        try:
            echo = store.compare_set("first_failure", "", str(rank)).decode() != str(rank)
        except Exception:  # noqa: BLE001 - the store is gone, and rank 0, its host, with it
            echo = rank != 0
        raise _FailedError(_failure(rank, error, echo)) from error


def _farewell(store: Any, rank: int, world_size: int) -> None:
    """Rank 0 holds the store open until all have left, for a bounded time."""
    with contextlib.suppress(Exception):
        store.set(f"left/{rank}", "1")
        if rank == 0:
            store.wait([f"left/{other}" for other in range(world_size)], timedelta(seconds=FAREWELL_SECONDS))


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


def _failure(rank: int, error: BaseException, echo: bool) -> _Failure:
    text = "".join(traceback.format_exception(error))
    return _Failure(rank, socket.gethostname(), f"{type(error).__name__}: {error}", text, echo, time.time())


def _describe(failures: list[_Failure]) -> str:
    """The first failure that is no echo, in full; equal failures of other ranks are only counted."""
    first = min(failures, key=lambda failure: (failure.echo, failure.time))
    others = [f.rank for f in failures if not f.echo and f.rank != first.rank]
    also = f" (also on ranks {sorted(others)})" if others else ""
    return f"rank {first.rank} on {first.host}{also}: {first.error}\n{first.traceback.rstrip()}"
