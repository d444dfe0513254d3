"""Heartbeats: a process whose gang was replaced ends itself, and publishes nothing more."""

import subprocess
import sys

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
