"""Which Python processes Spark uses again (``spark.python.worker.reuse``): real gangs in one session."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.cluster import barrier
from pipeline.cluster.errors import StoppedError, WorkerError
from pipeline.cluster.stop import Stop
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.leave import AFTER_ERROR_SECONDS

pytestmark = pytest.mark.spark

WORKERS = WorkerSettings(count=2, collective_timeout_seconds=60)
LATE_SECONDS = AFTER_ERROR_SECONDS + 6


def pid_of(worker):
    worker.wait_for_all()
    return os.getpid()


def raise_on_one_rank(worker, folder):
    Path(folder, f"rank-{worker.rank}").write_text(str(os.getpid()))
    if worker.rank == 1:
        raise LookupError("a fault of this rank alone")
    worker.wait_for_all()


def raise_beside_a_late_rank(worker, folder):
    """Rank 1 has begun to exchange something when it fails; rank 0 computes for long before it comes to that."""
    Path(folder, f"rank-{worker.rank}").write_text(str(os.getpid()))
    values = torch.ones(4)
    if worker.rank == 1:
        worker.all_reduce_start(values)
        raise LookupError("before the exchange had ended")
    time.sleep(LATE_SECONDS)
    worker.all_reduce_sum(values)


def wait_for_the_end(worker, folder):
    """Until it is asked to end."""
    Path(folder, f"rank-{worker.rank}").write_text(str(os.getpid()))
    while not Path(folder, "end").exists():
        time.sleep(0.01)
    worker.wait_for_all()


def never_ends(worker, folder):
    Path(folder, f"rank-{worker.rank}").write_text(str(os.getpid()))
    time.sleep(600)


def stop_once_it_runs(spark, function, folder):
    """Run a function that is stopped, and asked to end, once both ranks are in it."""
    stop = Stop()

    def wait_for_both():
        deadline = time.monotonic() + 120
        while len(list(Path(folder).glob("rank-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()

    threading.Thread(target=wait_for_both, daemon=True).start()
    with pytest.raises(StoppedError):
        barrier.run(spark, function, (str(folder),), workers=WORKERS, stop=stop, ask_to_end=Path(folder, "end").touch)
    return [int(Path(folder, f"rank-{rank}").read_text()) for rank in (0, 1)]


def failed_pid(folder):
    return int(Path(folder, "rank-1").read_text())


def test_processes_that_may_be_used_again_are(spark, tmp_path):
    first = barrier.run(spark, pid_of, workers=WORKERS)
    assert sorted(barrier.run(spark, pid_of, workers=WORKERS)) == sorted(first)
    with pytest.raises(WorkerError, match="LookupError: a fault of this rank alone"):
        barrier.run(spark, raise_on_one_rank, (str(tmp_path),), workers=WORKERS)
    assert sorted(barrier.run(spark, pid_of, workers=WORKERS)) == sorted(first)


def test_processes_that_end_when_they_are_asked_to_are_used_again(spark, tmp_path):
    pids = stop_once_it_runs(spark, wait_for_the_end, tmp_path)
    assert all(psutil.pid_exists(pid) for pid in pids)
    assert len(barrier.run(spark, pid_of, workers=WORKERS)) == 2  # no slot is left occupied


def test_a_function_that_does_not_end_when_it_is_asked_to_is_ended(spark, tmp_path):
    pids = stop_once_it_runs(spark, never_ends, tmp_path)
    assert len(barrier.run(spark, pid_of, workers=WORKERS)) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_process_that_is_still_in_a_group_is_not_used_again(spark, tmp_path):
    """Its error reaches the driver, its end is no failure to Spark, and the next gang runs in a new process."""
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 on .*: LookupError: before the exchange had ended"):
        barrier.run(spark, raise_beside_a_late_rank, (str(tmp_path),), workers=WORKERS)
    assert time.monotonic() - started < LATE_SECONDS + 75  # with a first gang of the session, beside other work
    pids = barrier.run(spark, pid_of, workers=WORKERS)
    assert failed_pid(tmp_path) not in pids
    deadline = time.monotonic() + 20
    while Path(f"/proc/{failed_pid(tmp_path)}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{failed_pid(tmp_path)}").exists()
