"""Events of damaged files are logged or left out: none keeps those beside it from MLflow, or ends a training."""

import mlflow
import pytest
from damage import FEW, MANY, damaged_json
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.telemetry.events import EventReader
from pipeline.tracking.tracker import Tracker

STEP = {"kind": "step", "time": 2.0, "step": 1, "loss": 0.5, "learning_rate": 0.1}
EVALUATION = {
    "kind": "evaluation", "time": 4.0, "step": 1, "epoch": 1.0, "split": "test", "accuracy": 0.5, "loss": None,
    "train_loss": 0.7, "images_per_second": None, "ranks": [{"rank": 0, "steps": 1, "data_wait_seconds": 0.1}],
}  # fmt: skip
DIAGNOSTICS = {"kind": "diagnostics", "time": 3.0, "step": 1, "values": {"gradient_norm/0": 0.5}}
CONTENT = st.lists(st.sampled_from((STEP, EVALUATION, DIAGNOSTICS)).flatmap(damaged_json), min_size=1, max_size=6)


@pytest.fixture
def run(store_uri, tmp_path):
    tracking = TrackingSettings(uri=store_uri, artifacts=str(tmp_path / "artifacts"), system_metrics=False)
    tracker = Tracker(tracking)
    with tracker.run("damaged", settings=Settings(name="damaged", tracking=tracking)) as run:
        yield run


STEPS = iter(range(1, 1_000_000))


def check_logging(run, folder, files):
    """The events of some files, and then a whole one, which must arrive."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number, content in enumerate(files):
        (folder / f"{number}.jsonl").write_bytes(content + b"\n")
    events = EventReader(str(folder)).new()
    step = next(STEPS)
    last = {"kind": "diagnostics", "time": 9.0, "step": step, "values": {"whole": 0.5}}
    run.log_events([*events, last])
    assert mlflow.MlflowClient().get_run(run.run_id).data.metrics["diagnostics/whole"] == 0.5
    assert run._last_steps["diagnostics/whole"] == step


@settings(FEW, max_examples=30)
@given(files=CONTENT)
def test_damaged_events_are_logged_or_left_out(run, tmp_path, files):
    check_logging(run, tmp_path / "events", files)


@pytest.mark.slow
@settings(MANY, max_examples=500)
@given(files=CONTENT)
def test_many_damaged_events_are_logged_or_left_out(run, tmp_path, files):
    check_logging(run, tmp_path / "events", files)
