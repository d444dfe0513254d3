import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_shards import open_files, read_all, write_dataset

from pipeline import storage
from pipeline.data import load_manifest, shard_cache
from pipeline.data.manifest import DatasetError


def shards_of(path):
    return load_manifest(path).split("train").shards


def copy_of(remote, number, folder, limit=1 << 20) -> str:
    shard = shards_of(remote)[number]
    shard_cache.open_copy(storage.join(remote, shard.path), shard, str(folder), limit).close()
    return str(shard_cache.copy_path(shard, str(folder)))


def files_in(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} if Path(folder).exists() else set()


def names(remote, *numbers) -> set[str]:
    return {f"{shards_of(remote)[number].sha256}.shard.parquet" for number in numbers}


def test_a_shard_is_fetched_once(remote, tmp_path):
    write_dataset(remote)
    shard = shards_of(remote)[0]
    content = storage.read_bytes(storage.join(remote, shard.path))
    path = storage.join(remote, shard.path)
    for _ in range(2):
        with shard_cache.open_copy(path, shard, str(tmp_path / "a" / "b"), 1 << 20) as file:
            file.seek(0)
            assert file.read() == content
        storage.remove(path)  # it can be fetched no more
    assert files_in(tmp_path / "a" / "b") == names(remote, 0)


def test_a_dataset_that_is_cached_is_read_without_the_remote_one(remote, tmp_path):
    images, _ = write_dataset(remote, (40, 40, 40))
    found = load_manifest(remote)
    read_all(open_files(remote, cache=str(tmp_path)))
    files = open_files(remote, cache=str(tmp_path))
    for shard in found.split("train").shards:
        storage.remove(storage.join(remote, shard.path))
    np.testing.assert_array_equal(read_all(files)[0], images)


def test_a_folder_of_ones_home_is_there(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_dataset(remote)
    read_all(open_files(remote, cache="~/shards"))
    assert files_in(tmp_path / "home" / "shards") == names(remote, *range(len(shards_of(remote))))
    assert not (tmp_path / "~").exists()


def test_the_longest_unused_copies_make_room(remote, tmp_path):
    write_dataset(remote, (40, 40, 40, 40))
    size = max(shard.bytes for shard in shards_of(remote))
    limit = 3 * size
    copies = [copy_of(remote, number, tmp_path, limit) for number in range(3)]
    assert files_in(tmp_path) == names(remote, 0, 1, 2)
    for age, copy in zip((300, 200, 100), copies, strict=True):
        os.utime(copy, (1e9 - age, 1e9 - age))
    copy_of(remote, 0, tmp_path, limit)  # used again: now copy 1 is the oldest
    copy_of(remote, 3, tmp_path, limit)
    assert files_in(tmp_path) == names(remote, 0, 2, 3)
    copy_of(remote, 1, tmp_path, 2 * size)
    assert files_in(tmp_path) == names(remote, 1, 3) or files_in(tmp_path) == names(remote, 0, 1)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size


def test_an_open_copy_is_read_to_its_end_whatever_makes_room(remote, tmp_path):
    images, _ = write_dataset(remote, (40, 40))
    limit = max(shard.bytes for shard in shards_of(remote))
    files = open_files(remote, cache=str(tmp_path), cache_bytes=limit)
    for number, rows in ((0, slice(0, 30)), (2, slice(40, 70)), (1, slice(30, 40)), (3, slice(70, 80))):
        np.testing.assert_array_equal(files.read(number)[0], images[rows])
    assert files_in(tmp_path) == names(remote, 1)


def test_files_of_others_in_the_folder_stay(remote, tmp_path):
    write_dataset(remote, (40, 40))
    (tmp_path / "notes.parquet").write_bytes(bytes(100_000))
    size = max(shard.bytes for shard in shards_of(remote))
    copy_of(remote, 0, tmp_path, size)
    copy_of(remote, 1, tmp_path, size)
    assert files_in(tmp_path) == {"notes.parquet"} | names(remote, 1)


def test_what_killed_processes_left_half_fetched_is_deleted_after_a_day(remote, tmp_path):
    write_dataset(remote)
    old, new = (tmp_path / f".{'0' * 64}.shard.parquet.{name}" for name in ("old", "new"))
    old.write_bytes(b"half")
    new.write_bytes(b"half, and another process is at it")
    os.utime(old, (1e9, 1e9))
    copy_of(remote, 0, tmp_path)
    assert files_in(tmp_path) == {new.name} | names(remote, 0)


def test_a_shard_larger_than_the_limit_names_the_setting(remote, tmp_path):
    write_dataset(remote)
    size = shards_of(remote)[0].bytes
    with pytest.raises(
        DatasetError, match=rf"a shard of {size} bytes does not fit reader.cache_bytes {size - 1}: raise that to"
    ):
        copy_of(remote, 0, tmp_path, size - 1)
    files = open_files(remote, cache=str(tmp_path / "cache"), cache_bytes=size - 1)
    with pytest.raises(DatasetError, match=r"part-00000-\w+.parquet, row group 0: a shard of .* reader.cache_bytes"):
        files.read(0)
    assert files_in(tmp_path / "cache") == set()
    assert copy_of(remote, 0, tmp_path, size)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_copy_is_fetched_again(remote, tmp_path, damage):
    images, _ = write_dataset(remote)
    copy = Path(copy_of(remote, 0, tmp_path))
    data = copy.read_bytes()
    copy.write_bytes({"cut": data[:-5], "flipped": data[:-500] + b"x" + data[-499:], "empty": b""}[damage])
    np.testing.assert_array_equal(read_all(open_files(remote, cache=str(tmp_path)))[0], images)
    assert copy.read_bytes() == data


def test_a_copy_that_is_deleted_is_fetched_again(remote, tmp_path):
    images, _ = write_dataset(remote)
    read_all(open_files(remote, cache=str(tmp_path)))
    for copy in tmp_path.iterdir():
        copy.unlink()
    np.testing.assert_array_equal(read_all(open_files(remote, cache=str(tmp_path)))[0], images)


@pytest.mark.parametrize("failure", ["missing", "cut", "altered"])
def test_a_failed_fetch_leaves_nothing(remote, tmp_path, failure):
    write_dataset(remote)
    shard = shards_of(remote)[0]
    path = storage.join(remote, shard.path)
    data = storage.read_bytes(path)
    storage.remove(path)
    if failure != "missing":
        storage.publish(path, data[:-1] if failure == "cut" else data[:-1] + b"x")
    with pytest.raises(FileNotFoundError if failure == "missing" else DatasetError, match=None if failure == "missing"
                       else r"was cut or altered: \d+ bytes of SHA-256 \w{64}, the manifest says \d+ of"):  # fmt: skip
        copy_of(remote, 0, tmp_path)
    assert files_in(tmp_path) == set()


def test_a_cache_that_cannot_be_written_is_named(remote, tmp_path):
    write_dataset(remote)
    (tmp_path / "cache").write_text("a file where a folder must be")
    with pytest.raises(DatasetError, match=r"part-00000-\w+.parquet, row group 0: cannot be read: .*cache"):
        open_files(remote, cache=str(tmp_path / "cache")).read(0)


@pytest.fixture
def shared(tmp_path):
    """The address of a folder that fsspec does not call local, of six shards, and their images."""
    images, _ = write_dataset(str(tmp_path / "data"), (40,) * 6)
    address = f"simplecache::file://{tmp_path}/data"  # threads of a process share the read position in memory://
    assert not storage.is_local(address)
    read_all(open_files(address))  # simplecache itself is not made for threads: its copies are there from now on
    return address, images


def test_threads_share_a_cache_that_is_too_small_for_all(shared, tmp_path):
    address, images = shared
    limit = 2 * max(shard.bytes for shard in shards_of(address))
    cache = tmp_path / "cache"
    together = threading.Barrier(6)

    def read(_):
        together.wait()
        return [read_all(open_files(address, cache=str(cache), cache_bytes=limit))[0] for _ in range(5)]

    with ThreadPoolExecutor(6) as executor:
        for found in executor.map(read, range(6)):
            np.testing.assert_array_equal(np.concatenate(found), np.concatenate([images] * 5))
    assert not [name for name in files_in(cache) if name.startswith(".")]


def _read_in_a_process(address: str, cache: str, limit: int) -> bytes:
    return b"".join(read_all(open_files(address, cache=cache, cache_bytes=limit))[0].tobytes() for _ in range(20))


@pytest.mark.parametrize("shards_that_fit", [2, 6])
def test_processes_share_a_cache(shared, tmp_path, shards_that_fit):
    address, images = shared
    limit = shards_that_fit * max(shard.bytes for shard in shards_of(address))
    cache = str(tmp_path / "cache")
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as executor:
        found = list(executor.map(_read_in_a_process, [address] * 3, [cache] * 3, [limit] * 3))
    assert found == [images.tobytes() * 20] * 3
    assert not [name for name in files_in(cache) if name.startswith(".")]
