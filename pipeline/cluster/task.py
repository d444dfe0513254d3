"""One barrier task on an executor: rendezvous, the user's function, its result or its failure as a row.

The one place where Spark and torch.distributed meet. `barrier.run` is its other half, on the driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import storage
from pipeline.cluster.failures import FailedError, GangBrokenError, failure_path, join_name
from pipeline.cluster.introduction import Facts
from pipeline.cluster.rendezvous import Launch, RankState, exchange_facts, host_of
from pipeline.cluster.rendezvous_address import is_announced
from pipeline.cluster.store import joined_group, wait_for_all_ranks
from pipeline.config.cluster import WorkerSettings
from pipeline.config.secrets import mask_logs
from pipeline.distributed.host_memory import give_back_freed_memory
from pipeline.telemetry import heartbeat
from pipeline.telemetry.driver_link import DriverAddress

if TYPE_CHECKING:
    import pyarrow as pa
    import torch.distributed as dist
    from pyspark import BarrierTaskContext

SCHEMA = "rank int, failed boolean, payload binary"


@dataclass(frozen=True)
class Task:
    """What every rank runs. It holds only plain values, since it is pickled into the stage.

    Parameters
    ----------
    fn, args
        ``fn(worker, *args)`` is called.
    facts
        ``facts(*args)`` returns what all ranks must see alike.
    folder
        The folder of the job, for rank 0's address, heartbeats and failures; None for a function that has none.
    is_shared
        Whether all ranks are known to see the folder; see `barrier.run`.
    launch
        Id of the launch.
    check
        ``check(*args)`` runs on the first rank of each host after that, for what it raises.
    driver
        Is told heartbeats while it can be reached there.
    """

    fn: Callable[..., Any]
    args: tuple
    workers: WorkerSettings
    facts: Callable[..., Facts] | None = None
    folder: str | None = None
    launch: str = ""
    is_shared: bool = True
    check: Callable[..., None] | None = None
    driver: DriverAddress | None = None

    def get_facts(self, *, first_on_host: bool) -> Facts:
        facts = self.facts(*self.args) if self.facts else {}
        if self.check is not None and first_on_host:
            self.check(*self.args)
        return facts

    def as_seen_here(self) -> Task:
        """The task without its folder, where this rank does not see it."""
        if self.folder is None or self.is_shared or is_announced(self.folder, self.launch):
            return self
        return replace(self, folder=None)


def run_task(task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The body of one barrier task: it yields one row with the pickled result or `Failure`.

    Raises
    ------
    GangBrokenError
        The ranks did not find together, or rank 0 is gone. Any other failure is a row: Spark would try again up to
        four times, and say why in Java's words.
    """
    from pyspark import BarrierTaskContext

    mask_logs()
    context = BarrierTaskContext.get()
    me = RankState(context.partitionId(), [host_of(info.address) for info in context.getTaskInfos()])
    try:
        payload, failed = pickle.dumps(_rendezvous_and_call(context, me, task)), False
    except GangBrokenError:
        raise
    except FailedError as error:
        payload, failed = pickle.dumps(error.failure), True
    except (Exception, SystemExit) as error:  # noqa: BLE001 - reported to the driver, which raises it
        payload, failed = pickle.dumps(me.failure(error)), True
    give_back_freed_memory()  # of a process that may live on, and train nothing
    if _may_be_reused():
        for _ in batches:  # Spark keeps a Python worker, and the torch it has imported, only if its input is used up
            pass
    yield _ended(me.rank, failed, payload)


def _ended(rank: int, failed: bool, payload: bytes) -> pa.RecordBatch:
    """One row. Not by `pa.array`, which imports pandas: half a second at the end of the first training of a process."""
    import pyarrow as pa

    lengths = np.array([0, len(payload)], np.int32)
    columns = {
        "rank": pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(np.array([rank], np.int32))]),
        "failed": pa.Array.from_buffers(pa.bool_(), 1, [None, pa.py_buffer(bytes([failed]))]),
        "payload": pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(lengths), pa.py_buffer(payload)]),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def _may_be_reused() -> bool:
    """Whether Spark may keep this process for other tasks (``spark.python.worker.reuse``). Not one that has used a GPU,
    of whose memory it would hold a part, and which an error of CUDA leaves useless, nor one that is still in a process
    group. It ends with its task, and Spark does not count that as a failure.
    """
    if "torch" not in sys.modules:
        return True
    from pipeline.distributed.leave import is_reusable

    return is_reusable()


def _rendezvous_and_call(context: BarrierTaskContext, me: RankState, task: Task) -> Any:
    task = task.as_seen_here()
    launch = Launch(task.launch, task.folder, is_shared=task.is_shared)
    facts = partial(task.get_facts, first_on_host=me.local_rank == 0)
    store, attempt = exchange_facts(context, me, task.workers, facts, launch)
    me.status.enter("start")  # it has found the others, for which it may have waited long
    # Only now, when all ranks are known to be able to: an import that fails must not leave the others waiting.
    from pipeline.distributed.worker import Worker

    assert me.device is not None, "a device was chosen when facts were exchanged"
    timeout = timedelta(seconds=task.workers.collective_timeout_seconds)
    worker = Worker(
        rank=me.rank,
        world_size=me.world_size,
        local_rank=me.local_rank,
        local_world_size=me.local_world_size,
        device=me.device,
        host=socket.gethostname(),
        gpu=me.gpu,
        endpoint=me.endpoints[me.rank],
        attempt=attempt.number,
        status=me.status,
    )
    with (
        contextlib.ExitStack() as at_end,
        _heartbeat(me, task, attempt),
        _announced_join(me, task),
        joined_group(store, me.rank, me.endpoints, me.device, timeout),
    ):
        at_end.callback(wait_for_all_ranks, store, me.rank, me.world_size)  # once the group is left, whatever happens
        with _announced_failure(store, me, task, attempt):
            return task.fn(worker, *task.args)


@contextlib.contextmanager
def _heartbeat(me: RankState, task: Task, attempt: heartbeat.Attempt) -> Iterator[None]:
    if task.folder is None:
        yield
        return
    process = heartbeat.RankProcess(
        rank=me.rank, world_size=me.world_size, host=socket.gethostname(), pid=os.getpid(), device=str(me.device)
    )
    beat = heartbeat.Heartbeat(
        task.folder, me.status, attempt, process,
        seconds=task.workers.heartbeat_seconds, stall_seconds=task.workers.stall_seconds, driver=task.driver,
    )  # fmt: skip
    with beat.running():
        yield


@contextlib.contextmanager
def _announced_join(me: RankState, task: Task) -> Iterator[None]:
    """Say in the folder why this rank could not join the group: Spark tells that only once it gives the stage up."""
    try:
        yield
    except GangBrokenError as error:
        if task.folder is not None:
            with contextlib.suppress(Exception), storage.retry_for(0):
                path = failure_path(task.folder, join_name(task.launch, me.rank))
                storage.publish(path, json.dumps(asdict(me.failure(error))).encode())
        raise


@contextlib.contextmanager
def _announced_failure(store: dist.Store, me: RankState, task: Task, attempt: heartbeat.Attempt) -> Iterator[None]:
    """Turn an exception into a `FailedError` that knows whether it was the first.

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
        failure = me.failure(error, echo=echo)
        if task.folder is not None and not echo:
            with contextlib.suppress(Exception), storage.retry_for(0):  # it also travels as a row
                storage.publish(failure_path(task.folder, attempt.id), json.dumps(asdict(failure)).encode())
        raise FailedError(failure) from error
