"""Which rank the watch blames, from heartbeats that real ones publish."""

import contextlib
import time

import pytest

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


@pytest.mark.parametrize("phase", ["checkpoint", "evaluation", "restore"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_waits_for_the_others_is_not_the_one_that_hangs(tmp_path, monkeypatch, phase, culprit):
    """It may have come to that phase long before the rank that it waits for."""
    monkeypatch.setattr("pipeline.cluster.watch.STACK_SECONDS", 0.0)
    watch, statuses = Watch(str(tmp_path), WORKERS), [Status(), Status()]
    for rank in (1 - culprit, culprit):
        statuses[rank].enter(phase, step=40)
        time.sleep(0.2)
    with statuses[1 - culprit].waiting(), beating(str(tmp_path), statuses):
        assert f"rank {culprit} on here (cpu) has been in {phase} at step 40" in blamed(watch)


def test_a_rank_that_is_a_step_behind_is_the_one_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.watch.STACK_SECONDS", 0.0)
    watch, statuses = Watch(str(tmp_path), WORKERS), [Status(), Status()]
    statuses[0].enter("diagnostics", step=41)
    statuses[1].enter("checkpoint", step=40)
    with statuses[1].waiting(), beating(str(tmp_path), statuses):
        assert "rank 1 on here" in blamed(watch)
