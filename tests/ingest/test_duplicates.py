"""Which rows are left out as duplicates, and what it costs to find them."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import (
    check_statistics,
    encoded,
    folder_settings,
    picture,
    rows_of,
    set_aside,
    write_folder,
    write_table,
)
from shuffled_bytes import shuffled

from pipeline.data.manifest import DatasetError
from pipeline.ingest import existing
from pipeline.ingest.duplicates import leave_out
from pipeline.ingest.job import ingest_dataset

SHAPE = (3, 64, 64)
IMAGE_BYTES = 3 * 64 * 64
# What a row may weigh in the shuffles that find duplicates and what is new: hash, id, split and origin. Ten of an
# image's 12,288 bytes would be more.
ROW_BYTES = 300
spark_test = pytest.mark.spark
long = pytest.mark.long


def shard(ids, is_mark) -> pa.Table:
    """Rows of one shard, their images numbered."""
    return pa.table({"id": pa.array(ids, pa.int64()), "image": range(len(ids)), "duplicate": pa.array(is_mark)})


@pytest.mark.parametrize("seed", range(50))
def test_as_many_rows_of_an_id_are_left_out_as_there_are_marks_of_it(seed):
    random = np.random.default_rng(seed)
    ids = random.choice([-(2**63), -3, 0, 7, 2**63 - 1], random.integers(1, 6), replace=False)
    rows = {key: random.integers(1, 4) for key in ids.tolist()}
    marks = {key: random.integers(0, count + 1) for key, count in rows.items()}
    mixed = [
        (key, is_mark)
        for key in rows
        for is_mark in random.permutation([False] * rows[key] + [True] * marks[key]).tolist()
    ]
    table = shard(*zip(*mixed, strict=True))
    left = leave_out(table)
    assert Counter(left.column("id").to_pylist()) == Counter({key: rows[key] - marks[key] for key in rows})
    assert not any(left.column("duplicate").to_pylist())
    numbers = left.column("image").to_pylist()
    assert numbers == sorted(numbers)  # in the order of the shard


def test_a_shard_without_marks_is_as_it_was():
    table = shard([3, 3, 5], [False] * 3)
    assert leave_out(table) is table


@pytest.mark.parametrize(("ids", "is_mark"), [([3, 5, 5], [False, False, True]), ([3, 5, 5], [False, True, True]),
                                              ([9], [True]), ([1, 4, 4, 4], [False, True, False, True])])  # fmt: skip
def test_a_mark_of_an_image_that_is_not_there_is_an_error(ids, is_mark):
    enough = (ids, is_mark) == ([3, 5, 5], [False, False, True])
    if enough:
        assert leave_out(shard(ids, is_mark)).column("id").to_pylist() == [3]
        return
    wanted = next(key for key in ids if sum(m for k, m in zip(ids, is_mark, strict=True) if k == key))
    with pytest.raises(
        DatasetError, match=f"the image with the id {wanted} was found to be a duplicate, and was another"
    ):
        leave_out(shard(ids, is_mark))


def big_settings(dataset, path, **changes):
    return folder_settings(dataset, path, image={"shape": SHAPE}, max_bad_share=1, **changes)


@spark_test
@long
def test_images_are_shuffled_once_whether_duplicates_are_looked_for_or_not(spark, tmp_path):
    for number in range(120):
        path = tmp_path / "in" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number % 90, 64, 64)))
    written = {}
    for deduplicate in (False, True):
        settings = big_settings(tmp_path / f"data {deduplicate}", tmp_path / "in", deduplicate=deduplicate)
        with shuffled(spark) as bytes_of:
            found, _ = ingest_dataset(spark, settings, cache="unused")
        assert found.set_aside == ({"duplicate": 30} if deduplicate else {})
        written[deduplicate] = bytes_of.written
    print(f"\nbytes shuffled for 120 images of {IMAGE_BYTES}: {written}")
    assert written[False] > 120 * IMAGE_BYTES  # noise does not compress: what is counted is what is written
    assert written[True] - written[False] < 120 * ROW_BYTES


@pytest.fixture
def table(tmp_path):
    """A table without an id column, of 40 images."""
    return write_table(tmp_path / "table", {"image": FILES[:40], "label": ["a", "b"] * 20})


FILES = [encoded(picture(number, 64, 64)) for number in range(140)]


def add_rows(table, count):
    """The images 40 to 40 + count, and one that is there already."""
    rows = {"image": [*FILES[40 : 40 + count], FILES[0]], "label": [*("ab"[n % 2] for n in range(count)), "a"]}
    pq.write_table(pa.table(rows), table / "more.parquet")


@spark_test
@long
@pytest.mark.parametrize("new", [10, 100])
def test_appending_a_table_shuffles_what_is_new_and_the_ids(spark, table, tmp_path, monkeypatch, new):
    settings = big_settings(tmp_path / "data", table, source={"kind": "parquet"}, append=True)
    other = settings.model_copy(update={"path": str(tmp_path / "other")})
    for each in (settings, other):
        ingest_dataset(spark, each, cache="unused")
    add_rows(table, new)
    with shuffled(spark) as bytes_of:
        found, _ = ingest_dataset(spark, settings, cache="unused")
    assert (found.input_rows, found.sources[1].already_there) == (40 + new, 41)
    assert {row["image"] for row in rows_of(tmp_path / "data").values()} == {
        picture(number, 64, 64).transpose(2, 0, 1).tobytes() for number in range(40 + new)
    }
    print(f"\nbytes shuffled for {new} new images of {41 + new}: {bytes_of.written}")
    assert new * IMAGE_BYTES < bytes_of.written < new * (IMAGE_BYTES + 500) + (41 + new) * ROW_BYTES
    # Where lists of ids are too long for every executor, all payloads are shuffled, and the dataset is the same.
    monkeypatch.setattr(existing, "MOST_BROADCAST_IDS", 0)
    same, _ = ingest_dataset(spark, other, cache="unused")
    assert same.digest == found.digest


@spark_test
@long
def test_a_source_of_which_nothing_is_known_is_appended_whole(spark, table, tmp_path):
    settings = big_settings(tmp_path / "data", table, source={"kind": "parquet"}, append=True)
    ingest_dataset(spark, settings, cache="unused")
    other = write_table(tmp_path / "other", {"image": FILES[40:60], "label": ["a", "b"] * 10})
    settings = big_settings(tmp_path / "data", other, source={"kind": "parquet"}, append=True)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert (found.input_rows, found.sources[1].already_there) == (60, 0)


# Rows of one table without an id column: (picture, label, split), and how often each is there.
ROWS = [
    *((0, "a", "train", 3), (0, "b", "train", 1), (1, "a", "train", 2), (1, "a", "test", 2)),
    *((2, "b", "validation", 2), (2, "b", "train", 1), (3, "a", "train", 1), (4, "b", "test", 1), (5, "a", "train", 1)),
]


@spark_test
@long
@pytest.mark.parametrize("expand", [1, 3])
def test_rows_that_are_the_same_throughout_share_an_id_and_one_stays(spark, tmp_path, expand):
    rows = [row[:3] for row in ROWS for _ in range(row[3])]
    columns = {"image": [encoded(picture(row[0])) for row in rows], "label": [row[1] for row in rows],
               "split": [row[2] for row in rows]}  # fmt: skip
    source = {"kind": "parquet", "split_column": "split", "expand": expand}
    table = write_table(tmp_path / "table", columns)
    settings = folder_settings(tmp_path / "data", table, source=source, deduplicate=True, shard_bytes=2_000)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    kept = rows_of(tmp_path / "data").values()  # where each id is there once
    stays = {0: "train", 1: "test", 2: "validation", 3: "train", 4: "test", 5: "train"}
    originals = [row for row in kept if row["image"] in {picture(n).transpose(2, 0, 1).tobytes() for n in stays}]
    assert {row["image"]: row["split"] for row in originals} == {
        picture(number).transpose(2, 0, 1).tobytes(): split for number, split in stays.items()
    }
    assert found.set_aside == {"duplicate": 8}
    assert {name: split.rows for name, split in found.splits.items()} == {
        "train": 3 * expand,
        "validation": 1,
        "test": 2,
    }
    assert {row["reason"] for row in set_aside(tmp_path / "data")} == {"duplicate"}
    assert all(row["origin"] == f"{table}#{row['id']}" for row in set_aside(tmp_path / "data"))
    check_statistics(tmp_path / "data")


@spark_test
def test_a_shard_of_duplicates_alone_is_not_written(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 24)
    settings = folder_settings(tmp_path / "data", folder, deduplicate=True, append=True, shard_bytes=200)
    ingest_dataset(spark, settings, cache="unused")
    for number in range(6):
        (folder / "cat" / f"again {number}.png").write_bytes(encoded(picture(number)))
    (folder / "dog" / "new.png").write_bytes(encoded(picture(77)))
    found, _ = ingest_dataset(spark, settings.model_copy(update={"max_bad_share": 0}), cache="unused")
    assert (found.set_aside, sum(split.rows for split in found.splits.values())) == ({"duplicate": 6}, 25)
    assert all(shard.rows for shard in found.shards)
    check_statistics(tmp_path / "data")
