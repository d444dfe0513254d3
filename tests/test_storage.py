import json
import os

import fsspec
import pytest

from pipeline import storage
from pipeline.config.frozen import FrozenModel


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    yield str(tmp_path) if request.param == "local" else "memory://bucket"
    fsspec.filesystem("memory").store.clear()


def test_publish_read_list_remove(root):
    storage.publish(storage.join(root, "a", "two"), b"2")
    storage.publish(storage.join(root, "a", "one"), b"1")
    storage.publish(storage.join(root, "a", "one"), b"one")
    assert storage.names(storage.join(root, "a")) == ["one", "two"]
    assert storage.read_bytes(storage.join(root, "a", "one")) == b"one"
    assert storage.exists(storage.join(root, "a", "two"))
    storage.remove(storage.join(root, "a"))
    storage.remove(storage.join(root, "a"))
    assert storage.names(storage.join(root, "a")) == []


class Result(FrozenModel):
    name: str
    best: float | None = None
    norms: dict[str, float] | None = None


def test_a_result_is_published_as_json_and_its_path_returned(root):
    path = storage.join(root, "runs", "train.json")
    assert storage.publish_json(path, {"accuracy": float("nan"), "rows": [1, 2]}) == path
    assert storage.read_bytes(path).decode() == '{\n "accuracy": NaN,\n "rows": [\n  1,\n  2\n ]\n}'
    storage.publish_json(path, Result(name="batch", best=None))
    assert json.loads(storage.read_bytes(path)) == {"name": "batch", "best": None}  # what was never set has no key


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.publish(str(path), b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.publish(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_local_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == f"{tmp_path}/runs/x"
    assert storage.absolute("memory://bucket/x") == "memory://bucket/x"


def test_a_file_of_another_process_is_seen_or_named(root):
    path = storage.join(root, "driver")
    for text in (None, b"older"):
        if text is not None:
            storage.publish(path, text)
        with pytest.raises(ValueError, match=r"driver, written by rank 3, is not seen here: set `output` to a place"):
            storage.check_seen(path, "newest", writer="rank 3")
    storage.publish(path, b"newest")
    storage.check_seen(path, "newest", writer="rank 3")


def test_a_number_that_json_does_not_have_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        storage.publish_json(str(tmp_path / "result.json"), {"loss": float("nan")}, allow_nan=False)
    assert list(tmp_path.iterdir()) == []
