"""Leases: of several drivers one has the folder, and one that was believed dead writes nothing that is read."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from record_claims import claim_at, process_on

from pipeline import storage
from pipeline.cluster.stop import Stop
from pipeline.driver import lease as leases
from pipeline.driver.lease import BusyError, TakenOverError, this_process
from pipeline.driver.record import Record

PROGRAM = Path(__file__).parents[1] / "support" / "record_claims.py"
REPOSITORY = Path(__file__).parents[2]
# Of the leases of these tests: long against the pauses of a busy machine, short to wait for.
SECONDS = 3.0


class Driver:
    """A driver in a process of its own that has claimed the record of a folder."""

    def __init__(self, folder, host=""):
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(SECONDS), host],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        self.number = self.told()["number"]

    @property
    def pid(self):
        return self.process.pid

    def told(self):
        """The next line that it prints."""
        return json.loads(self.process.stdout.readline())

    def write(self, run_id):
        self.process.stdin.write(f"{run_id}\n")
        self.process.stdin.flush()

    def wait_for(self, *states):
        while psutil.Process(self.pid).status() not in states:
            time.sleep(0.01)


@contextmanager
def driver_in(folder, host=""):
    driver = Driver(folder, host)
    try:
        yield driver
    finally:
        driver.process.kill()
        driver.process.wait()
        driver.process.stdout.close()


def read_all(folder):
    """The records in a folder by the names of their files."""
    return {path.name: json.loads(path.read_text()) for path in Path(folder).glob("record*.json")}


def claimed_elsewhere(folder, seconds=SECONDS, host="elsewhere"):
    return Record(str(folder)).claim("a", process=process_on(host), seconds=seconds)


@pytest.fixture(scope="module")
def two_processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for answer in [pool.submit(claim_at, 0.0, "memory://warm", "", 1.0, 0.5) for _ in range(2)]:
            answer.result(60)
        yield pool


@pytest.mark.parametrize("hosts", [("", ""), ("one", "other")])
@pytest.mark.parametrize("begun_before", [False, True])
def test_of_two_drivers_at_once_one_has_the_record_and_the_other_is_told(two_processes, tmp_path, hosts, begun_before):
    """Rounds of two real processes that claim at the same moment, a new record or one whose driver has died."""
    for number in range(13):
        folder = tmp_path / f"{number}"
        if begun_before:
            with pytest.raises(ZeroDivisionError), Record(str(folder)).claim("a"):
                raise ZeroDivisionError
        moment = time.time() + 0.02
        calls = [two_processes.submit(claim_at, moment, str(folder), host, 0.3, 0.15) for host in hosts]
        answers = sorted(call.result(60) for call in calls)
        (done,) = [answer for answer in answers if answer.startswith("done by ")]
        (told,) = [answer for answer in answers if not answer.startswith("done by ")]
        winner = Record(str(folder))
        assert winner.content.result == done.replace("done by", "of")
        busy = rf"is being trained by process {winner.content.driver.pid} on|has just been finished by process"
        assert re.search(busy, told)
        assert len(read_all(folder)) == 1 + begun_before


def test_a_driver_of_another_host_that_renews_its_lease_is_not_disturbed(tmp_path, caplog):
    with driver_in(tmp_path) as driver:
        for _ in range(2):
            began_at = time.monotonic()
            with pytest.raises(BusyError, match=rf"trained by process {driver.pid} on \S+: wait for it, end it"):
                claimed_elsewhere(tmp_path)
            assert time.monotonic() - began_at < SECONDS
        assert "waiting up to 3 s for a sign of its life" in caplog.text
        driver.write("goes on")
        assert driver.told() == {"wrote": "goes on"}
    assert list(read_all(tmp_path)) == ["record.json"]


def test_a_driver_that_was_killed_is_succeeded_at_once_here_and_elsewhere_when_its_lease_ends(tmp_path):
    for host, least, most in (("", 0.0, 1.0), ("elsewhere", SECONDS, SECONDS + 2)):
        folder = tmp_path / f"killed-{host}"
        with driver_in(folder) as driver:
            driver.write("7")
            driver.told()
            driver.process.kill()
            driver.process.wait()
            record, began_at = Record(str(folder)), time.monotonic()
            with record.claim("a", process=process_on(host), seconds=SECONDS) as lease:
                assert least <= time.monotonic() - began_at < most
                assert (lease.number, record.content.run_id) == (2, "7")


@pytest.mark.parametrize("stopped", ["between two writes", "between its look and its write"])
def test_a_driver_that_comes_back_writes_nothing_that_is_read_and_is_told_who_took_over(tmp_path, stopped):
    with driver_in(tmp_path) as old:
        old.write("before")
        assert old.told() == {"wrote": "before"}
        if stopped == "between two writes":
            old.process.send_signal(signal.SIGSTOP)
        else:
            old.write("slow")
        old.wait_for(psutil.STATUS_STOPPED)
        began_at = time.monotonic()
        record = Record(str(tmp_path))
        with record.claim("a", process=process_on("elsewhere"), seconds=SECONDS) as lease:
            assert time.monotonic() - began_at >= SECONDS
            assert record.content.run_id == "before"
            record.update(run_id="after")
            old.process.send_signal(signal.SIGCONT)
            if stopped == "between two writes":
                old.write("late")
            else:  # what it was about to write is in a file that nobody reads any more
                assert old.told() == {"wrote": "slow"}
                assert read_all(tmp_path)["record.json"]["run_id"] == "slow"
                old.process.stdin.close()
            told = old.told()
            since = record.content.driver.since
            assert told["error"] == "TakenOverError"
            assert f"was taken over by process {os.getpid()} on elsewhere at {since}" in told["text"]
            assert datetime.now(UTC) - datetime.fromisoformat(since) < timedelta(minutes=1)
            lease.check()
            assert Record(str(tmp_path)).content.run_id == "after"
            record.update(result="done")
    newest = Record(str(tmp_path))
    assert newest.finished
    assert newest.content.driver.host == "elsewhere"


def test_a_driver_that_has_ended_leaves_its_folder_free_for_all(tmp_path):
    with pytest.raises(ZeroDivisionError), Record(str(tmp_path)).claim("a", seconds=60):
        raise ZeroDivisionError
    for number, host in enumerate(("elsewhere", "", "a third"), 2):
        began_at = time.monotonic()
        with claimed_elsewhere(tmp_path, 60, host) as lease:
            assert lease.number == number
        assert time.monotonic() - began_at < 1


def test_the_same_process_does_not_train_twice_at_once(tmp_path):
    with Record(str(tmp_path)).claim("a"), pytest.raises(BusyError, match=f"process {os.getpid()} on"):
        Record(str(tmp_path)).claim("a")
    with Record(str(tmp_path)).claim("a"):
        pass


def test_it_is_the_machine_and_not_the_name_of_a_host_that_a_process_is_known_on(tmp_path):
    """Two containers may have one host name, with processes of the same numbers; and a host may be renamed."""
    with driver_in(tmp_path / "a") as driver:
        twin = this_process().model_copy(update={"machine": "another"})
        with pytest.raises(BusyError):
            Record(str(tmp_path / "a")).claim("a", process=twin, seconds=SECONDS)
        renamed = this_process().model_copy(update={"host": "renamed"})
        driver.process.kill()
        driver.process.wait()
        began_at = time.monotonic()
        with Record(str(tmp_path / "a")).claim("a", process=renamed, seconds=SECONDS):
            assert time.monotonic() - began_at < 1


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00.000+00:00", "2099-01-01T00:00:00.000+00:00"])
def test_the_clocks_of_hosts_are_not_compared(tmp_path, since):
    other = process_on("elsewhere").model_copy(update={"since": since})
    with Record(str(tmp_path)).claim("a", process=other, seconds=0.5):
        os.utime(tmp_path / "record.json", (0, 0))
        with pytest.raises(BusyError):
            Record(str(tmp_path)).claim("a", seconds=0.5)
    Path(tmp_path, "lease.json").write_text('{"renewals": 3}')  # as if it had not come to its end
    Record(str(tmp_path)).claim("a", seconds=0.5)


def test_the_loss_of_a_lease_stops_what_runs_and_hides_the_errors_that_follow_from_it(tmp_path):
    stop = Stop()
    with (
        pytest.raises(TakenOverError, match="was taken over by process") as told,
        Record(str(tmp_path)).claim("a", stop=stop, seconds=0.6),
    ):
        Path(tmp_path, "record-0002.json").write_text((tmp_path / "record.json").read_text())
        assert stop.wait(10)
        raise RuntimeError("the gang was lost")
    assert "the gang was lost" in str(told.value.__cause__)
    assert not (tmp_path / "lease-0002.json").exists()


def test_storage_that_fails_for_a_while_takes_no_lease_away(tmp_path, monkeypatch, caplog):
    record = Record(str(tmp_path))
    with record.claim("a", seconds=1.5) as lease:
        with monkeypatch.context() as outage:

            def fail(*_, **__):
                raise OSError("503 Slow Down")

            outage.setattr(storage, "publish", fail)
            outage.setattr(storage, "names", fail)
            assert lease.holds()  # renewed less than its seconds ago: nobody may have taken it
            time.sleep(2)
            for look in (lease.holds, lease.check):  # somebody may have
                with pytest.raises(OSError, match="Slow Down"):
                    look()
            assert caplog.text.count("could not be renewed: 503 Slow Down") == 1
        time.sleep(1)
        assert lease.holds()
        record.update(run_id="7")
    assert Record(str(tmp_path)).content.run_id == "7"


def test_a_lease_holds_for_all_trials_of_a_study(tmp_path):
    """Who has taken the study over goes on with a trial at once; who had it before cannot write there any more."""
    study, trial = str(tmp_path / "study"), str(tmp_path / "trial")
    with pytest.raises(TakenOverError), Record(study).claim("study", seconds=60) as lost:
        old = Record(trial)
        old.join(lost, "trial")
        old.update(run_id="7")
        Path(study, "lease.json").unlink(missing_ok=True)  # it is renewed after 20 s
        with Record(study).claim("study", process=process_on("elsewhere"), seconds=0.2) as lease:
            new = Record(trial)
            new.join(lease, "trial")
            with pytest.raises(TakenOverError):
                old.update(result="late")
            with pytest.raises(TakenOverError):
                Record(trial).join(lost, "trial")
            new.update(result="done")
    assert sorted(read_all(trial)) == ["record-0002.json", "record.json"]
    assert (Record(trial).content.run_id, Record(trial).content.result) == ("7", "done")


def test_what_is_written_is_small(tmp_path):
    with Record(str(tmp_path)).claim("a", seconds=0.3):
        time.sleep(0.5)
        assert (tmp_path / "lease.json").stat().st_size < 50
    assert json.loads((tmp_path / "lease.json").read_text())["released"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease.json", "record.json"]
    assert leases.newest_number(str(tmp_path)) == 1


def test_a_lease_of_what_is_finished_is_not_given_back_since_nobody_asks_for_it(tmp_path):
    record = Record(str(tmp_path))
    with record.claim("a", seconds=60):
        record.update(result="done")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json"]
    with Record(str(tmp_path)).claim("a", process=process_on("elsewhere"), seconds=60):  # at once
        pass
