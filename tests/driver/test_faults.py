"""What happens when something breaks while a training runs: real faults on a local cluster (see `fault_driver`).

`docs/faults.md` has the table. Drivers that are killed: `test_killed_driver.py`. Executors that are gone for good, and
a tracking server that is down: `test_elastic.py`.
"""

import json
import re
from pathlib import Path

import pytest
from small_training import LOCAL_CLUSTER
from standalone_cluster import run_driver

pytestmark = [pytest.mark.spark, pytest.mark.long]

PROGRAM = "import sys, fault_driver; fault_driver.main(*sys.argv[1:])"
STEPS, STEPS_OF_AN_EPOCH = 200, 25
SILENT = r"rank 1 on \S+ \(cpu\) gave its last sign of life \d+ s ago, then in .+ at step \d+"


@pytest.fixture(scope="module")
def faults(dataset, tmp_path_factory):
    """The folder of results, and what was said if the driver did not get to the end."""
    folder = tmp_path_factory.mktemp("faults")
    try:
        run_driver(PROGRAM, LOCAL_CLUSTER.master, dataset, str(folder), timeout=540)
    except Exception as error:  # noqa: BLE001 - the results that there are are judged all the same
        return folder, f"{type(error).__name__}: {error}"
    return folder, ""


@pytest.fixture
def fault(faults, request):
    """What happened to the training with the fault that the test is named after, `test_FAULT`."""
    folder, crash = faults
    path = Path(folder, f"{request.node.name.removeprefix('test_')}.json")
    assert path.exists(), f"the driver did not get so far: {crash}"
    found = json.loads(path.read_text())
    assert "broken" not in found, found["broken"]
    assert "failed" not in found.get("did", {}), found["did"]["failed"]
    return found


def assert_restarted_with_equal_bits(fault):
    assert fault["error"] == ""
    assert (fault["result"]["attempts"], fault["result"]["steps"]) == (2, STEPS)
    (first, from_start), (second, restored_from) = fault["starts"]
    assert (first, from_start, second) == (1, 0, 2)
    # Not from the beginning: from what there was when the worker died, or what was being written then.
    assert restored_from >= fault["did"]["newest_checkpoint"] > 25
    assert fault["equal"]
    assert fault["steps_not_told"] == []
    assert fault["restart_seconds"] < 120


def test_restarts_go_on_in_the_middle_of_an_epoch(faults):
    """Any one of them may find the checkpoint of an epoch's end to be the newest."""
    folder, _ = faults
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    killed = [fault for fault in found if "killed_at" in fault.get("did", {})]
    restored_from = [step for fault in killed for attempt, step in fault["starts"] if attempt == 2]
    assert any(step % STEPS_OF_AN_EPOCH for step in restored_from), restored_from


def test_worker_killed(fault):
    assert_restarted_with_equal_bits(fault)


def test_first_worker_killed(fault):
    assert_restarted_with_equal_bits(fault)


def test_executor_killed(fault):
    assert_restarted_with_equal_bits(fault)


def test_model_raises(fault):
    first_line, *traceback = fault["error"].splitlines()
    assert re.fullmatch(
        r"rank 1 on \S+ \(cpu\) in forward, epoch 1, step 40: ZeroDivisionError: the model's own mistake", first_line
    )
    assert "raise_there" in "".join(traceback)  # the user's own function
    assert "gloo" not in fault["error"]  # the other rank's broken connection is not the news
    assert fault["error_type"] == "WorkerError"
    steps = [step for _, step in fault["starts"]]
    assert steps[0] == 0
    assert len(steps) >= 2  # tried again, since some exceptions pass, and given up when nothing new had been saved
    assert steps == sorted(set(steps))
    assert fault["seconds"] < 90


def test_model_raises_once(fault):
    assert fault["error"] == ""
    assert fault["result"]["steps"] == STEPS
    assert len(fault["starts"]) == 2
    assert fault["starts"][1][1] > 0
    assert fault["equal"]
    assert fault["steps_not_told"] == []


def test_shard_damaged(fault):
    assert fault["error_type"] == "WorkerError"
    assert re.match(r"rank \d on \S+ \(cpu\) in data loading, epoch 0, step \d+: DatasetError: ", fault["error"])
    assert f"train/{fault['shard']}, row group" in fault["error"]
    assert "was altered: its SHA-256 is" in fault["error"]
    assert fault["seconds"] < 60


def test_divergence_marked(fault):
    assert fault["error"] == ""
    assert fault["result"]["diverged"]
    assert fault["result"]["steps"] < STEPS
    (text,) = fault["diverged"]
    assert re.match(r"the loss of rank 0, 1 is not finite at step \d+, learning rate \S+e\+\d+", text)


def test_divergence_fails(fault):
    assert fault["error_type"] == "WorkerError"
    assert "DivergedError: the loss of rank 0, 1 is not finite at step" in fault["error"]
    assert "lower train.learning_rate, or set train.on_divergence to mark" in fault["error"]
    assert fault["attempts"] == 1  # it would diverge again


def test_hang_in_python(fault):
    first_line, *stack = fault["error"].splitlines()
    assert fault["error_type"] == "StallError"
    assert re.fullmatch(
        r"rank 1 on \S+ \(cpu\) has been in data loading at step 40 for \d+ s \(workers.stall_seconds is 12\)",
        first_line,
    )
    assert any("in _batch_that_does_not_come" in line for line in stack[:6])  # the main thread comes first
    assert fault["process_is_gone"]
    assert fault["seconds"] < 90


def test_hang_in_native_code(fault):
    assert fault["error_type"] == "StallError"
    assert re.match(SILENT, fault["error"])
    assert f"its process {fault['did']['pid']} is stopped, or hangs in native code" in fault["error"]
    assert "in _batch_that_does_not_come" in fault["error"]  # faulthandler needs no interpreter lock
    assert fault["process_is_gone"]
    assert fault["seconds"] < 90


def test_hang_stopped(fault):
    assert fault["error_type"] == "StallError"
    assert re.match(SILENT, fault["error"])
    assert f"its process {fault['did']['pid']} is stopped, or hangs in native code" in fault["error"]
    assert "(no stack arrived from that worker)" in fault["error"]
    assert fault["process_is_gone"]
    assert fault["seconds"] < 90


def test_too_few_slots(fault):
    assert fault["error_type"] == "ShortageError"
    assert fault["error"].startswith(
        "workers.count is 4, but local-cluster[2,1,1024] has 2 slots: set workers.count to"
    )
    assert fault["starts"] == []
    assert 3 <= fault["seconds"] < 30  # workers.slots_wait_seconds is 3


def test_disk_full_for_a_while(fault):
    assert fault["error"] == ""
    assert fault["equal"]
    (warning,) = fault["warnings"]  # said once, not at every try
    assert warning.startswith("the checkpoint at step 6 could not be written to ")
    assert fault["folder"] in warning
    assert warning.endswith("File too large; training goes on")
    assert not [step for step in fault["saved"] if 6 <= step < 60]
    assert fault["saved"][-1] == STEPS


def test_disk_full_at_the_end(fault):
    assert fault["error_type"] == "WorkerError"
    first_line = fault["error"].splitlines()[0]
    assert re.match(
        r"rank 0 on \S+ \(cpu\) in checkpoint, epoch 7, step \d+: OSError: the last checkpoint ", first_line
    )
    assert f"could not be written to {fault['folder']}/checkpoints: " in first_line
    assert "File too large" in first_line
    assert fault["seconds"] < 60


def test_checkpoints_torn(fault):
    assert fault["error"] == ""
    assert fault["equal"]
    assert fault["starts"][-1][1] == int(fault["third"].removeprefix("step-"))
    for name in (fault["newest"], fault["second"]):
        assert f"{name} cannot be used (it does not match its SHA-256); trying the one before it" in fault["log"]


def test_event_files_torn(fault):
    assert fault["error"] == ""
    assert fault["equal"]
    assert fault["steps"] == list(range(1, STEPS + 1))
    assert fault["log"].count("is damaged") == fault["did"]["files"]


def test_port_taken(fault):
    assert fault["error_type"] == "WorkerError"
    assert f"ValueError: workers.port {fault['port']} cannot be opened on 127.0.0.1: choose another" in fault["error"]
    assert fault["starts"] == []
    assert fault["seconds"] < 60


def test_port_set(fault):
    assert_restarted_with_equal_bits(fault)
