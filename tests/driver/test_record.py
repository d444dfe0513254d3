"""Records: what was begun is found again, and a process that trains is told apart from one that has ended."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from flaky_storage import FlakyFileSystem

from pipeline import storage
from pipeline.driver import record
from pipeline.driver.record import BusyError, Record, finished_record, slug, unfinished_record
from pipeline.telemetry import heartbeat


@pytest.fixture
def other_process():
    """A process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def written_by(folder, pid, *, host=None, started=None, **fields):
    """A record that another process has written."""
    driver = {"host": host or socket.gethostname(), "pid": pid, "started": started or record._started(pid)}
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(json.dumps({"driver": driver, "name": "a", **fields}))
    return Record(str(folder))


def test_what_is_not_finished_is_found_again_and_what_is_gets_a_successor(tmp_path):
    root = str(tmp_path)
    first = unfinished_record(root, "a b/c", {"seed": 0})
    assert finished_record(root, "a b/c", {"seed": 0}) is None
    first.claim("a b/c")
    assert Path(first.folder).name.startswith("a-b-c-")
    assert unfinished_record(root, "a b/c", {"seed": 0}).content == first.content
    assert unfinished_record(root, "a b/c", {"seed": 1}).folder != first.folder
    for number in (1, 2, 3):
        unfinished_record(root, "a b/c", {"seed": 0}).update(result="done")
        newest = finished_record(root, "a b/c", {"seed": 0})
        assert newest.folder == first.folder + (f"-{number}" if number > 1 else "")
    assert not unfinished_record(root, "a b/c", {"seed": 0}).finished


def test_the_file_has_the_keys_that_were_set_in_one_order(tmp_path):
    begun = Record(str(tmp_path))
    begun.claim("a")
    begun.update(run_id="1")
    begun.update(result="runs/comparison.json")
    tree = json.loads((tmp_path / "record.json").read_text())
    assert list(tree) == ["driver", "name", "run_id", "result"]
    assert tree["driver"] == {
        "host": socket.gethostname(), "pid": os.getpid(), "started": record._started(os.getpid())
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", '{"driver": 3}'])
def test_a_damaged_record_is_empty(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    damaged = Record(str(tmp_path))
    assert not damaged.finished
    damaged.claim("a")


@pytest.fixture
def flaky(tmp_path):
    """The address of a folder on storage that fails when it is told to."""
    yield f"flaky://{tmp_path}"
    FlakyFileSystem.failures.clear()
    FlakyFileSystem.halves.clear()


def test_a_record_that_cannot_be_read_for_a_moment_is_waited_for(tmp_path, flaky, monkeypatch):
    """One that seems to be gone would be begun anew, over what was finished."""
    Record(str(tmp_path)).update(result="done")
    FlakyFileSystem.failures["record.json"], FlakyFileSystem.halves["record.json"] = 2, 1
    assert Record(flaky).finished
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.3)
    FlakyFileSystem.failures["record.json"] = math.inf
    with pytest.raises(storage.StorageError, match=r"record\.json cannot be used: ThrottledError: 503 SlowDown"):
        Record(flaky)


def test_a_process_that_runs_is_not_disturbed(tmp_path, other_process):
    begun = written_by(tmp_path, other_process.pid)
    with pytest.raises(BusyError, match=rf"is being trained by process {other_process.pid} on "):
        begun.claim("a")
    written_by(tmp_path, other_process.pid, result="done").claim("a")  # it has ended what it did there


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_start_of_a_process_is_what_earlier_versions_wrote(other_process):
    ticks = Path(f"/proc/{other_process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert record._started(other_process.pid) == ticks


def test_a_process_that_has_ended_is_succeeded(tmp_path, other_process):
    begun = written_by(tmp_path, other_process.pid)
    other_process.kill()
    while psutil.Process(other_process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    begun.claim("a")  # a zombie trains nothing
    begun = written_by(tmp_path, other_process.pid, started="123")
    other_process.wait()
    begun.claim("a")
    assert begun.content.driver.pid == os.getpid()


def test_a_number_that_another_process_has_got_is_no_driver(tmp_path, other_process):
    written_by(tmp_path, other_process.pid, started="123").claim("a")


def test_a_driver_of_another_host_is_alive_as_long_as_its_workers_show_themselves(tmp_path, monkeypatch):
    begun = written_by(tmp_path, 1, host="elsewhere", started="1")
    ranks = tmp_path / heartbeat.RANKS
    ranks.mkdir(parents=True)
    (ranks / "0").write_text("one beat")
    monkeypatch.setattr(record.time, "sleep", lambda seconds: (ranks / "0").write_text("the next beat"))
    with pytest.raises(BusyError, match="process 1 on elsewhere"):
        begun.claim("a")
    monkeypatch.setattr(record.time, "sleep", lambda seconds: None)
    begun.claim("a")


def test_names_become_names_of_files():
    assert slug("small batch seed=0") == "small-batch-seed=0"
    assert slug(" a/b: c_1.5 ") == "a-b-c_1.5"
