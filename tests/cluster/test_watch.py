"""Which rank the watch blames, from heartbeats that real ones publish."""

import contextlib
import json
import time
from dataclasses import asdict

import pytest

from pipeline import storage
from pipeline.cluster.errors import GangLostError, LaunchError
from pipeline.cluster.failures import Failure, failure_path
from pipeline.cluster.guard import Guard
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry import heartbeat
from pipeline.telemetry.heartbeat import Heartbeat, RankProcess, Status

WORKERS = WorkerSettings(count=2, device="cpu", heartbeat_seconds=0.1, stall_seconds=1)


@contextlib.contextmanager
def beating(folder, statuses):
    """Ranks that publish where they are, each once at least."""
    attempt = heartbeat.next_attempt(folder)
    with contextlib.ExitStack() as stack:
        for rank, status in enumerate(statuses):
            process = RankProcess(rank=rank, world_size=len(statuses), host="here", pid=1, device="cpu")
            beat = Heartbeat(folder, status, attempt, process, seconds=0.1, stall_seconds=100)
            stack.enter_context(beat.running())
        yield


def blamed(watch):
    give_up_at = time.monotonic() + 30
    while (stall := watch.stall()) is None and time.monotonic() < give_up_at:
        time.sleep(0.1)
        watch.read_heartbeats()
    return stall


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, remote):
    return str(tmp_path) if request.param == "local" else remote


@pytest.mark.parametrize("phase", ["checkpoint", "evaluation", "restore"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_waits_for_the_others_is_not_the_one_that_hangs(folder, monkeypatch, phase, culprit):
    """It may have come to that phase long before the rank that it waits for."""
    monkeypatch.setattr("pipeline.cluster.watch.STACK_SECONDS", 0.0)
    watch, statuses = Watch(folder, WORKERS), [Status(), Status()]
    for rank in (1 - culprit, culprit):
        statuses[rank].enter(phase, step=40)
        time.sleep(0.2)
    with statuses[1 - culprit].waiting(), beating(folder, statuses):
        assert f"rank {culprit} on here (cpu) has been in {phase} at step 40" in blamed(watch)


def test_a_rank_that_is_a_step_behind_is_the_one_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.watch.STACK_SECONDS", 0.0)
    watch, statuses = Watch(str(tmp_path), WORKERS), [Status(), Status()]
    statuses[0].enter("diagnostics", step=41)
    statuses[1].enter("checkpoint", step=40)
    with statuses[1].waiting(), beating(str(tmp_path), statuses):
        assert "rank 1 on here" in blamed(watch)


def test_a_limit_that_the_user_has_not_set_is_not_called_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.watch.STACK_SECONDS", 0.0)
    own, set_by_user = Watch(str(tmp_path), WORKERS, "the limit of doctor"), Watch(str(tmp_path), WORKERS)
    with beating(str(tmp_path), [Status(), Status()]):
        assert " s (the limit of doctor is 1)\n" in blamed(own)
        assert " s (workers.stall_seconds is 1)\n" in blamed(set_by_user)


@pytest.mark.parametrize("arrives", [False, True])
def test_a_stall_is_over_when_another_gang_begins_while_its_stack_is_awaited(remote, monkeypatch, arrives):
    watch, attempt = Watch(remote, WORKERS), heartbeat.next_attempt(remote)
    for rank in range(2):
        publish_beat(remote, attempt, rank, 1, for_seconds=9.0)
    watch.read_heartbeats(now=True)
    sleep = time.sleep

    def begin_another(seconds):
        sleep(seconds)
        publish_beat(remote, heartbeat.next_attempt(remote), 1, 0, stack="of another" if arrives else "")

    monkeypatch.setattr("pipeline.cluster.watch.time.sleep", begin_another)
    assert watch.stall() is None


def publish_beat(folder, attempt, rank, step, **fields):
    beat = {"rank": rank, "world_size": 8, "host": "there", "pid": 1, "device": "cpu", "attempt": attempt.id,
            "phase": "forward", "epoch": 0, "step": step, "waits": False, "for_seconds": 0.0, "time": float(step),
            "ended": False, "next_seconds": 10.0, **fields}  # fmt: skip
    storage.publish(heartbeat.beat_path(folder, rank), json.dumps(beat).encode())


def test_eight_ranks_are_read_by_one_listing_and_what_is_new(s3, bucket):
    folder, workers = f"{bucket}/job", WORKERS.model_copy(update={"count": 8, "stall_seconds": 180})
    watch, attempt = Watch(folder, workers), heartbeat.next_attempt(folder)
    for rank in range(8):
        publish_beat(folder, attempt, rank, 1)
    watch.read_heartbeats()
    assert watch.positions().count("at step 1") == 8
    publish_beat(folder, attempt, 3, 2)
    s3.faults.requests.clear()
    watch.read_heartbeats()  # it is not time: the ranks have said that their next beats come in 10 s
    assert s3.faults.requests == []
    watch.read_heartbeats(now=True)
    assert [request.kind for request in s3.faults.requests] == ["LIST", "GET"]
    assert watch.positions().count("at step 2") == 1


def test_a_damaged_beat_hides_no_other_and_is_read_again(folder):
    watch, attempt = Watch(folder, WORKERS), heartbeat.next_attempt(folder)
    storage.publish(heartbeat.beat_path(folder, 0), b"{")
    publish_beat(folder, attempt, 1, 4)
    watch.read_heartbeats(now=True)
    assert "rank 1 on there in forward at step 4" in watch.positions()
    publish_beat(folder, attempt, 0, 5)
    watch.read_heartbeats(now=True)
    assert "rank 0 on there in forward at step 5" in watch.positions()


@pytest.mark.spark
@pytest.mark.parametrize("content", [b"", b'{"rank": 0}'])
def test_damaged_files_hide_no_silence(spark, tmp_path, content):
    """As a host that lost its power leaves them: what its ranks do not say again must not be waited for."""
    workers = WORKERS.model_copy(update={"slots_wait_seconds": 0.2})
    watch, attempt = Watch(str(tmp_path), workers), heartbeat.next_attempt(str(tmp_path))
    publish_beat(str(tmp_path), attempt, 1, 4, next_seconds=0.1)
    guard = Guard(workers, watch)
    guard.check_ranks(spark)
    storage.publish(heartbeat.beat_path(str(tmp_path), 0), content)
    storage.publish(failure_path(str(tmp_path), attempt.id), content)
    with pytest.raises(GangLostError, match=r"no worker .* for \d+ s .*last seen: rank 1 on there"):
        check_for(30, guard, spark)


def test_a_driver_that_cannot_read_its_folder_says_so_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 2.0)
    workers = WORKERS.model_copy(update={"slots_wait_seconds": 1.0})
    watch, attempt = Watch(str(tmp_path), workers), heartbeat.next_attempt(str(tmp_path))
    publish_beat(str(tmp_path), attempt, 0, 1, next_seconds=0.1)
    guard = Guard(workers, watch)
    guard.check_ranks(None)
    began, ranks = time.monotonic(), tmp_path / heartbeat.RANKS
    ranks.rename(tmp_path / "away")
    ranks.symlink_to(ranks)  # a loop, which no user can follow
    says = r"could not read for \d+ s how .* symbolic links: .*/ranks.*last seen: rank 0 .*same command"
    with pytest.raises(LaunchError, match=says):
        check_for(30, guard, None)
    assert time.monotonic() - began > 1.9


def check_for(seconds, guard, spark):
    """Ask as often as the driver does."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        guard.check_ranks(spark)
        time.sleep(0.05)


def test_beats_of_a_gang_that_was_replaced_are_not_looked_at(folder):
    earlier = heartbeat.next_attempt(folder)
    watch = Watch(folder, WORKERS)
    publish_beat(folder, earlier, 0, 9)
    watch.read_heartbeats(now=True)
    assert watch.positions() == ""
    first = heartbeat.next_attempt(folder)
    publish_beat(folder, first, 0, 1)
    watch.read_heartbeats(now=True)
    second = heartbeat.next_attempt(folder)
    publish_beat(folder, second, 1, 2)
    watch.read_heartbeats(now=True)
    assert watch.positions().startswith("rank 1 on there in forward at step 2")
    publish_beat(folder, first, 0, 3)  # its process has not noticed yet
    watch.read_heartbeats(now=True)
    assert "rank 0" not in watch.positions()


def test_a_failure_that_the_others_do_not_notice_is_found_beside_the_beats(folder, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.watch.FAILURE_GRACE_SECONDS", 0.0)
    watch, attempt = Watch(folder, WORKERS), heartbeat.next_attempt(folder)
    failure = Failure(0, "there", "ValueError: x", "", False, 1.0)
    for rank in range(2):
        publish_beat(folder, attempt, rank, 1, next_seconds=0.1)
    watch.read_heartbeats(now=True)
    assert watch.unnoticed_failure() is None
    storage.publish(failure_path(folder, attempt.id), json.dumps(asdict(failure)).encode())
    publish_beat(folder, attempt, 0, 2, next_seconds=0.1, ended=True)
    give_up_at, step = time.monotonic() + 20, 2
    while (found := watch.unnoticed_failure()) is None and time.monotonic() < give_up_at:
        step += 1
        publish_beat(folder, attempt, 1, step, next_seconds=0.1)
        watch.read_heartbeats(now=True)
        time.sleep(0.05)
    assert found == failure
