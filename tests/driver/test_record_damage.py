"""Records of damaged bytes: what was begun is found or begun anew, and no bytes are an error."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from damage import FEW, MANY, damaged_json
from hypothesis import given

from pipeline.driver.lease import BusyError, newest_number, record_path
from pipeline.driver.record import Record, finished_record, unfinished_record
from pipeline.report.comparison import TrialResult

RESULT = {
    "best_accuracy": 0.9, "final_accuracy": 0.8, "final_balanced_accuracy": 0.7, "final_macro_f1": 0.6,
    "final_loss": None, "final_calibration_error": 0.1, "recall": [0.9, None], "predictions": "predictions.parquet",
    "steps": 20, "images_per_second": 1000.5, "data_wait_share": None, "diverged": False, "curve": [],
    "train_loss": [None], "train_seconds": [1.5], "checkpoint": "step-00000020.pt", "world_size": 2, "attempts": 1,
    "ranks": [], "run_id": "5fd1", "versions": {"sparknorm": "0.7.0", "torch": "2.13.0"},
}  # fmt: skip
RECORD = {
    "driver": {"host": socket.gethostname(), "pid": 1_000_000, "started": "1"}, "name": "a", "run_id": "5fd1",
    "model": True, "cycles": [RESULT], "result": RESULT,
}  # fmt: skip
UNFINISHED = {key: value for key, value in RECORD.items() if key != "result"}


def check_record(root, content):
    path = unfinished_record(str(root), "a", {}).folder
    folder = root / path.rpartition("/")[2]
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_bytes(content)
    found = Record(str(folder))
    for cycle in (None, 1, 2):
        assert isinstance(found.result(cycle), TrialResult | None)
    finished = finished_record(str(root), "a", {})
    assert (finished is not None) == found.finished
    try:
        found.claim("a")
    except BusyError as error:
        assert str(folder) in str(error)
    else:
        assert Record(str(folder)).content.model_dump_json() == found.content.model_dump_json()  # NaN is not NaN
        assert json.loads(Path(record_path(str(folder), newest_number(str(folder)))).read_bytes())["name"] == "a"
    shutil.rmtree(folder)


CONTENT = damaged_json(RECORD) | damaged_json(UNFINISHED)


@pytest.fixture
def no_waiting(monkeypatch):
    """A driver of another host is watched for some seconds."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@FEW
@given(content=CONTENT)
def test_a_damaged_record(tmp_path, no_waiting, content):
    check_record(tmp_path, content)


@pytest.mark.slow
@MANY
@given(content=CONTENT)
def test_many_damaged_records(tmp_path, no_waiting, content):
    check_record(tmp_path, content)
