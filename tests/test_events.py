from pipeline.events import EventReader, EventWriter


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
