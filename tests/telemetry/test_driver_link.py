"""Signs of life that go straight to the driver, and into storage where it cannot be reached: real sockets and beats."""

import contextlib
import json
import socket
import time
from dataclasses import asdict

import pytest

from pipeline import storage
from pipeline.cluster.failures import Failure, failure_path
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry import driver_link, heartbeat
from pipeline.telemetry.driver_link import DriverAddress, DriverLink, listening
from pipeline.telemetry.heartbeat import Heartbeat, RankProcess, Status

WORKERS = WorkerSettings(count=1, device="cpu", heartbeat_seconds=0.1, stall_seconds=1)
LOOPBACK = "127.0.0.1"


def beating(folder, status, driver, *, attempt=None):
    process = RankProcess(rank=0, world_size=1, host="here", pid=1, device="cpu")
    attempt = attempt or heartbeat.next_attempt(folder)
    return Heartbeat(folder, status, attempt, process, seconds=0.05, stall_seconds=100, driver=driver).running()


def files_of_ranks(folder):
    return storage.names(storage.join(folder, heartbeat.RANKS))


def wait_until(condition):
    give_up_at = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return found


@pytest.fixture
def closed_port():
    with socket.create_server((LOOPBACK, 0)) as listener:
        return listener.getsockname()[1]


def test_a_rank_that_reaches_its_driver_asks_storage_for_nothing(remote):
    watch, status = Watch(remote, WORKERS), Status()
    with listening(LOOPBACK, LOOPBACK, watch.hear) as driver, beating(remote, status, driver):
        status.enter("forward", step=7)

        def seen():
            watch.read_heartbeats()
            return "rank 0 on here in forward at step 7" in watch.positions()

        wait_until(seen)
    watch.read_heartbeats()
    assert watch.silent_seconds >= 0
    assert files_of_ranks(remote) == []


def test_a_rank_that_hangs_is_named_with_the_stack_that_it_has_told(remote):
    watch, attempt = Watch(remote, WORKERS), heartbeat.next_attempt(remote)
    process = RankProcess(rank=0, world_size=1, host="here", pid=1, device="cpu")
    with listening(LOOPBACK, LOOPBACK, watch.hear) as driver:
        beat = Heartbeat(remote, Status(), attempt, process, seconds=0.05, stall_seconds=1, driver=driver)
        with beat.running():

            def stalled():
                watch.read_heartbeats()
                return watch.stall()

            stall = wait_until(stalled)
    assert "rank 0 on here (cpu) has been in start at step 0 for 1 s" in stall
    assert "test_driver_link.py" in stall
    assert files_of_ranks(remote) == []


def test_a_driver_that_cannot_be_reached_is_told_in_storage(remote, closed_port):
    with beating(remote, Status(), DriverAddress(LOOPBACK, closed_port, "x")):
        assert heartbeat.read_beat(remote, 0).phase == "start"
    assert heartbeat.read_beat(remote, 0).ended


def test_a_driver_that_goes_away_is_told_in_storage_by_the_next_beat(remote):
    watch, status = Watch(remote, WORKERS.model_copy(update={"stall_seconds": 100})), Status()
    with contextlib.ExitStack() as server:
        driver = server.enter_context(listening(LOOPBACK, LOOPBACK, watch.hear))
        with beating(remote, status, driver):
            wait_until(lambda: watch.read_heartbeats() or watch.positions())
            assert files_of_ranks(remote) == []
            server.close()
            status.enter("forward", step=9)

            def seen():
                watch.read_heartbeats(now=True)
                assert watch.silent_seconds < 1
                return "at step 9" in watch.positions()

            wait_until(seen)
            assert files_of_ranks(remote) == ["rank-00000.json"]


def test_a_driver_that_hangs_delays_a_beat_by_a_bounded_time_and_is_then_left_alone(remote, monkeypatch):
    """Its system takes the connection, and nobody answers."""
    monkeypatch.setattr(driver_link, "TELL_SECONDS", 0.3)
    with socket.create_server((LOOPBACK, 0)) as listener:
        link = DriverLink(DriverAddress(LOOPBACK, listener.getsockname()[1], "x"))
        began = time.monotonic()
        assert not any(link.tell("{}") for _ in range(100))
        assert 0.2 < time.monotonic() - began < 5


def test_strangers_and_what_is_no_beat_are_not_heard_and_do_no_harm(remote):
    heard, watch = [], Watch(remote, WORKERS)

    def hear(text):
        watch.hear(text)
        heard.append(text)

    beat = {"rank": 0, "world_size": 1, "host": "h", "pid": 1, "device": "cpu", "attempt": "a", "phase": "start",
            "epoch": 0, "step": 0, "waits": False, "for_seconds": 0.0, "time": 1.0, "ended": False}  # fmt: skip
    with listening(LOOPBACK, LOOPBACK, hear) as driver:
        assert not DriverLink(DriverAddress(LOOPBACK, driver.port, "guessed")).tell(json.dumps(beat))
        assert not DriverLink(driver).tell("{}")
        assert not DriverLink(driver).tell(json.dumps({**beat, "rank": "one"}))
        for garbage in (b"", b"\n", b"[]\n", b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n"):
            with socket.create_connection((LOOPBACK, driver.port), 5) as connection:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(100) == b""
        assert heard == []
        assert DriverLink(driver).tell(json.dumps(beat))
    assert len(heard) == 1


def test_a_failure_is_found_where_all_ranks_tell_how_they_are_and_nothing_is_listed(s3, bucket):
    watch, attempt = Watch(bucket, WORKERS), heartbeat.next_attempt(bucket)
    beat = {"rank": 0, "world_size": 1, "host": "there", "pid": 1, "device": "cpu", "attempt": attempt.id,
            "phase": "forward", "epoch": 0, "waits": False, "for_seconds": 0.0, "ended": False, "step": 1,
            "next_seconds": 10.0, "time": 1.0}  # fmt: skip
    watch.hear(json.dumps(beat))
    watch.read_heartbeats(now=True)
    assert watch.positions()
    storage.publish(
        failure_path(bucket, attempt.id), json.dumps(asdict(Failure(0, "h", "E: x", "", False, 1.0))).encode()
    )
    s3.faults.requests.clear()
    watch.read_heartbeats(now=True)
    assert [request.kind for request in s3.faults.requests] == ["GET"]
    assert watch._failure is not None
    watch.read_heartbeats(now=True)
    assert len(s3.faults.requests) == 1


def test_of_two_ways_the_later_beat_counts(remote):
    """A beat that lies in storage may be read after a later one was told."""
    watch, attempt = Watch(remote, WORKERS), heartbeat.next_attempt(remote)
    beat = {"rank": 0, "world_size": 1, "host": "there", "pid": 1, "device": "cpu", "attempt": attempt.id,
            "phase": "forward", "epoch": 0, "waits": False, "for_seconds": 0.0, "ended": False,
            "next_seconds": 0.1}  # fmt: skip
    storage.publish_json(heartbeat.beat_path(remote, 0), {**beat, "step": 1, "time": 1.0, "number": 1})
    watch.hear(json.dumps({**beat, "step": 2, "time": 2.0, "number": 2}))
    watch.read_heartbeats(now=True)
    assert "at step 2" in watch.positions()
    time.sleep(0.3)  # storage is looked at again where a rank tells nothing more
    watch.read_heartbeats(now=True)
    assert "at step 2" in watch.positions()
    set_back = {**beat, "step": 3, "time": 1.5, "number": 3}  # its clock
    storage.publish_json(heartbeat.beat_path(remote, 0), set_back)
    watch.read_heartbeats(now=True)
    assert "at step 3" in watch.positions()


def test_a_driver_that_cannot_listen_has_its_ranks_use_storage():
    with listening("192.0.2.1", "192.0.2.1", print) as driver:  # no address of this machine
        assert driver is None
    assert not DriverLink(None).tell("{}")


def test_an_ipv6_address_may_be_in_brackets():
    """As Spark gives it out."""
    heard = []
    with listening("[::1]", "[::1]", heard.append) as driver:
        if driver is None and not _has_ipv6():
            pytest.skip("this machine has no IPv6")
        assert driver.host == "::1"
        assert DriverLink(driver).tell("beat")
    assert heard == ["beat"]


def _has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False
