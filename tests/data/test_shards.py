import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import change_shard, open_files, read_all, write_dataset

from pipeline import storage
from pipeline.data import load_manifest, shards
from pipeline.data.manifest import DatasetError

NULLABLE = pa.schema({"id": pa.int64(), "label": pa.int64(), "image": pa.binary()})
LARGE = pa.schema({"id": pa.int64(), "label": pa.int32(), "image": pa.large_binary()})
FOREIGN = {
    "plain": {},
    "zstd": {"compression": "zstd"},
    "uncompressed": {"compression": "none", "use_dictionary": False, "write_statistics": False},
    "nullable": {"compression": "none", "use_dictionary": False, "write_statistics": False, "schema": NULLABLE},
    "large binary": {"compression": "none", "use_dictionary": False, "schema": LARGE},
    "many pages": {"compression": "none", "use_dictionary": False, "data_page_size": 100, "write_batch_size": 4,
                   "write_statistics": False},
    "two pages": {"compression": "none", "use_dictionary": False, "data_page_size": 16 * 34, "write_batch_size": 16,
                  "write_statistics": False},
    "version 2 pages": {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
    "lengths apart": {"compression": "none", "use_dictionary": False, "write_statistics": False,
                      "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}},
}  # fmt: skip


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def shard_of(path, number=0) -> Path:
    return Path(path, load_manifest(str(path)).split("train").shards[number].path)


def raw_start(files, number):
    """Where a row group is read from without decoding it; None if pyarrow must."""
    shard, group = files.row_groups[number]
    return files._shard(number).raw_start(group, shard.row_groups[group], files.image_bytes)


def test_what_ingest_writes_is_read_without_decoding(tmp_path):
    images, labels = write_dataset(str(tmp_path), (70, 41, 1))
    files = open_files(str(tmp_path))
    assert files.group_rows.tolist() == [30, 30, 10, 30, 11, 1]
    found = read_all(files)
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)
    for number in range(6):
        start = raw_start(files, number)
        first = files.read(number)[0][0].tobytes()
        data = Path(tmp_path, files.row_groups[number].shard.path).read_bytes()
        assert data[start + shards.PREFIX :].startswith(first)


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_programs_give_the_same_images(tmp_path, kind):
    images, labels = write_dataset(str(tmp_path), (70, 41), foreign=FOREIGN[kind])
    files = open_files(str(tmp_path))
    found = read_all(files)
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)
    for first, end in ((0, 1), (3, 17), (15, 30), (29, 30)):
        np.testing.assert_array_equal(files.read(1, first, end)[0], images[30 + first : 30 + end])
    if kind in ("plain", "zstd", "lengths apart"):
        assert raw_start(files, 0) is None


def test_compressed_shards_give_the_same_images(tmp_path):
    images, _ = write_dataset(str(tmp_path), compression="zstd")
    files = open_files(str(tmp_path))
    assert raw_start(files, 0) is None
    np.testing.assert_array_equal(read_all(files)[0], images)


@pytest.mark.parametrize("foreign", [None, FOREIGN["plain"]])
def test_parts_of_row_groups_are_read(tmp_path, foreign):
    images, labels = write_dataset(str(tmp_path), (45,), foreign=foreign)
    files = open_files(str(tmp_path))
    for first in range(0, 15, 4):
        for end in range(first + 1, 16, 3):
            part = files.read(1, first, end)
            np.testing.assert_array_equal(part[0], images[30 + first : 30 + end])
            np.testing.assert_array_equal(part[1], labels[30 + first : 30 + end])
            target = np.full((end - first, shards.PREFIX + 30), 77, np.uint8)
            view = files.read_raw(1, first, end, target)
            assert np.shares_memory(view, target)
            np.testing.assert_array_equal(view, images[30 + first : 30 + end].reshape(-1, 30))


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 9, 8)])
def test_encoded_shards_are_decoded(tmp_path, encoding, shape):
    images, labels = write_dataset(str(tmp_path), shape=shape, encoding=encoding)
    files = open_files(str(tmp_path))
    found = read_all(files)
    assert (found[0].shape, found[0].dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(found[1], labels)
    if encoding == "png":
        np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(files.read(1, 4, 9)[0], found[0][34:39])
    stored = files.read_stored(1, 4, 9)
    assert stored[0].startswith(b"\x89PNG" if encoding == "png" else b"\xff\xd8")
    payloads = sum(len(payload) for number in range(5) for payload in files.read_stored(number, 0, 30))
    assert files.memory_bytes > payloads


def test_memory_is_at_least_what_the_images_take(tmp_path):
    images, labels = write_dataset(str(tmp_path))
    assert (
        images.nbytes + labels.nbytes <= open_files(str(tmp_path)).memory_bytes <= 1.5 * images.nbytes + labels.nbytes
    )


@pytest.mark.parametrize("written", [{}, {"encoding": "png"}, {"compression": "zstd"}], ids=["raw", "png", "zstd"])
@pytest.mark.parametrize("most_open", [1, 2, 64])
def test_many_threads_read_at_once_also_more_files_than_may_be_open(tmp_path, monkeypatch, most_open, written):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", most_open)
    images, labels = write_dataset(str(tmp_path), (35,) * 8, **written)
    files = open_files(str(tmp_path))
    starts = np.cumsum(files.group_rows) - files.group_rows
    together = threading.Barrier(8)

    def read(seed):
        random = np.random.default_rng(seed)
        together.wait()
        for number in random.integers(0, len(starts), 60):
            first = int(random.integers(0, files.group_rows[number]))
            found = files.read(number, first)
            rows = slice(starts[number] + first, starts[number] + files.group_rows[number])
            np.testing.assert_array_equal(found[0], images[rows])
            np.testing.assert_array_equal(found[1], labels[rows])
        return len(files._open)

    with ThreadPoolExecutor(8) as executor:
        assert max(executor.map(read, range(8))) <= most_open
    files.close()
    assert not files._open


def test_one_flipped_byte_anywhere_is_noticed(tmp_path):
    write_dataset(str(tmp_path), (9,), row_group_rows=5)
    shard = shard_of(tmp_path)
    data = shard.read_bytes()
    for place in range(len(data)):
        shard.write_bytes(flipped(data, place))
        with pytest.raises(DatasetError, match=rf"{shard.name}, row group 1: was altered: its SHA-256 is \w+, the man"):
            open_files(str(tmp_path)).read(1)
    shard.write_bytes(data)
    assert len(open_files(str(tmp_path)).read(1)[0]) == 4


def test_verify_off_hashes_nothing(tmp_path):
    images, _ = write_dataset(str(tmp_path))
    files = open_files(str(tmp_path))
    shard = shard_of(tmp_path)
    data = shard.read_bytes()
    shard.write_bytes(flipped(data, raw_start(files, 0) + shards.PREFIX))
    found = read_all(open_files(str(tmp_path), verify="off"))[0]
    assert found[0, 0, 0, 0] == images[0, 0, 0, 0] ^ 0xFF
    np.testing.assert_array_equal(found[1:], images[1:])


def test_a_shard_is_verified_once(tmp_path, monkeypatch):
    """Also where it is closed in between, to keep few files open."""
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 1)
    images, _ = write_dataset(str(tmp_path), (30, 30))
    files = open_files(str(tmp_path))
    start = raw_start(files, 0)
    files.read(0)
    files.read(1)
    shard = shard_of(tmp_path)
    shard.write_bytes(flipped(shard.read_bytes(), start + shards.PREFIX))
    assert files.read(0)[0][0, 0, 0, 0] == images[0, 0, 0, 0] ^ 0xFF


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("cached", [False, True])
def test_remote_shards_are_read(remote, tmp_path, cached, encoding):
    images, labels = write_dataset(remote, (70, 41), encoding=encoding)
    cache = str(tmp_path / "cache") if cached else None
    found = read_all(open_files(remote, cache=cache))
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)
    assert len(list(tmp_path.glob("cache/*.parquet"))) == (2 if cached else 0)
    files = open_files(remote, cache=cache, verify="off")
    np.testing.assert_array_equal(files.read(1, 7, 21)[0], images[37:51])


def test_local_shards_are_not_copied_into_the_cache(tmp_path):
    write_dataset(str(tmp_path / "data"))
    read_all(open_files(str(tmp_path / "data"), cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: None, "is missing"),
    (lambda data: data[:-1], r"is (cut: \d+ bytes, the manifest says \d+|too long)"),
    (lambda data: b"", r"is cut: 0 bytes, the manifest says \d+"),
    (lambda data: data + b"x", r"is too long: \d+ bytes, the manifest says \d+"),
    (lambda data: flipped(data, 100), "was altered: its SHA-256 is"),
    (lambda data: bytes(len(data)), "was altered: its SHA-256 is"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["local", "remote", "cached"])
def test_a_damaged_shard_is_named(remote, tmp_path, where, change, message):
    path = str(tmp_path / "data") if where == "local" else remote
    images, _ = write_dataset(path)
    name = storage.join(path, load_manifest(path).split("train").shards[1].path)
    data = change(storage.read_bytes(name))
    storage.remove(name)
    if data is not None:
        with fsspec.open(name, "wb") as file:
            file.write(data)
    files = open_files(path, cache=str(tmp_path / "cache") if where == "cached" else None)
    np.testing.assert_array_equal(files.read(0)[0], images[:30])
    if where == "cached" and data is not None:
        message = r"was cut or altered: \d+ bytes of SHA-256 \w+, the manifest says \d+ of \w+"
    for _ in range(2):  # again the second time
        with pytest.raises(DatasetError, match=rf"^{name}, row group 1: {message}"):
            files.read(4)


@pytest.mark.parametrize("verify", ["shard", "off"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, verify):
    write_dataset(str(tmp_path))
    for data in (b"", b"x" * 5000, b"PAR1" + b"x" * 500 + b"PAR1", b"PAR1" + bytes(400) + b"\x50\1\0\0PAR1"):
        name = change_shard(str(tmp_path), 1, data)
        with pytest.raises(DatasetError, match=rf"{name}, row group 0: cannot be read: "):
            open_files(str(tmp_path), verify=verify).read(3)


def parquet_of(**options) -> bytes:
    sink = pa.BufferOutputStream()
    options = {"id": range(70), "label": [0] * 70, "image": [bytes(30)] * 70, **options}
    size = options.pop("size", 30)
    pq.write_table(pa.table({k: v for k, v in options.items() if v is not None}), sink, row_group_size=size)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("options", "message"), [
    ({"size": 29}, "row group 0: has 29 rows, the manifest says 30"),
    ({"size": 31}, "row group 0: has 31 rows, the manifest says 30"),
    ({"image": [bytes(29)] * 70}, r"row group 0: an image is not 30 bytes \(shape \(1, 6, 5\)\)"),
    ({"image": [bytes(30)] * 7 + [b""] + [bytes(30)] * 62}, "row group 0: an image is not 30 bytes"),
    ({"image": [bytes(30)] * 7 + [None] + [bytes(30)] * 62}, "row group 0: `image` is binary with 1 nulls"),
    ({"image": None}, "row group 0: cannot be read"),
    ({"label": None}, "row group 0: cannot be read"),
    ({"label": [None] + [1] * 69}, "row group 0: `label` is int64 with 1 nulls"),
    ({"label": ["cat"] * 70}, "row group 0: `label` is string with 0 nulls"),
    ({"label": [0.5] * 70}, "row group 0: `label` is double with 0 nulls"),
    ({"image": ["text of thirty characters long"] * 70}, "row group 0: `image` is string with 0 nulls"),
    ({"image": [5] * 70}, "row group 0: `image` is int64 with 0 nulls"),
])  # fmt: skip
def test_a_shard_of_other_content_than_the_manifest_says_is_named(tmp_path, options, message):
    write_dataset(str(tmp_path))
    name = change_shard(str(tmp_path), 0, parquet_of(**options))
    with pytest.raises(DatasetError, match=f"{name}, {message}"):
        open_files(str(tmp_path)).read(0)


def test_a_row_group_that_is_not_there_is_named(tmp_path):
    write_dataset(str(tmp_path))
    name = change_shard(str(tmp_path), 0, parquet_of(size=70), row_groups=(30, 40))
    with pytest.raises(DatasetError, match=f"{name}, row group 1: cannot be read"):
        open_files(str(tmp_path)).read(1)


@pytest.mark.parametrize("payload", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_damaged_stored_image_is_named(tmp_path, payload):
    write_dataset(str(tmp_path), encoding="png")
    whole = open_files(str(tmp_path)).read_stored(0, 0, 30)
    name = change_shard(str(tmp_path), 0, parquet_of(image=[*whole[:11], payload, *whole[12:], *whole, *whole[:10]]))
    files = open_files(str(tmp_path))
    assert len(files.read(0, 0, 11)[0]) == 11
    with pytest.raises(DatasetError, match=f"{name}, row group 0: an image is damaged: "):
        files.read(0)


def test_a_stored_image_of_another_shape_is_named(tmp_path):
    write_dataset(str(tmp_path), encoding="png")
    write_dataset(str(tmp_path / "wide"), encoding="png", shape=(1, 5, 6))
    name = change_shard(str(tmp_path), 0, shard_of(tmp_path / "wide").read_bytes())
    with pytest.raises(DatasetError, match=f"{name}, row group 0: an image is damaged: wrong_size"):
        open_files(str(tmp_path)).read(0)


@pytest.mark.parametrize(("label", "labels", "more"), [
    (3, pa.array([1] * 69 + [3], pa.int32()), ""),
    (-1, pa.array([1] * 35 + [-1, 2, 255] + [0] * 32, pa.int64()), r" \(and 1 other rows\)"),
    (200, pa.array([1] * 30 + [200] + [0] * 39, pa.uint8()), ""),
])  # fmt: skip
def test_a_label_without_a_class_is_named(tmp_path, label, labels, more):
    write_dataset(str(tmp_path))
    name = change_shard(str(tmp_path), 0, parquet_of(label=labels))
    row = labels.to_pylist().index(label)
    files = open_files(str(tmp_path))
    files.read(0)
    text = f"row {row % 30} has label {label}{more}, but the dataset has 3 classes, 0 to 2: ingest it again"
    for number in range(1, 3):
        if number == row // 30:
            with pytest.raises(DatasetError, match=f"{name}, row group {number}: {text}"):
                files.read(number)
        else:
            files.read(number)
