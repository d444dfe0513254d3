"""How shards hold images, how large they are, what is set aside as a duplicate, and what is too much."""

import functools
import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import (
    SHAPE,
    check_statistics,
    encoded,
    folder_settings,
    picture,
    rows_of,
    set_aside,
    stored,
    write_folder,
    write_picture,
    write_table,
)
from PIL import Image

from pipeline.config.dataset import DatasetSettings
from pipeline.data.codec import decode_stored
from pipeline.data.manifest import DatasetError
from pipeline.ingest import images, layout
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources.source import SourceError

pytestmark = [pytest.mark.spark, pytest.mark.long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures") / "in", 40)


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_encoded_images_are_what_they_decode_to(spark, folder, tmp_path, encoding):
    image = {"encoding": encoding, "jpeg_quality": 30}
    found, _ = ingest_dataset(spark, folder_settings(tmp_path / "data", folder, image=image), cache="unused")
    assert (found.image.encoding, found.image.shape) == (encoding, SHAPE)
    rows = rows_of(tmp_path / "data").values()
    assert {Image.open(io.BytesIO(row["image"])).format for row in rows} == {encoding.upper()}
    decode = functools.partial(decode_stored, encoding=encoding, shape=SHAPE)
    check_statistics(tmp_path / "data", decode)
    made, wanted = {decode(row["image"]).tobytes() for row in rows}, {stored(number) for number in range(40)}
    assert (made == wanted) == (encoding == "png")
    spec = images.ImageSpec(SHAPE, **image)
    assert {row["image"] for row in rows} == {images.from_file(encoded(picture(number)), spec) for number in range(40)}


def test_zstd_compresses_images_alone(spark, tmp_path):
    flat = [encoded(np.full((8, 8, 3), number, np.uint8)) for number in range(30)]
    table = write_table(tmp_path / "flat", {"image": flat, "label": ["a"] * 30})
    plain = folder_settings(
        tmp_path / "none", table, source={"kind": "parquet"}, image={"shape": (3, 32, 32)}, row_group_rows=16
    )
    shards = {}
    for compression in ("none", "zstd"):
        settings = plain.model_copy(update={"path": str(tmp_path / compression), "compression": compression})
        found, _ = ingest_dataset(spark, settings, cache="unused")
        shards[compression] = found.split("train").shards[0]
        group = pq.ParquetFile(tmp_path / compression / shards[compression].path).metadata.row_group(0)
        kinds = [group.column(number).compression for number in range(3)]
        assert kinds == ["UNCOMPRESSED", "UNCOMPRESSED", "ZSTD" if compression == "zstd" else "UNCOMPRESSED"]
        assert not group.column(2).is_stats_set
        assert not group.column(2).has_dictionary_page
    assert shards["zstd"].bytes < shards["none"].bytes / 10
    assert rows_of(tmp_path / "zstd") == rows_of(tmp_path / "none")


def test_images_so_large_that_spark_hands_over_few_at_a_time(spark, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BATCH_BYTES", 3 << 20)  # three of them
    settings = folder_settings(
        tmp_path / "data", folder, image={"shape": (3, 600, 500)}, validation_share=0, test_share=0, row_group_rows=32
    )
    before = spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch")
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert [shard.row_groups for shard in found.split("train").shards] == [(32, 8)]
    assert spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") == before


def test_shards_are_about_as_large_as_the_setting(spark, folder, tmp_path):
    settings = folder_settings(tmp_path / "data", folder, shard_bytes=5 * 192, validation_share=0, test_share=0)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    shards = found.split("train").shards
    assert 6 <= len(shards) <= 8  # 40 rows, five each, about: one may get none
    for shard in shards:
        data = Path(tmp_path, "data", shard.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)


def test_the_job_fails_with_the_reasons_that_dominate(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 20)
    for number, content in enumerate([b""] * 4 + [b"no image"] * 3 + [encoded(picture(1, 9, 9))] * 2):
        (folder / "cat" / f"bad{number}.png").write_bytes(content)
    write_picture(folder / "stray.png", 3)
    settings = folder_settings(tmp_path / "data", folder, image={"resize": "none"}, max_bad_share=0.3)
    with pytest.raises(DatasetError) as error:
        ingest_dataset(spark, settings, cache="unused")
    assert str(error.value).startswith(
        "10 of 30 rows cannot be used (empty 4, undecodable 3, wrong_size 2), more than dataset.max_bad_share 0.3: see "
    )
    assert "\n" not in str(error.value)
    found, _ = ingest_dataset(spark, settings.model_copy(update={"max_bad_share": 0.34}), cache="unused")
    assert found.set_aside == {"empty": 4, "missing_label": 1, "undecodable": 3, "wrong_size": 2}
    check_statistics(tmp_path / "data")


def test_a_test_share_of_a_source_with_splits_and_no_test_is_refused(spark, tmp_path):
    for number, split in enumerate(("train", "validation")):
        write_folder(tmp_path / "in" / split, 10, first=100 * number)
    source = {"split_folders": True}
    settings = folder_settings(tmp_path / "data", tmp_path / "in", source=source, test_share=0.3)
    with pytest.raises(
        SourceError, match=r"test_share 0\.3 cannot be set apart: the source has splits .* none is `test`"
    ):
        ingest_dataset(spark, settings, cache="unused")
    assert not (tmp_path / "data").exists()
    for share in (0, DatasetSettings.model_fields["test_share"].default):  # one that nobody asked for
        changed = settings.model_copy(update={"test_share": share, "path": str(tmp_path / f"data {share}")})
        found, _ = ingest_dataset(spark, changed, cache="unused")
        assert {name: split.rows for name, split in found.splits.items()} == {"train": 10, "validation": 10}


def test_nothing_left_to_train_on_is_an_error(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 2)
    settings = folder_settings(tmp_path / "data", folder, validation_share=0, test_share=0.999999)
    with pytest.raises(DatasetError, match=r"no row of .*in is left for the split `train`"):
        ingest_dataset(spark, settings, cache="unused")


def test_duplicates_are_set_aside_and_what_is_judged_by_stays(spark, tmp_path):
    # Picture: the splits it is in, in the order of ids.
    places = {0: ["train", "train", "train"], 1: ["train", "test"], 2: ["train", "validation"],
              3: ["validation", "test"], 4: ["test", "test"], 5: ["train"], 6: ["validation"],
              7: ["test"]}  # fmt: skip
    rows = [(number, split) for number, splits in places.items() for split in splits]
    table = write_table(
        tmp_path / "table",
        {
            "image": [encoded(picture(number), "BMP" if row % 2 else "PNG") for row, (number, _) in enumerate(rows)],
            "label": ["ab"[row % 2] for row in range(len(rows))],
            "id": pa.array(range(len(rows)), pa.int64()),
            "split": [split for _, split in rows],
        },
    )
    source = {"kind": "parquet", "id_column": "id", "split_column": "split"}
    settings = folder_settings(tmp_path / "data", table, source=source, deduplicate=True, max_bad_share=0)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    kept = sorted((row["image"], row["split"]) for row in rows_of(tmp_path / "data").values())
    stays = {0: "train", 1: "test", 2: "validation", 3: "test", 4: "test", 5: "train", 6: "validation", 7: "test"}
    assert kept == sorted((stored(number), split) for number, split in stays.items())
    assert found.set_aside == {"duplicate": 6}
    assert {0, 9} <= set(rows_of(tmp_path / "data"))  # of equals in one split, the first id
    assert {row["reason"] for row in set_aside(tmp_path / "data")} == {"duplicate"}
    check_statistics(tmp_path / "data")


def test_what_is_set_aside_already_is_no_duplicate(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 20)
    for number in range(3):
        (folder / "cat" / f"empty{number}.png").touch()
        write_picture(folder / f"stray{number}.png", 0)  # the same as cat/0.png, but without a label
    settings = folder_settings(tmp_path / "data", folder, deduplicate=True, max_bad_share=0.5)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.set_aside == {"empty": 3, "missing_label": 3}
    assert stored(0) in {row["image"] for row in rows_of(tmp_path / "data").values()}


@pytest.mark.parametrize(("encoding", "expand"), [("raw", 1), ("jpeg", 2)])
def test_what_the_dataset_has_is_a_duplicate_when_appended(spark, tmp_path, encoding, expand):
    folder = write_folder(tmp_path / "in", 12)
    source, image = {"expand": expand}, {"encoding": encoding}
    settings = folder_settings(tmp_path / "data", folder, source=source, image=image, deduplicate=True, append=True)
    ingest_dataset(spark, settings, cache="unused")
    for number in (0, 1, 50, 50, 51):
        write_picture(folder / "cat" / f"again{number}{len(list(folder.rglob('*')))}.png", number)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.set_aside == {"duplicate": 3}
    assert (found.version, found.sources[-1].rows, found.sources[-1].already_there) == (2, 5, 12)
