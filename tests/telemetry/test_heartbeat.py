"""Heartbeats: a process whose gang was replaced ends itself, and publishes nothing more."""

import subprocess
import sys
import time

import pytest

from pipeline import storage
from pipeline.telemetry import heartbeat

RANK = """
import sys, time
from pipeline.telemetry.heartbeat import Heartbeat, RankProcess, Status, next_attempt
process = RankProcess(rank=0, world_size=1, host="here", pid=1, device="cpu")
attempt = next_attempt(sys.argv[1])
beat = Heartbeat(sys.argv[1], Status(), attempt, process, seconds=0.1, stall_seconds=60)
with beat.running():
    print("runs", flush=True)
    time.sleep(60)
"""


def test_a_rank_ends_when_its_driver_is_replaced_and_its_attempt_keeps_its_number(tmp_path):
    heartbeat.end_attempt(str(tmp_path))
    assert heartbeat.read_attempt(str(tmp_path)) is None  # there was none
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert rank.stdout.readline() == "runs\n"
        attempt = heartbeat.read_attempt(str(tmp_path))
        heartbeat.end_attempt(str(tmp_path))
        _, errors = rank.communicate(timeout=20)
    finally:
        rank.kill()
    assert rank.returncode == heartbeat.SUPERSEDED
    assert "attempt 1 was replaced: this worker ends" in errors
    replaced = heartbeat.read_attempt(str(tmp_path))
    assert replaced.number == attempt.number == 1
    assert replaced.id != attempt.id
    assert heartbeat.next_attempt(str(tmp_path)).number == 2


@pytest.fixture
def published(monkeypatch):
    """The beats that are published, in their order, each with the time at which it was."""
    publish, beats = storage.publish, []

    def note(path, data, **options):
        publish(path, data, **options)
        if "/rank-" in path:
            beats.append((time.monotonic(), heartbeat.Beat.model_validate_json(data)))

    monkeypatch.setattr(storage, "publish", note)
    return beats


def beat_for(folder, seconds, *, status=None, stall_seconds):
    process = heartbeat.RankProcess(rank=0, world_size=1, host="here", pid=1, device="cpu")
    attempt = heartbeat.next_attempt(folder)
    status = status or heartbeat.Status()
    beats = heartbeat.Heartbeat(folder, status, attempt, process, seconds=0.05, stall_seconds=stall_seconds)
    with beats.running():
        time.sleep(seconds)


def test_on_remote_storage_beats_become_fewer_and_say_when_the_next_comes(remote, published):
    beat_for(remote, 4, stall_seconds=18)
    (*times, _), (*beats, last) = zip(*published, strict=True)
    assert 6 <= len(beats) <= 9  # after 0, 0.05, 0.15, 0.35, 0.75, 1.55, 2.55, 3.55 s
    assert [beat.next_seconds for beat in beats[:6]] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0])
    assert last.ended
    for earlier, later, beat in zip(times, times[1:], beats, strict=False):
        assert later - earlier < beat.next_seconds + 0.5


def test_on_a_mounted_path_beats_stay_as_they_are(tmp_path, published):
    beat_for(str(tmp_path), 2, stall_seconds=18)
    assert len(published) > 15
    assert {beat.next_seconds for _, beat in published} == {0.05}


def test_the_stack_of_a_rank_that_hangs_is_published_before_the_next_beat_is_due(remote, published, monkeypatch):
    monkeypatch.setattr(heartbeat, "_LONGEST_SHARE", 100.0)
    beat_for(remote, 3, stall_seconds=1)
    stacks = [(at, beat) for at, beat in published if beat.stack]
    assert "time.sleep" in stacks[0][1].stack or "beat_for" in stacks[0][1].stack
    assert stacks[0][0] - published[0][0] < 1.5  # of 0, 0.05, 0.15, 0.35, 0.75, 1.55 s the last would be later


@pytest.mark.parametrize("seconds", [float("inf"), 1e30])
def test_a_rank_whose_stacks_cannot_be_dumped_lives_and_says_so_once(tmp_path, published, seconds, caplog):
    """faulthandler refuses such a time before each beat."""
    beat_for(str(tmp_path), 0.5, stall_seconds=seconds)
    assert len(published) > 3
    assert caplog.text.count("should this worker hang, its stack will not be known") == 1
