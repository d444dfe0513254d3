"""Two processes that append to one dataset at the same moment, that are killed, and on storage like HDFS."""

import hashlib
import json
import random
import re
import time
from collections import Counter, deque
from pathlib import Path

import delete_then_move
import pytest
from append_driver import append, appender, images_of, write_source
from image_files import check_statistics, rows_of

from pipeline.data import load_manifest
from pipeline.ingest import claim

pytestmark = pytest.mark.spark

TOLD = r"is being written by process \d+ on \S+ since|another job published a version first"


def check_holds(dataset: Path, numbers: list[int]) -> None:
    """The dataset has all images of these sources once, and each of its versions is whole."""
    rows = rows_of(dataset)
    assert Counter(row["image"] for row in rows.values()) == Counter(
        image for number in numbers for image in images_of(number)
    )
    newest = load_manifest(str(dataset))
    assert newest.version == len(numbers)
    for shard in newest.shards:
        assert hashlib.sha256((dataset / shard.path).read_bytes()).hexdigest() == shard.sha256
    before = None
    for version in range(1, newest.version + 1):
        found = load_manifest(str(dataset), version)
        assert found.previous == (before and before.digest)
        assert set(found.shards) >= set(before.shards if before else ())
        before = found
    listed = {*(shard.path for shard in newest.shards), *newest.quarantine}
    assert {str(path.relative_to(dataset)) for path in dataset.rglob("*.parquet")} == listed
    check_statistics(dataset)


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_both_are_done_or_one_is_told_why_and_nothing_is_missing(spark, tmp_path, rounds):
    dataset, seed, done, outcomes = tmp_path / "data", random.Random(rounds), [], Counter()
    numbers = deque(range(2 * rounds))
    for number in numbers:
        write_source(tmp_path / f"{number}", number)
    waiting: list[deque[int]] = [deque(), deque()]  # those of a side that it was told to try again
    with appender(tmp_path / "log") as other:
        for turn in range(rounds):
            for side in waiting:
                side.append(numbers.popleft())
            sources = [str(tmp_path / f"{side[0]}") for side in waiting]
            # The first finds no dataset yet; later ones meet at all moments of the other's job.
            delays = [0.0, 0.0] if turn == 0 else [seed.uniform(0, 1.5), seed.uniform(0, 1.5)]
            other.begin(str(dataset), sources[1], delays[1])
            said = [append(spark, str(dataset), sources[0], delays[0]), other.result()]
            assert not all(said)
            for side, text in zip(waiting, said, strict=True):
                if text:
                    assert re.search(TOLD, text)
                else:
                    done.append(side.popleft())
            outcomes["told why" if any(said) else "both done"] += 1
            check_holds(dataset, done)
    left = [*waiting[0], *waiting[1]]
    for number in left:  # who was told why runs it again
        assert append(spark, str(dataset), str(tmp_path / f"{number}")) == ""
    check_holds(dataset, [*done, *left])
    print(f"{rounds} rounds: {dict(outcomes)}, {len(done)} of {2 * rounds} sources in them, the rest afterwards")


def is_claimed(dataset: Path) -> bool:
    """Whether a job has the dataset, or had it when it died."""
    newest = max(dataset.glob("claim-*.json"), default=None)
    return newest is not None and not json.loads(newest.read_text() or "{}").get("released", True)


def wait_for_claim(dataset: Path) -> None:
    give_up_at = time.monotonic() + 120
    while not is_claimed(dataset):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def left_behind(dataset: Path, versions: int) -> str:
    """How far the job had come that was to publish a version beyond so many."""
    if len(list(dataset.glob("manifest-*.json"))) > versions:
        return "published"
    return "at work" if is_claimed(dataset) else "before its claim"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_that_is_killed_at_any_moment_loses_nothing_and_does_not_block(spark, tmp_path, monkeypatch):
    """Every other one is killed just after it has claimed the dataset."""
    monkeypatch.setattr(claim, "LEASE_SECONDS", 2.0)
    dataset, seed, done, moments = tmp_path / "data", random.Random(0), [], Counter()
    for turn in range(6):
        killed, mine = (2 * turn, 2 * turn + 1)
        for number in (killed, mine):
            write_source(tmp_path / f"{number}", number)
        with appender(tmp_path / "log") as other:
            other.begin(str(dataset), str(tmp_path / f"{killed}"))
            if turn % 2:
                wait_for_claim(dataset)
            time.sleep(seed.uniform(0, 1) if turn % 2 else seed.uniform(1, 8))
            assert other.process.poll() is None
            other.process.kill()
        moments[left_behind(dataset, len(done))] += 1
        for number in (mine, killed):  # it may have been done, and is done once all the same
            assert append(spark, str(dataset), str(tmp_path / f"{number}")) == ""
            done.append(number)
        check_holds(dataset, done)
    print(f"killed: {dict(moments)}")
    assert moments["at work"] >= 1


@pytest.mark.slow
def test_where_replacing_deletes_first_a_crash_in_between_loses_no_version(tmp_path):
    dataset, path = tmp_path / "data", delete_then_move.install(tmp_path / "packages")
    address = f"{delete_then_move.PROTOCOL}://{dataset}"
    for number in range(3):
        write_source(tmp_path / f"{number}", number)
    with appender(tmp_path / "log", *path) as first:
        first.begin(address, str(tmp_path / "0"))
        assert first.result() == ""
    with appender(tmp_path / "log", *path, DIES_WITHOUT="manifest.json") as second:
        second.begin(address, str(tmp_path / "1"))
        second.process.wait(120)
    assert not (dataset / "manifest.json").exists()
    assert load_manifest(str(dataset)).version == 2
    with appender(tmp_path / "log", *path) as third:
        for number in (1, 2):
            third.begin(address, str(tmp_path / f"{number}"))
            assert third.result() == ""
    assert (dataset / "manifest.json").exists()
    check_holds(dataset, [0, 1, 2])
