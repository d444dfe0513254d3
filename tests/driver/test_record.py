"""Records: what was begun is found again, and a process that trains is told apart from one that has ended."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from flaky_storage import FlakyFileSystem

from pipeline import storage
from pipeline.driver import lease
from pipeline.driver.lease import BusyError
from pipeline.driver.record import Record, finished_record, slug, unfinished_record


@pytest.fixture
def other_process():
    """A process that lives as long as the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def written_by(folder, pid, *, host=None, started=None, **fields):
    """A record that another process has written."""
    driver = {"host": host or socket.gethostname(), "pid": pid, "started": started or lease._started(pid)}
    folder.mkdir(parents=True)
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
    assert list(tree) == ["driver", "name", "run_mark", "run_id", "result"]
    driver = {"host": socket.gethostname(), "pid": os.getpid(), "started": lease._started(os.getpid())}
    assert tree["driver"] == {**driver, "machine": lease._machine(), "since": begun.content.driver.since}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"driver": 3}'])
def test_a_damaged_record_is_empty(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    damaged = Record(str(tmp_path))
    assert not damaged.finished
    damaged.claim("a")
    assert json.loads((tmp_path / "record-0002.json").read_text())["name"] == "a"
    assert Record(str(tmp_path)).content.driver.pid == os.getpid()


@pytest.fixture
def flaky(tmp_path):
    """The address of a folder on storage that fails when it is told to."""
    yield f"flaky://{tmp_path}"
    FlakyFileSystem.failures.clear()
    FlakyFileSystem.halves.clear()


def test_a_record_that_cannot_be_read_for_a_moment_is_waited_for(tmp_path, flaky):
    """One that seems to be gone would be begun anew, over what was finished."""
    Record(str(tmp_path)).update(result="done")
    FlakyFileSystem.failures["record.json"], FlakyFileSystem.halves["record.json"] = 2, 1
    assert Record(flaky).finished
    FlakyFileSystem.failures["record.json"] = math.inf
    message = r"record\.json cannot be read from \S+: ThrottledError: 503 SlowDown"
    with storage.retry_for(0.3), pytest.raises(storage.UnreachableError, match=message):
        Record(flaky)


def test_a_process_that_runs_is_not_disturbed(tmp_path, other_process):
    begun = written_by(tmp_path / "runs", other_process.pid)
    with pytest.raises(BusyError, match=rf"is being trained by process {other_process.pid} on "):
        begun.claim("a")
    written_by(tmp_path / "done", other_process.pid, result="done").claim("a")  # it has ended what it did there


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_start_of_a_process_is_what_earlier_versions_wrote(other_process):
    ticks = Path(f"/proc/{other_process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert lease._started(other_process.pid) == ticks


def test_a_process_that_has_ended_is_succeeded(tmp_path, other_process):
    begun = written_by(tmp_path / "zombie", other_process.pid)
    other_process.kill()
    while psutil.Process(other_process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    begun.claim("a")  # a zombie trains nothing
    begun = written_by(tmp_path / "ended", other_process.pid, started="123")
    other_process.wait()
    begun.claim("a")
    assert begun.content.driver.pid == os.getpid()


def test_a_number_that_another_process_has_got_is_no_driver(tmp_path, other_process):
    written_by(tmp_path / "begun", other_process.pid, started="123").claim("a")


def test_a_record_that_is_finished_while_one_looks_is_not_begun_anew(tmp_path):
    late = Record(str(tmp_path))
    with Record(str(tmp_path)).claim("a"):
        Record(str(tmp_path)).update(result="done")
    with pytest.raises(BusyError, match=rf"just been finished by process {os.getpid()} on .*: give the command again"):
        late.claim("a")


def test_a_driver_of_an_earlier_version_on_another_host_has_its_time(tmp_path):
    begun = written_by(tmp_path / "a", 1, host="elsewhere", started="1")
    began_at = time.monotonic()
    begun.claim("a", seconds=0.5)
    assert 0.5 <= time.monotonic() - began_at < lease.LEASE_SECONDS / 2  # it was not given the usual time


def test_names_become_names_of_files():
    assert slug("small batch seed=0") == "small-batch-seed=0"
    assert slug(" a/b: c_1.5 ") == "a-b-c_1.5"


@pytest.mark.parametrize("letter", ["a", "ä", "字", "𠀀"])
@pytest.mark.parametrize("letters", [20, 60, 80, 300])
def test_a_name_of_wide_letters_is_no_longer_than_disks_allow(tmp_path, letter, letters):
    names = [letter * letters + end for end in ("", "b")]
    for name in names:
        begun = unfinished_record(str(tmp_path), name, {"seed": 0})
        begun.claim(name)
        begun.update(result="done")
        assert finished_record(str(tmp_path), name, {"seed": 0}).folder == begun.folder
    folders = [path.name for path in tmp_path.iterdir()]
    assert len(folders) == 2
    assert all(re.fullmatch(f"({letter})+b?-[0-9a-f]{{12}}", folder) for folder in folders)
    assert all(len(folder.encode()) <= 163 for folder in folders)


def test_the_record_of_a_long_name_that_an_earlier_version_began_is_found(tmp_path):
    name = 70 * "字"
    new = Path(unfinished_record(str(tmp_path), name, {}).folder)
    earlier = tmp_path / f"{name}{new.name[-13:]}"
    Record(str(earlier)).claim(name)
    assert unfinished_record(str(tmp_path), name, {}).folder == str(earlier)


def test_names_that_fit_keep_the_folders_of_earlier_versions(tmp_path):
    found = [unfinished_record(str(tmp_path), name, {"seed": 0}).folder for name in ("small batch seed=0", 90 * "x")]
    assert found == [f"{tmp_path}/small-batch-seed=0-fb23f5907a40", f"{tmp_path}/{80 * 'x'}-0a1c0c7c6ef9"]
