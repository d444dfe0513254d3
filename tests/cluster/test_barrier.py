"""The launcher on real Spark. Functions here stand for what a user hands in."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import kept_memory
import pytest
import torch
from pyspark import cloudpickle

from pipeline.cluster import barrier
from pipeline.cluster.errors import LaunchError, WorkerError
from pipeline.cluster.guard import Guard
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings

pytestmark = pytest.mark.spark
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(kept_memory)

TWO = WorkerSettings(count=2, collective_timeout_seconds=60, slots_wait_seconds=0)


def introduce(worker, word):
    total = worker.all_reduce_sum(torch.tensor([10.0 + worker.rank]))
    return worker.rank, worker.world_size, worker.local_rank, worker.local_world_size, total.item(), word


def test_results_come_in_rank_order_over_one_process_group(spark):
    expected = [(0, 2, 0, 2, 21.0, "hello"), (1, 2, 1, 2, 21.0, "hello")]
    assert barrier.run(spark, introduce, ("hello",), workers=TWO) == expected
    # Again in the same Python workers: the group before was left.
    assert barrier.run(spark, introduce, ("hello",), workers=TWO) == expected
    one = TWO.model_copy(update={"count": 1})
    assert barrier.run(spark, introduce, ("hello",), workers=one) == [(0, 1, 0, 1, 10.0, "hello")]


def test_spark_before_4_0_which_knows_no_profile(spark, monkeypatch):
    kind = type(spark.range(1))
    current = kind.mapInArrow

    def as_in_3_5(self, func, schema, barrier=False):
        return current(self, func, schema, barrier)

    monkeypatch.setattr(kind, "mapInArrow", as_in_3_5)
    one = TWO.model_copy(update={"count": 1})
    assert barrier.run(spark, introduce, ("hello",), workers=one) == [(0, 1, 0, 1, 10.0, "hello")]


def threads(worker):
    return torch.get_num_threads()


def test_each_rank_gets_its_threads(spark):
    assert barrier.run(spark, threads, workers=TWO.model_copy(update={"threads": 2})) == [2, 2]
    assert barrier.run(spark, threads, workers=TWO) == [1, 1]


def bytes_kept(worker):
    return kept_memory.bytes_kept()


@pytest.mark.skipif("MALLOC_TRIM_THRESHOLD_" in os.environ, reason="the environment decides what is kept")
def test_ranks_keep_what_a_layer_has_freed_for_the_next(spark):
    assert min(barrier.run(spark, bytes_kept, workers=TWO)) > 200_000_000


def frozen_objects(worker):
    import gc

    return gc.get_freeze_count()


def test_what_workers_share_is_not_searched_for_garbage_after_each_task(spark):
    """Spark's daemon collects after each task; with torch in it that took 0.2 s of a core for every rank."""
    assert min(barrier.run(spark, frozen_objects, workers=TWO)) > 100_000


def fail_on(worker, failing, before_the_others):
    if worker.rank == failing:
        if not before_the_others:
            worker.all_reduce_sum(torch.zeros(1))
        raise KeyError("the user's own mistake")
    for _ in range(1000):
        worker.all_reduce_sum(torch.zeros(1))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("before_the_others", [True, False])
def test_the_first_failure_arrives_with_rank_and_traceback(spark, failing, before_the_others):
    started = time.monotonic()
    with pytest.raises(WorkerError) as error:
        barrier.run(spark, fail_on, (failing, before_the_others), workers=TWO)
    text = str(error.value)
    assert text.startswith(f"rank {failing} on ")
    assert 'KeyError: "the user\'s own mistake"' in text
    assert "in fail_on" in text
    # The other rank's broken connection is not the news.
    assert "Connection" not in text
    assert "gloo" not in text
    assert time.monotonic() - started < 30
    # The session is as good as before.
    assert len(barrier.run(spark, introduce, ("again",), workers=TWO)) == 2


def fail_everywhere(worker):
    raise ValueError("settings that no rank can use")


def test_a_failure_of_all_ranks_is_told_once(spark):
    with pytest.raises(WorkerError) as error:
        barrier.run(spark, fail_everywhere, workers=TWO)
    assert str(error.value).count("ValueError: settings that no rank can use") <= 2  # headline and traceback


def leave(worker):
    sys.exit(3)


def test_an_exit_of_the_users_code_is_a_failure(spark):
    with pytest.raises(WorkerError, match="SystemExit: 3"):
        barrier.run(spark, leave, workers=TWO)


def facts_of_pid(*_):
    return {"pid": os.getpid()}


def facts_that_fail(failing, *_):
    from pyspark import BarrierTaskContext

    if BarrierTaskContext.get().partitionId() == failing:
        raise FileNotFoundError("/data/manifest.json")
    return {}


def test_ranks_that_disagree_stop_before_the_start(spark):
    with pytest.raises(WorkerError, match=r"ranks disagree about pid: rank 0 on \S+ has \d+, rank 1 on"):
        barrier.run(spark, introduce, ("x",), workers=TWO, facts=facts_of_pid)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("with_folder", [True, False])
def test_a_rank_that_fails_before_the_start_is_no_hang(spark, tmp_path, with_folder, failing):
    started = time.monotonic()
    folder = str(tmp_path) if with_folder else None
    with pytest.raises(WorkerError, match=rf"rank {failing} on .*FileNotFoundError: /data/manifest.json") as error:
        barrier.run(spark, introduce, (failing,), workers=TWO, facts=facts_that_fail, folder=folder)
    assert "in facts_that_fail" in str(error.value)
    assert time.monotonic() - started < 30


@pytest.mark.long
def test_why_ranks_could_not_join_is_said_when_the_time_is_over(spark, tmp_path, monkeypatch):
    """Spark starts them again and again, and would say why only when it gives up."""
    monkeypatch.setitem(spark.sparkContext.environment, "GLOO_DEVICE_TRANSPORT", "carrier pigeon")
    folder = str(tmp_path)
    with pytest.raises(LaunchError, match="unsupported gloo device"):
        barrier.run(spark, introduce, ("x",), workers=TWO, folder=folder, is_shared=False, limit_seconds=200)
    launch = json.loads((tmp_path / "rendezvous.json").read_text())["launch"]
    guard = Guard(TWO, Watch(folder, TWO), limit_seconds=20, launch=launch)
    with pytest.raises(
        LaunchError,
        match=r"the barrier stage of 2 workers did not end within 20 s: rank \d on \S+ \(cpu\) in start, epoch 0, "
        r"step 0: GangBrokenError: rank \d at 127\.0\.0\.1 \(lo\) could not join the process group with .* device$",
    ):
        guard.check_limits(21)


def test_with_a_folder_ranks_find_each_other_without_the_barrier_of_spark(spark, tmp_path, monkeypatch):
    """Which would end an executor if a worker were killed meanwhile, and takes a second."""
    seconds = []
    for launch in range(4):
        started = time.monotonic()
        folder = str(tmp_path / "job")  # the address of the launch before lies there
        results = barrier.run(spark, no_barrier, (launch,), workers=TWO, facts=forbid_barrier, folder=folder)
        assert results == [3.0, 3.0]
        seconds.append(time.monotonic() - started)
    assert min(seconds[1:]) < 5


def forbid_barrier(*_):
    from pyspark import BarrierTaskContext

    def refuse(*_):
        raise AssertionError("Spark's own exchange")

    BarrierTaskContext.spark_all_gather = BarrierTaskContext.allGather
    BarrierTaskContext.allGather = refuse
    return {}


def no_barrier(worker, launch):
    from pyspark import BarrierTaskContext

    BarrierTaskContext.allGather = BarrierTaskContext.spark_all_gather  # the process is used again
    return worker.all_reduce_sum(torch.tensor([1.0 + worker.rank])).item()


def die_once(folder, rank):
    """As facts, which ranks tell each other before they join: one of them dies while another waits for it."""
    from pyspark import BarrierTaskContext

    me = BarrierTaskContext.get().partitionId()
    if me == rank and not Path(folder, "died").exists():
        time.sleep(0.5)
        Path(folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def rank_of(worker, folder, rank):
    return worker.rank, worker.attempt


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_while_the_ranks_find_together(spark, tmp_path, rank):
    args = (str(tmp_path), rank)
    results = barrier.run(spark, rank_of, args, workers=TWO, facts=die_once, folder=str(tmp_path), limit_seconds=60)
    assert [result[0] for result in results] == [0, 1]
    assert results[0][1] == results[1][1]
    assert not list(tmp_path.glob("failures/*"))


def test_too_few_slots_are_an_error_at_once(spark):
    started = time.monotonic()
    with pytest.raises(LaunchError) as error:
        barrier.run(spark, introduce, ("x",), workers=TWO.model_copy(update={"count": 4, "slots_wait_seconds": 60}))
    assert "workers.count is 4, but local[2] has 2 slots: set workers.count to at most 2" in str(error.value)
    assert time.monotonic() - started < 5


def kill_once(worker, folder, rank):
    """A rank dies by SIGKILL in the first attempt, in the middle of a collective of the others."""
    attempt = len(list(Path(folder).glob(f"rank-{worker.rank}-*")))
    Path(folder, f"rank-{worker.rank}-{attempt}").touch()
    worker.wait_for_all()
    if worker.rank == rank and attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt, worker.all_reduce_sum(torch.ones(1)).item()


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_worker_restarts_the_gang(spark, tmp_path, rank):
    assert barrier.run(spark, kill_once, (str(tmp_path), rank), workers=TWO) == [(1, 2.0), (1, 2.0)]


def break_one_rank(folder):
    """As facts, which ranks tell before they join: in the first attempt, one of them will not be able to."""
    from pipeline.distributed import worker

    def refuse(*_):
        raise RuntimeError("Connection closed by peer")

    with contextlib.suppress(FileExistsError):
        Path(folder, "broken").touch(exist_ok=False)
        worker.process_group = refuse
    return {}


def sum_of_ones(worker, folder):
    return worker.all_reduce_sum(torch.ones(1)).item()


def test_a_rank_that_cannot_join_is_started_anew(spark, tmp_path):
    """In a new process: torch counts groups, and the ranks would look for one another under other names."""
    for _ in range(2):
        assert barrier.run(spark, sum_of_ones, (str(tmp_path),), workers=TWO, facts=break_one_rank) == [2.0, 2.0]


def end_well_beside_the_dead(worker, folder):
    """Rank 0 dies in the first attempt while rank 1 has nothing left to do but to end."""
    first = not Path(folder, f"{worker.rank}").exists()
    Path(folder, f"{worker.rank}").touch()
    worker.wait_for_all()
    if worker.rank == 0 and first:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return first


def test_a_rank_that_ends_while_another_dies_is_part_of_the_next_gang(spark, tmp_path):
    """Spark would take its output as done, and start the next gang without it."""
    assert barrier.run(spark, end_well_beside_the_dead, (str(tmp_path),), workers=TWO, limit_seconds=90) == [
        False,
        False,
    ]


def same_rows(batches):
    yield from batches


def test_too_few_slots_are_looked_for_again_with_a_new_plan(spark):
    """An adaptive plan that has failed only repeats its failure: after the wait there must be slots to be found."""
    tries = []

    def stage():
        tries.append(time.monotonic())
        count = 2 if len(tries) == 3 else 3
        tasks = spark.range(0, count, 1, count)
        return tasks.mapInArrow(same_rows, "id long", barrier=True).repartition(1)

    workers = TWO.model_copy(update={"count": 3, "slots_wait_seconds": 60})
    rows = barrier.collect_when_slots_allow(spark, stage, Guard(workers))
    assert sorted(row.id for row in rows) == [0, 1]
    assert len(tries) == 3


def kill_always(worker):
    worker.wait_for_all()
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    worker.wait_for_all()


def test_a_worker_that_always_dies_ends_the_stage(spark):
    with pytest.raises(LaunchError, match="Spark gave up the barrier stage of 2 workers"):
        barrier.run(spark, kill_always, workers=TWO)
