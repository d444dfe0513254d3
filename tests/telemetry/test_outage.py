"""A training that is well goes on while its storage is not: a real S3 server that resets connections.

Its driver then raises kinds of its own, which are no OSError.
"""

import threading
import time

import pytest

from pipeline import storage
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings
from pipeline.distributed.worker import alone
from pipeline.telemetry import heartbeat
from pipeline.telemetry.events import EventReader, EventWriter
from pipeline.training.event_log import EventLog


@pytest.fixture
def broken(s3):
    """While ``with broken():`` lasts, no request to S3 is answered."""
    return lambda: s3.faults.at_random(1, 1, kinds=("reset",))


def test_events_are_kept_until_storage_takes_them(bucket, broken):
    folder = f"{bucket}/job"
    writer = EventWriter(folder, 0, flush_seconds=0)
    writer.emit("step", step=1)
    with broken():
        for step in (2, 3, 4):
            writer.emit("step", step=step)
    writer.emit("step", step=5)
    writer.flush()
    assert [event["step"] for event in EventReader(folder).new()] == [1, 2, 3, 4, 5]


def test_a_forced_flush_is_tried_and_a_last_one_must_succeed(bucket, broken):
    folder = f"{bucket}/job"
    log = EventLog(alone(), folder)
    with broken():
        log.emit("evaluation", force=True, step=1)
        with storage.retry_for(0), pytest.raises(OSError, match=f"{folder}/events/.* cannot be written from"):
            log.flush()
    log.flush()
    assert [event["step"] for event in EventReader(f"{folder}/events").new()] == [1]


def test_a_step_waits_for_no_storage(tmp_path, monkeypatch):
    """A driver may take minutes to say that its storage does not answer."""
    publish, begun, may_go_on = storage.publish, threading.Event(), threading.Event()

    def hang(path, data):
        begun.set()
        assert may_go_on.wait(60)
        publish(path, data)

    monkeypatch.setattr(storage, "publish", hang)
    log = EventLog(alone(), str(tmp_path), live=True)
    log.emit("evaluation", force=True, step=0)
    assert begun.wait(60)
    for step in range(1, 1000):
        log.emit("evaluation", force=True, step=step)
    assert EventReader(f"{tmp_path}/events").new() == []  # it hangs to this moment
    may_go_on.set()
    log.close()
    events = EventReader(f"{tmp_path}/events").new()
    assert [event["step"] for event in events] == list(range(1000))
    assert len(storage.names(f"{tmp_path}/events")) <= 3  # what was told while it hung is one file


def test_events_of_a_training_are_stored_while_it_goes_on(tmp_path):
    before = set(threading.enumerate())
    log, reader = EventLog(alone(), str(tmp_path)), EventReader(f"{tmp_path}/events")
    log.emit("evaluation", force=True, step=1)
    give_up_at, events = time.monotonic() + 60, []
    while not events and time.monotonic() < give_up_at:
        events = reader.new()
    assert [event["step"] for event in events] == [1]
    log.close()
    while any(thread.name == "sparknorm-events" for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_storage_that_is_away_is_asked_less_and_less(tmp_path, monkeypatch):
    """A try to write takes what the driver's patience is: tries become rare."""
    tries = []

    def unreachable(path, data):
        tries.append(time.monotonic())
        raise storage.UnreachableError("away")

    monkeypatch.setattr(storage, "publish", unreachable)
    writer = EventWriter(str(tmp_path), 0, flush_seconds=0.01)
    give_up_at = time.monotonic() + 1.5
    while time.monotonic() < give_up_at:
        writer.emit("step", step=1)
        time.sleep(0.01)
    assert len(tries) == 2


def test_heartbeats_are_missed_and_come_again(bucket, broken):
    """Also the first, which is given before training begins, and the last."""
    folder = f"{bucket}/job"
    attempt = heartbeat.next_attempt(folder)
    process = heartbeat.RankProcess(rank=0, world_size=1, host="here", pid=1, device="cpu")
    status = heartbeat.Status()
    status.enter("forward", step=7)
    beats = heartbeat.Heartbeat(folder, status, attempt, process, seconds=0.1, stall_seconds=100)
    with broken(), beats.running():
        pass
    with pytest.raises(FileNotFoundError):
        heartbeat.read_beat(folder, 0)
    again = heartbeat.Heartbeat(folder, status, attempt, process, seconds=0.1, stall_seconds=100)
    with broken():
        running = again.running()
        running.__enter__()
    give_up_at = time.monotonic() + 30
    while not storage.exists(heartbeat.beat_path(folder, 0)) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    assert heartbeat.read_beat(folder, 0).step == 7
    running.__exit__(None, None, None)
    assert heartbeat.read_beat(folder, 0).ended


def test_a_hanging_rank_is_named_also_where_its_stack_cannot_be_read(bucket, s3):
    folder = f"{bucket}/job"
    workers = WorkerSettings(count=1, stall_seconds=1, heartbeat_seconds=1)
    watch = Watch(folder, workers)
    attempt = heartbeat.next_attempt(folder)
    beat = {"rank": 0, "world_size": 1, "host": "there", "pid": 1, "device": "cpu", "attempt": attempt.id,
            "phase": "forward", "epoch": 0, "step": 7, "waits": False, "for_seconds": 9.0, "time": 1.0,
            "ended": False}  # fmt: skip
    storage.publish_json(heartbeat.beat_path(folder, 0), beat)
    watch.read_heartbeats()
    with s3.faults.at_random(1, 1, kinds=("unavailable",)):
        assert "rank 0 on there (cpu) has been in forward at step 7" in (watch.stall() or "")
