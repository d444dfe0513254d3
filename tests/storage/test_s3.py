"""Storage on a real S3 server, through a proxy that makes faults."""

import time

import pytest
from fault_proxy import KINDS

from pipeline import storage


def test_publish_read_list_remove(bucket):
    root = f"{bucket}/some/folder"
    assert not storage.exists(root)
    assert storage.names(root) == []
    storage.publish(f"{root}/two", b"2")
    storage.publish(f"{root}/one", b"1")
    storage.publish(f"{root}/one", b"one")
    assert storage.names(root) == ["one", "two"]
    assert [entry["size"] for entry in storage.entries(root)] == [3, 1]
    assert [entry["name"].rpartition("/")[2] for entry in storage.entries(bucket, below=True)] == ["one", "two"]
    assert storage.read_bytes(f"{root}/one") == b"one"
    assert storage.read_range(f"{root}/one", 1, 3) == b"ne"
    assert (storage.is_folder(root), storage.is_folder(f"{root}/one"), storage.is_folder(bucket)) == (True, False, True)
    storage.remove(root)
    storage.remove(root)
    assert not storage.exists(f"{root}/one")


def test_every_call_is_made_again_until_a_fault_is_over(s3, bucket):
    data = bytes(range(256)) * 8
    storage.publish(f"{bucket}/x/before", data)
    with s3.faults.at_random(1, 1 / 3) as made:
        for number in range(6):
            storage.publish(f"{bucket}/x/{number}", data)
            assert storage.read_bytes(f"{bucket}/x/{number}") == data
            assert storage.exists(f"{bucket}/x/{number}")
            assert storage.is_folder(f"{bucket}/x")
            assert "before" in storage.names(f"{bucket}/x")
            assert not storage.exists(f"{bucket}/y/{number}")
        with storage.open_file(f"{bucket}/x/before") as file:
            assert file.read(5) == data[:5]
            assert file.seek(-3, 2) == len(data) - 3
            assert file.read() == data[-3:]
        storage.remove(f"{bucket}/x")
    assert storage.names(f"{bucket}/x") == []
    assert len(made) > len(KINDS) // 2


def test_an_outage_ends_with_an_error_that_names_file_host_and_reason(s3, bucket, caplog):
    storage.publish(f"{bucket}/x/picture.png", b"1")
    began = time.monotonic()
    with (
        s3.faults.at_random(1, 1, kinds=("unavailable",)),
        storage.retry_for(1),
        pytest.raises(storage.UnreachableError) as error,
    ):
        storage.read_bytes(f"{bucket}/x/picture.png")
    assert 1 <= time.monotonic() - began < 5
    assert str(error.value).startswith(f"{bucket}/x/picture.png cannot be read from ")
    assert "Service Unavailable" in str(error.value)
    assert caplog.text.count("trying again for up to 1 s") == 1


def test_what_is_missing_or_forbidden_is_said_at_once_and_named(s3, bucket):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=f"{bucket}/missing"):
        storage.read_bytes(f"{bucket}/missing")
    with pytest.raises(FileNotFoundError, match=f"{bucket}-gone/missing"):
        storage.read_bytes(f"{bucket}-gone/missing")
    with s3.faults.at_random(1, 1, kinds=("forbidden",)):
        for call in (storage.read_bytes, storage.exists, storage.names):
            with pytest.raises(PermissionError, match=f"{bucket}/x"):
                call(f"{bucket}/x")
    assert time.monotonic() - began < 10


def kinds(s3, call):
    """What a call returns, and the kinds of requests that it makes."""
    s3.faults.requests.clear()
    return call(), [request.kind for request in s3.faults.requests]


def test_a_file_is_read_and_removed_by_one_request(s3, bucket):
    storage.publish(f"{bucket}/x/small", b"small")
    storage.publish(f"{bucket}/x/empty", b"")
    assert kinds(s3, lambda: storage.read_bytes(f"{bucket}/x/small")) == (b"small", ["GET"])
    assert kinds(s3, lambda: storage.read_bytes(f"{bucket}/x/empty")) == (b"", ["GET"])
    assert kinds(s3, lambda: storage.remove_file(f"{bucket}/x/small")) == (None, ["DELETE"])
    storage.remove_file(f"{bucket}/x/small")
    assert storage.names(f"{bucket}/x") == ["empty"]


@pytest.mark.parametrize("more", [-1, 0, 1, 3 << 20])
def test_a_large_file_is_read_whole(bucket, more):
    data = bytes(range(256)) * (((4 << 20) + more) // 256 + 1)
    data = data[: (4 << 20) + more]
    storage.publish(f"{bucket}/large", data)
    assert storage.read_bytes(f"{bucket}/large") == data


def test_the_versions_of_all_files_are_one_request(s3, bucket):
    for number in range(3):
        storage.publish(f"{bucket}/x/{number}", b"1")
    before, requests = kinds(s3, lambda: storage.versions(f"{bucket}/x"))
    assert (list(before), requests) == (["0", "1", "2"], ["LIST"])
    storage.publish(f"{bucket}/x/1", b"2")
    after = storage.versions(f"{bucket}/x")
    assert [name for name in after if after[name] != before[name]] == ["1"]


def test_files_are_read_at_once_and_each_that_fails_says_why(s3, bucket):
    paths = [f"{bucket}/x/{number}" for number in range(20)]
    for number, path in enumerate(paths):
        storage.publish(path, str(number).encode())
    found = storage.read_many([*paths, f"{bucket}/x/missing"])
    assert found[:20] == [str(number).encode() for number in range(20)]
    assert isinstance(found[20], FileNotFoundError)
    began = time.monotonic()
    with s3.faults.at_random(1, 1, kinds=("unavailable",), only="x/7$"), storage.retry_for(0):
        found = storage.read_many(paths)
    assert [number for number, data in enumerate(found) if isinstance(data, storage.UnreachableError)] == [7]
    assert time.monotonic() - began < 30
