import json
import time

import pytest

from pipeline import storage
from pipeline.telemetry.events import EventReader, EventWriter, metric_values


def test_every_event_once_and_in_order(tmp_path):
    reader = EventReader(str(tmp_path / "events"))
    assert reader.new() == []
    writer = EventWriter(str(tmp_path / "events"), 0, flush_seconds=0)
    for step in range(3):
        writer.emit("step", step=step)
    assert [event["step"] for event in reader.new()] == [0, 1, 2]
    assert reader.new() == []
    writer.emit("step", step=3)
    assert [event["step"] for event in reader.new()] == [3]


def test_events_wait_for_their_flush(tmp_path):
    reader, writer = EventReader(str(tmp_path)), EventWriter(str(tmp_path), 0, flush_seconds=3600)
    writer.emit("step", step=1)
    assert reader.new() == []
    writer.flush()
    assert [event["step"] for event in reader.new()] == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_restarted_attempt_sorts_after_the_one_before(tmp_path):
    first = EventWriter(str(tmp_path), 0, flush_seconds=0)
    first.emit("step", step=1)
    second = EventWriter(str(tmp_path), 0, flush_seconds=0)
    second.emit("step", step=1)
    second.emit("step", step=2)
    assert [event["step"] for event in EventReader(str(tmp_path)).new()] == [1, 1, 2]


def event(step):
    return json.dumps({"kind": "step", "time": 1.0, "step": step}).encode()


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        (b"", []),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", []),
        (event(2)[:-5], []),
        (event(2) + b"\n" + event(3)[:20], [2]),
        (event(2) + b"\n\xff\xfe\n" + event(3) + b"\n", [2]),
        (event(2), []),  # a line without its end is not whole
        (event(2) + b"\n[1, 2]\n", [2]),
        (event(2) + b"\n" + b'{"kind": "step"}\n', [2]),
        (b"[" * 100_000 + b"\n", []),
    ],
    ids=["empty", "binary", "torn", "torn later", "not UTF-8", "no newline", "no object", "no time", "nested"],
)
def test_a_damaged_file_gives_what_is_whole_and_is_named_once(tmp_path, caplog, damaged, kept):
    (tmp_path / "0-a.jsonl").write_bytes(event(1) + b"\n")
    (tmp_path / "1-b.jsonl").write_bytes(damaged)
    (tmp_path / "2-c.jsonl").write_bytes(event(9) + b"\n")
    reader = EventReader(str(tmp_path))
    assert [event["step"] for event in reader.new()] == [1, *kept, 9]
    assert reader.complete
    (tmp_path / "1-b.jsonl").write_bytes(event(5) + b"\n")
    assert reader.new() == []
    assert len(caplog.records) == 1
    assert str(tmp_path / "1-b.jsonl") in caplog.text


def test_storage_that_fails_is_tried_again_and_the_order_stays(tmp_path, monkeypatch):
    for step in range(1, 4):
        (tmp_path / f"{step}.jsonl").write_bytes(event(step) + b"\n")
    read, names = storage.read_bytes, storage.names
    reader = EventReader(str(tmp_path))

    def fail(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(storage, "names", lambda folder: [*names(folder)[:1], "1-vanished.jsonl", *names(folder)[1:]])
    assert [event["step"] for event in reader.new()] == [1]
    assert isinstance(reader.failure, FileNotFoundError)
    assert not reader.complete
    monkeypatch.setattr(storage, "names", names)
    monkeypatch.setattr(storage, "read_bytes", fail)
    assert reader.new() == []
    monkeypatch.setattr(storage, "read_bytes", read)
    monkeypatch.setattr(storage, "names", fail)
    assert reader.new() == []
    monkeypatch.setattr(storage, "names", names)
    assert [event["step"] for event in reader.new()] == [2, 3]
    assert reader.complete
    assert reader.failure is None


def test_a_part_of_the_files_at_a_time(tmp_path):
    for step in range(5):
        (tmp_path / f"{step}.jsonl").write_bytes(event(step) + b"\n")
    reader = EventReader(str(tmp_path))
    parts = [(len(reader.new(2)), reader.complete) for _ in range(4)]
    assert parts == [(2, False), (2, False), (1, True), (0, True)]


def test_a_restarted_attempt_sorts_after_the_one_before_also_where_its_clock_is_behind(tmp_path, monkeypatch):
    EventWriter(str(tmp_path), 0, flush_seconds=0).emit("step", step=1)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    EventWriter(str(tmp_path), 0, flush_seconds=0).emit("step", step=2)
    assert [event["step"] for event in EventReader(str(tmp_path)).new()] == [1, 2]


def test_storage_that_does_not_take_events_stops_no_training_and_loses_none(tmp_path, monkeypatch):
    writer, publish = EventWriter(str(tmp_path), 0, flush_seconds=0), storage.publish

    def fail(path, data):
        raise OSError("no space left")

    monkeypatch.setattr(storage, "publish", fail)
    writer.emit("step", step=1)
    with pytest.raises(OSError, match="no space"):
        writer.flush()
    monkeypatch.setattr(storage, "publish", publish)
    writer.emit("step", step=2)
    assert [event["step"] for event in EventReader(str(tmp_path)).new()] == [1, 2]


def test_the_scores_of_an_evaluation_are_metrics_of_their_split():
    evaluation = {"kind": "evaluation", "split": "test", "accuracy": 0.5, "loss": None, "train_loss": 0.7, "epoch": 1.0,
                  "images_per_second": 9.0}  # fmt: skip
    scores = {"balanced_accuracy": 0.4, "macro_f1": 0.3, "calibration_error": 0.2}
    others = {"train/mean_loss": 0.7, "train/images_per_second": 9.0, "epoch": 1.0}
    assert metric_values(evaluation | scores) == {
        "test/accuracy": 0.5, "test/loss": None, **{f"test/{name}": score for name, score in scores.items()}, **others
    }  # fmt: skip
    # Of a version that did not count them.
    assert metric_values(evaluation)["test/balanced_accuracy"] is None


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)


@pytest.mark.parametrize(("where", "longest_seconds"), [("local", 10), ("memory", 20)])
def test_files_of_an_hour_are_few_whatever_is_told(tmp_path, remote, monkeypatch, where, longest_seconds):
    """A step every 0.2 s, an evaluation every 3 s, a checkpoint every minute."""
    clock, folder = Clock(monkeypatch), str(tmp_path) if where == "local" else remote
    writer, reader = EventWriter(folder, 0), EventReader(folder)
    seen: list[float] = []  # seconds until the newest step was published, at each look
    for tick in range(1, 5 * 3600 + 1):
        clock.seconds += 0.2
        writer.emit("step", step=tick)
        if tick % 15 == 0:
            writer.emit("evaluation", step=tick)
            writer.flush_early()
        if tick % 300 == 0:
            writer.flush()
        if tick in (5, 50, 250):  # after 1 s, 10 s, 50 s
            steps = [event["step"] for event in reader.new() if event["kind"] == "step"]
            seen.append((tick - max(steps, default=0)) / 5)
    files = len(storage.names(folder))
    assert 3600 / longest_seconds < files <= 3600 / longest_seconds + 65 + 60
    assert seen[0] <= 1
    assert seen[1] <= 3
    assert seen[2] <= longest_seconds
    writer.flush()
    assert len([event for event in EventReader(folder).new() if event["kind"] == "step"]) == 5 * 3600


def test_what_is_told_early_is_stored_at_once_where_that_is_rare(tmp_path, monkeypatch):
    clock, reader = Clock(monkeypatch), EventReader(str(tmp_path))
    writer = EventWriter(str(tmp_path), 0, flush_seconds=1000)
    for number in range(20):
        clock.seconds += 61
        writer.emit("evaluation", step=number)
        writer.flush_early()
        assert [event["step"] for event in reader.new()] == [number]
