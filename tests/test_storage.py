import json
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

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
    with pytest.raises(OSError, match=f"No space left on device on {socket.gethostname()}: '{path}'") as raised:
        storage.publish(str(path), b"new")
    assert raised.value.errno == 28
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture(params=["hard links", "no hard links"])
def disk(request, monkeypatch):
    """A disk, and one that refuses hard links, as FAT and many mounted object stores do."""
    if request.param == "no hard links":

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)


def test_a_file_is_created_once_and_stays_as_it_is(root, disk):
    path = storage.join(root, "a", "claim")
    assert storage.create(path, b"first")
    assert not storage.create(path, b"second")
    assert storage.read_bytes(path) == b"first"
    assert storage.names(storage.join(root, "a")) == ["claim"]
    storage.remove(path)
    assert storage.create(path, b"third")
    assert storage.read_bytes(path) == b"third"


def test_of_processes_that_create_a_file_at_once_one_does(tmp_path):
    paths, processes = [str(tmp_path / f"{number}") for number in range(300)], 3
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as executor:
        calls = [(path, b"by %d" % process) for path in paths for process in range(processes)]
        created = list(executor.map(storage.create, *zip(*calls, strict=True)))
    for path in paths:
        makers = [data for (called, data), made in zip(calls, created, strict=True) if called == path and made]
        assert makers == [Path(path).read_bytes()]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(Path(path).name for path in paths)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_cannot_be_created_is_an_error_and_nothing_is_left(tmp_path, monkeypatch, hard_links):
    def full(*_):
        raise OSError(28, "No space left on device")

    for owner, call in ((os, "fsync"),) if hard_links else ((os, "link"), (Path, "replace")):
        monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space left"):
        storage.create(str(tmp_path / "claim"), b"mine")
    assert list(tmp_path.iterdir()) == []


class LostAnswers(MemoryFileSystem):
    """A store whose answer to a put got lost; its driver sent the request again and was told that the file is there."""

    protocol = ("memory", "lost-answers")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    lost = True

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value if self.lost else b"another's", **kwargs)
        raise OSError(22, "At least one of the pre-conditions you specified did not hold")


def test_who_created_a_file_is_known_when_the_answer_got_lost():
    fsspec.register_implementation("lost-answers", LostAnswers, clobber=True)
    assert storage.create("lost-answers://bucket/claim", b"mine")
    fsspec.filesystem("lost-answers").lost = False
    assert not storage.create("lost-answers://bucket/other", b"mine")


@pytest.mark.parametrize("write", [storage.publish, storage.create])
def test_the_name_of_a_file_is_on_the_disk_as_its_bytes_are(tmp_path, monkeypatch, write):
    synced = []
    fsync = os.fsync

    def noted(descriptor):
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            synced.append((str(path.relative_to(tmp_path)), [entry.name for entry in path.iterdir()]))
        else:
            synced.append(("file", path.read_bytes()))

    monkeypatch.setattr(os, "fsync", noted)
    write(str(tmp_path / "a" / "b" / "name"), b"bytes")
    # The bytes first; the name when it is the final one; then the folders that are new.
    assert synced == [("file", b"bytes"), ("a/b", ["name"]), ("a", ["b"]), (".", ["a"])]
    synced.clear()
    storage.publish(str(tmp_path / "a" / "b" / "name"), b"more", durable=False)
    assert synced == []


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


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_replaced_file_has_another_version_and_unfinished_ones_have_none(where, tmp_path, remote):
    folder = str(tmp_path) if where == "local" else remote
    assert storage.versions(f"{folder}/x") == {}
    storage.publish(f"{folder}/x/one", b"1")
    storage.publish(f"{folder}/x/two", b"1")
    storage.publish(f"{folder}/x/.two.unfinished", b"1")
    storage.publish(f"{folder}/x/below/three", b"1")
    before = storage.versions(f"{folder}/x")
    storage.publish(f"{folder}/x/one", b"2")
    after = storage.versions(f"{folder}/x")
    assert sorted(before) == sorted(after) == ["one", "two"]
    assert [name for name in after if after[name] != before[name]] == ["one"]
    storage.remove_file(f"{folder}/x/one")
    storage.remove_file(f"{folder}/x/one")
    assert sorted(storage.versions(f"{folder}/x")) == ["two"]
