"""Event files of damaged bytes: the whole lines before the damage are used, and nobody who reads events fails."""

import json

import pytest
from damage import FEW, MANY, damaged, damaged_json
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.figures.diagnostics import gradient_norms
from pipeline.telemetry.events import EventReader, metric_values

EVENTS = [
    {"kind": "start", "time": 1.0, "step": 0, "total_steps": 9, "epochs": 1, "attempt": 1, "restored_from": 0},
    {"kind": "step", "time": 2.0, "step": 1, "loss": 0.5, "learning_rate": 0.1},
    {"kind": "diagnostics", "time": 3.0, "step": 1, "values": {"gradient_norm/0": 0.5, "gradient_norm/1": None}},
    {"kind": "evaluation", "time": 4.0, "step": 1, "epoch": 1.0, "split": "test", "accuracy": 0.5, "loss": None,
     "train_loss": 0.7, "images_per_second": None,
     "ranks": [{"rank": 0, "steps": 1, "data_wait_seconds": 0.1, "compute_seconds": 0.2, "all_reduce_seconds": 0.0}]},
]  # fmt: skip
LINES = [json.dumps(event).encode() + b"\n" for event in EVENTS]
CONTENT = damaged(b"".join(LINES)) | st.tuples(*(st.just(LINES[n]) | damaged_json(EVENTS[n]) for n in range(4))).map(
    b"\n".join
)


def check_events(folder, content):
    (folder / "1.jsonl").write_bytes(content)
    (folder / "2.jsonl").write_bytes(LINES[1])
    reader = EventReader(str(folder))
    events = reader.new()
    assert (reader.failure, reader.complete) == (None, True)
    assert events[-1] == EVENTS[1]
    whole = 0
    while whole < len(LINES) and content.startswith(b"".join(LINES[: whole + 1])):
        whole += 1
    assert events[:whole] == EVENTS[:whole]
    gradient_norms(events)
    for event in events:
        try:
            metric_values(event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # which whoever logs them expects
            continue


@FEW
@given(content=CONTENT)
def test_a_damaged_file(tmp_path, content):
    check_events(tmp_path, content)


@pytest.mark.slow
@MANY
@given(content=CONTENT)
def test_many_damaged_files(tmp_path, content):
    check_events(tmp_path, content)
