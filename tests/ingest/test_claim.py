"""Claims to a dataset: of jobs at once, of a job that died, of one that was believed dead."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from pipeline.data.manifest import DatasetError
from pipeline.ingest import claim
from pipeline.ingest.claim import claimed

# Long enough that a busy machine does not keep a living job from showing itself.
SHORT_SECONDS = 5.0


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(claim, "LEASE_SECONDS", SHORT_SECONDS)


@pytest.fixture
def shorter(monkeypatch):
    """For claims that nobody is to renew."""
    monkeypatch.setattr(claim, "LEASE_SECONDS", 0.5)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def die(held):
    """What remains of a claim whose process was killed: its file, which nobody renews."""
    held._ended.set()
    held._thread.join()


def test_the_second_is_told_of_the_first(tmp_path):
    with claimed(str(tmp_path), "local-1") as first:
        told = r"is being written by process \d+ on \S+ since \S+ \(Spark application local-1\): run this again when"
        with pytest.raises(DatasetError, match=told), claimed(str(tmp_path), "local-2"):
            pass
        assert first.holds()
    with claimed(str(tmp_path), "local-2") as second:
        second.check()
    # The last one stays, so that no number is used twice.
    assert files_in(tmp_path) == ["claim-0002.json"]
    assert json.loads((tmp_path / "claim-0002.json").read_text())["released"]


def test_a_claim_whose_file_is_just_replaced_is_not_gone(tmp_path, monkeypatch):
    """Where that is done by deleting it and writing it anew, as on HDFS."""
    monkeypatch.setattr(claim, "_READS", 100)  # a busy machine writes it late
    with claimed(str(tmp_path), "local-1") as first:
        die(first)  # what is missing here is not written by it
        path, away = tmp_path / "claim-0001.json", tmp_path / "away"
        for look, seen in ((first.check, None), (lambda: claim._read(str(tmp_path), 1).application, "local-1")):
            path.rename(away)
            timer = threading.Timer(0.2, away.rename, [path])
            timer.start()
            assert look() == seen
            timer.join()


def test_who_waits_gets_it_where_the_first_ends_meanwhile(tmp_path):
    with ExitStack() as stack:
        die(stack.enter_context(claimed(str(tmp_path), "local-1")))  # not renewed, so that nobody is told of it
        timer = threading.Timer(SHORT_SECONDS / 10, stack.pop_all().close)
        timer.start()
        with claimed(str(tmp_path), "local-2") as second:
            second.check()
        timer.join()


def hold_for_a_moment(dataset, barrier, results):
    """In a process of its own: claim a dataset, and say when it was held."""
    claim.LEASE_SECONDS = SHORT_SECONDS
    barrier.wait(60)
    try:
        with claimed(dataset, "local") as held:
            began = time.monotonic()
            time.sleep(1.2 * SHORT_SECONDS)  # longer than a claim that nobody renews lasts
            held.check()
            results.put((began, time.monotonic()))
    except DatasetError as error:
        results.put(str(error))


def test_of_processes_at_once_one_gets_it_and_the_others_are_told(tmp_path):
    context, count = multiprocessing.get_context("fork"), 4
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=hold_for_a_moment, args=(str(tmp_path), barrier, results)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    held = [result for result in found if not isinstance(result, str)]
    assert len(held) == 1
    assert all("is being written by process" in result for result in found if result not in held)


DIES = """
import os, sys
from pipeline.ingest.claim import claimed
with claimed(sys.argv[1], "local-dead"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_claim_of_a_killed_process_ends(tmp_path, caplog, shorter):
    with subprocess.Popen(
        [sys.executable, "-c", DIES, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    began = time.monotonic()
    with claimed(str(tmp_path), "local-2") as second:
        second.check()
    assert time.monotonic() - began >= 0.5
    assert f"was claimed by process {process.pid} on " in caplog.text
    assert "(Spark application local-dead), which shows no sign of life: taken over" in caplog.text
    assert files_in(tmp_path) == ["claim-0002.json"]


def test_who_was_believed_dead_finds_out(tmp_path, shorter):
    with claimed(str(tmp_path), "local-1") as first:
        die(first)
        with claimed(str(tmp_path), "local-2") as second:
            assert not first.holds()
            with pytest.raises(DatasetError, match=r"taken over by process .* local-2\), since this job had shown no"):
                first.check()
            first.release()
            second.check()
        with pytest.raises(DatasetError, match="nothing of it was published"):
            first.check()  # also when the other has ended


def test_a_claim_that_is_half_written_ends_too(tmp_path, shorter):
    (tmp_path / "claim-0003.json").write_bytes(b"")
    with claimed(str(tmp_path), "local-1") as held:
        held.check()
    assert files_in(tmp_path) == ["claim-0004.json"]


def test_storage_that_fails_for_a_while_takes_no_claim_away(tmp_path):
    file, copy, circle = (tmp_path / name for name in ("claim-0001.json", "copy", "circle"))
    with claimed(str(tmp_path), "local-1") as held:
        shutil.copy(file, copy)
        circle.symlink_to(file)
        circle.replace(file)  # to open it is an error from now on
        time.sleep(SHORT_SECONDS / 2)
        copy.replace(file)
        held.check()
        before = file.read_bytes()
        time.sleep(SHORT_SECONDS / 2)
        assert file.read_bytes() != before


def test_where_others_always_come_first_it_ends_with_an_error(tmp_path, shorter, monkeypatch):
    """As on storage whose listings are behind: the file of the next number is there, and nobody sees it."""
    with claimed(str(tmp_path), "local-1") as held:
        die(held)
        monkeypatch.setattr(claim, "_numbers", lambda dataset: [])
        with pytest.raises(DatasetError, match="was claimed by other jobs 20 times"), claimed(str(tmp_path), "local-2"):
            pass
