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
    stored,
    write_folder,
    write_table,
)

from pipeline.config.dataset import SourceSettings
from pipeline.data.manifest import DatasetError
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import SourceError

pytestmark = [pytest.mark.spark, pytest.mark.long]

FILES = [encoded(picture(number)) for number in range(30)]


def table_settings(dataset, path, image=None, kind="parquet", **changes):
    names = {name: changes.pop(name) for name in list(changes) if name in SourceSettings.model_fields}
    return folder_settings(dataset, path, source={"kind": kind, **names}, image=image, **changes)


def opened(spark, path, kind="parquet", **changes):
    return open_source(spark, SourceSettings(kind=kind, path=str(path), **changes), "unused")


def test_files_in_a_parquet_column(spark, tmp_path):
    names = ["dog", "cat"] * 15
    names[4], names[7] = None, "  "
    files = list(FILES)
    files[9], files[10] = None, b"no image"
    table = write_table(tmp_path / "table", {"content": files, "kind of": names})
    settings = table_settings(
        tmp_path / "data", table, image_column="content", label_column="kind of", max_bad_share=0.5
    )
    found, written = ingest_dataset(spark, settings, cache="unused")
    assert written
    assert found.classes == ("cat", "dog")
    assert found.set_aside == {"missing_image": 1, "missing_label": 2, "undecodable": 1}
    assert all(row["origin"] == f"{table}#{row['id']}" for row in set_aside(tmp_path / "data"))
    rows = rows_of(tmp_path / "data").values()
    good = [number for number in range(30) if number not in (4, 7, 9, 10)]
    assert {row["image"]: row["label"] for row in rows} == {stored(n): int(n % 2 == 0) for n in good}
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    check_statistics(tmp_path / "data")
    assert not ingest_dataset(spark, settings, cache="unused")[1]


def test_numbers_are_classes_by_themselves_and_places_among_given_names(spark, tmp_path):
    labels = pa.array([10, 2, 9, 2, None, -1], pa.int64())
    table = write_table(tmp_path / "table", {"image": FILES[:6], "label": labels})

    def numbers(**changes):
        source = opened(spark, table, **changes)
        return source.classes, [row.label for row in source.items.collect()]

    assert numbers() == (("-1", "10", "2", "9"), [1, 2, 3, 2, None, 0])
    assert numbers(classes=("a", "b", "c")) == (("a", "b", "c"), [-1, 2, -1, 2, None, -1])
    write_table(tmp_path / "table", {"image": FILES[:6], "label": pa.array([10, 2, 9, 2, None, 0], pa.int8())})
    assert numbers() == (("0", "2", "9", "10"), [3, 1, 2, 1, None, 0])
    # Names that are numbers are what the labels say; where they are the places, too, that is the same.
    assert numbers(classes=("2", "09", "10")) == (("2", "09", "10"), [2, 0, 1, 0, None, -1])
    digits = tuple("0123456789")
    assert numbers(classes=digits) == (digits, [-1, 2, 9, 2, None, 0])
    assert numbers(classes=(*digits, "ten")) == ((*digits, "ten"), [10, 2, 9, 2, None, 0])
    with pytest.raises(SourceError, match=r"classes 2, 02 has one number twice, and column 'label' of .*table has num"):
        numbers(classes=("2", "02"))


def test_names_of_columns_have_any_characters(spark, tmp_path):
    columns = {"an `image`": FILES[:4], "a.label`": ["a", "b"] * 2, "`": [4, 5, 6, 7], "part of": ["train"] * 4}
    source = opened(
        spark, write_table(tmp_path / "table", columns), image_column="an `image`", label_column="a.label`",
        id_column="`", split_column="part of",
    )  # fmt: skip
    assert sorted((row.id, row.label, row.split) for row in source.items.collect()) == [
        (4, 0, "train"), (5, 1, "train"), (6, 0, "train"), (7, 1, "train"),
    ]  # fmt: skip


def test_ids_and_splits_from_columns(spark, tmp_path):
    splits = ["train"] * 20 + ["VAL"] * 4 + ["test"] * 4 + ["other", None]
    ids = pa.array(range(100, 130), pa.int32())
    columns = {"image": FILES, "label": ["a", "b"] * 15, "key": ids, "part": splits}
    table = write_table(tmp_path / "table", columns)
    settings = table_settings(tmp_path / "data", table, id_column="key", split_column="part", max_bad_share=0.1)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.set_aside == {"unknown_split": 2}
    assert {row["id"] for row in set_aside(tmp_path / "data")} == {128, 129}
    for key, row in rows_of(tmp_path / "data").items():
        assert row["image"] == stored(key - 100)
        assert row["split"] == {"train": "train", "VAL": "validation", "test": "test"}[splits[key - 100]]
    write_table(table, {**columns, "part": ["test"] * 30})
    with pytest.raises(SourceError, match=r"table: column 'part' says `train` in no row"):
        opened(spark, table, id_column="key", split_column="part")
    for wrong in ([*range(29), 28], [*range(29), None]):
        write_table(table, {**columns, "key": wrong})
        with pytest.raises(SourceError, match=r"column 'key' .* has 29 distinct values in 30 rows"):
            opened(spark, table, id_column="key")


def test_the_struct_of_sparks_image_source(spark, tmp_path):
    write_folder(tmp_path / "in", 12)
    (tmp_path / "in" / "cat" / "damaged.png").write_bytes(b"no image")
    table = spark.read.format("image").load(f"{tmp_path}/in/*").selectExpr(
        "image", "regexp_extract(image.origin, '/(cat|dog)/', 1) label"
    )  # fmt: skip
    table.write.parquet(str(tmp_path / "table"))
    settings = table_settings(tmp_path / "data", tmp_path / "table", max_bad_share=0.1)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert sum(found.set_aside.values()) == 1
    assert {row["image"]: row["label"] for row in rows_of(tmp_path / "data").values()} == {
        stored(number): number % 2 for number in range(12)
    }
    check_statistics(tmp_path / "data")
    # An image's id is its content, not the place where Spark found it.
    (tmp_path / "in").rename(tmp_path / "moved")
    again = spark.read.format("image").load(f"{tmp_path}/moved/*").selectExpr(
        "image", "regexp_extract(image.origin, '/(cat|dog)/', 1) label"
    )  # fmt: skip
    again.createOrReplaceTempView("moved_pictures")
    ids = {row.id for row in opened(spark, "moved_pictures", kind="table").items.select("id").collect()}
    assert set(rows_of(tmp_path / "data")) < ids
    spark.catalog.dropTempView("moved_pictures")


def test_a_table_of_the_catalog(spark, tmp_path):
    table = write_table(tmp_path / "files", {"image": FILES, "label": ["a", "b"] * 15})
    spark.sql(f"CREATE TABLE pictures USING parquet LOCATION '{table}'")
    try:
        found, _ = ingest_dataset(spark, table_settings(tmp_path / "data", "pictures", kind="table"), cache="unused")
        assert (found.input_rows, found.set_aside) == (30, {})
        assert {row["image"] for row in rows_of(tmp_path / "data").values()} == {stored(n) for n in range(30)}
    finally:
        spark.sql("DROP TABLE pictures")


def test_a_view_without_files_is_known_by_its_images(spark):
    def view(files):
        spark.createDataFrame([(file, "a") for file in files], "image binary, label string").createOrReplaceTempView(
            "made_pictures"
        )
        return opened(spark, "made_pictures", kind="table")

    first, same, other = view(FILES[:3]), view([bytes(file) for file in FILES[:3]]), view(FILES[1:4])
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert (first.rows, first.classes) == ({"": 3}, ("a",))
    spark.catalog.dropTempView("made_pictures")


def test_a_table_that_was_written_again_is_noticed(spark, tmp_path):
    random = np.random.default_rng(0)
    files = [random.bytes(200) for _ in range(6)]
    table = write_table(tmp_path / "table", {"image": FILES, "label": ["a", "b"] * 15})
    settings = table_settings(tmp_path / "data", table)
    ingest_dataset(spark, settings, cache="unused")
    before = opened(spark, table)
    write_table(table, {"image": FILES, "label": ["a", "b"] * 15})
    assert opened(spark, table).fingerprint == before.fingerprint
    with pytest.raises(DatasetError, match="files of the source were written again since"):
        ingest_dataset(spark, settings, cache="unused")
    write_table(table, {"image": [*FILES[:24], *files], "label": ["a", "b"] * 15})
    assert opened(spark, table).fingerprint != before.fingerprint


def test_rows_that_are_the_same_throughout_are_all_kept(spark, tmp_path):
    table = write_table(tmp_path / "table", {"image": FILES[:2] * 5, "label": ["a", "b"] * 5})
    settings = table_settings(tmp_path / "data", table, validation_share=0, test_share=0)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.split("train").rows == 10
    assert found.split("train").label_counts == (5, 5)


GOOD = {"image": FILES[:4], "label": ["a", "b", "a", "b"]}


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (GOOD, {"image_column": "img"}, r"has no column 'img' \(dataset\.source\.image_column\); it has image, label"),
        (GOOD, {"label_column": "y"}, r"has no column 'y' \(dataset\.source\.label_column\)"),
        (GOOD, {"id_column": "label"}, r"column 'label' \(dataset\.source\.id_column\) is string, not one of tinyint"),
        ({**GOOD, "label": [0.5] * 4}, {}, r"column 'label' .*label_column\) is double, not one of string, tinyint"),
        ({**GOOD, "image": ["x"] * 4}, {}, r"column 'image' .* is string, neither binary nor the struct"),
        ({**GOOD, "image": [{"height": 1}] * 4}, {}, r"is struct<height:bigint>, neither binary nor the struct"),
        ({**GOOD, "label": pa.nulls(4, pa.string())}, {}, r"column 'label' is null or blank in every row"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}, {}, r"has no rows: fill it"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_named_with_its_column(spark, tmp_path, columns, changes, message):
    table = write_table(tmp_path / "table", columns)
    with pytest.raises(SourceError, match=message) as error:
        opened(spark, table, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("parquet", "nowhere", r"parquet .*nowhere cannot be opened: \[PATH_NOT_FOUND\]"),
        ("table", "no_such_table", r"table no_such_table cannot be opened: \[TABLE_OR_VIEW_NOT_FOUND\]"),
        ("delta", "nowhere", r"nowhere: Spark has no Delta Lake here\. Start it with the jars made for this Spark"),
    ],
)
def test_a_table_that_is_not_there_is_named(spark, tmp_path, kind, path, message):
    with pytest.raises(SourceError, match=message) as error:
        opened(spark, path if kind == "table" else tmp_path / path, kind=kind)
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_file_is_one_line(spark, tmp_path):
    table = write_table(tmp_path / "table", GOOD)
    (table / "other.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises((SourceError, RuntimeError)) as error:
        ingest_dataset(spark, table_settings(tmp_path / "data", table), cache="unused")
    assert "\n" not in str(error.value)
    assert "other.parquet" in str(error.value)


def test_images_of_a_table_may_be_far_larger_than_what_becomes_of_them(spark, tmp_path):
    big = [encoded(picture(number, 300, 400), "BMP") for number in range(12)]
    table = tmp_path / "table"
    table.mkdir()
    pq.write_table(pa.table({"image": big, "label": ["a", "b"] * 6}), table / "some.parquet", row_group_size=3)
    settings = table_settings(tmp_path / "data", table, image={"shape": (1, 4, 4)})
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert (found.input_rows, found.image.shape) == (12, (1, 4, 4))
    check_statistics(tmp_path / "data")
