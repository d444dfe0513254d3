"""Files whose names are not those of images, and files that are too large to be read."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
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
    write_picture,
    write_table,
)
from PIL import Image

from pipeline.config.settings import Settings
from pipeline.data.manifest import DatasetError
from pipeline.ingest.job import ingest, ingest_dataset
from pipeline.ingest.sources.folder import _read_files

pytestmark = [pytest.mark.spark, pytest.mark.long]


def reasons_of(dataset, folder):
    return {row["origin"].removeprefix(f"{folder}/"): row["reason"] for row in set_aside(dataset)}


@pytest.fixture
def mixed(tmp_path):
    """12 PNG files, and others: number 50 to 55 in files of other names, some files that are no images, hidden ones."""
    folder = write_folder(tmp_path / "in", 12)
    for number, (name, kind) in enumerate([("a.gif", "GIF"), ("b.tif", "TIFF"), ("c.TIFF", "TIFF"), ("d.jfif", "JPEG"),
                                           ("e.ppm", "PPM"), ("no extension", "PNG")], 50):  # fmt: skip
        write_picture(folder / "cat" / name, number, kind)
    for name in ("README.txt", "cat/notes.txt", "dog/list.txt", "dog/.DS_Store", ".git/config", ".git/x.gif"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image")
    return folder


def result_of(spark, tmp_path, folder, **changes):
    data = folder_settings(tmp_path / "data", folder, **changes)
    settings = Settings(name="x", output=str(tmp_path / "out"), dataset=data)
    result = ingest(spark, settings)
    assert json.loads(Path(tmp_path, "out", "ingest.json").read_text()) == result.model_dump(mode="json")
    return result


def test_what_is_no_image_by_its_name_is_counted_and_named(spark, mixed, tmp_path):
    result = result_of(spark, tmp_path, mixed)
    assert (sum(result.rows.values()), result.set_aside) == (12, {})
    others = result.other_files
    assert others.files == 9
    assert others.extensions == {".txt": 3, ".tiff": 1, ".tif": 1, ".jfif": 1, ".gif": 1, ".ppm": 1, "": 1}
    assert next(iter(others.extensions)) == ".txt"
    assert others.examples[0] == "README.txt"
    assert len(others.examples) == 5
    assert str(others).startswith("3 .txt, 1 without an extension, 1 .gif,")
    again = result_of(spark, tmp_path, mixed)  # also where nothing has to be written
    assert (again.written, again.other_files) == (False, others)


def test_files_of_the_extensions_that_are_set_are_read(spark, mixed, tmp_path):
    extensions = ["PNG", "gif", ".tif", "TIFF", "jfif", "ppm", ""]
    result = result_of(spark, tmp_path, mixed, source={"extensions": extensions})
    assert result.other_files.extensions == {".txt": 3}
    assert (sum(result.rows.values()), result.set_aside) == (18, {})
    images = {row["image"] for row in rows_of(tmp_path / "data").values()}
    assert {stored(number) for number in (*range(12), 51, 52, 54, 55)} <= images  # those that are stored without loss
    check_statistics(tmp_path / "data")


def test_every_file_may_be_read_whatever_its_name(spark, mixed, tmp_path):
    (mixed / "cat" / "list.pdf").write_bytes(b"%PDF-1.7")
    result = result_of(spark, tmp_path, mixed, source={"extensions": ["any"]}, max_bad_share=0.5)
    assert result.other_files.files == 0
    assert (sum(result.rows.values()), result.set_aside) == (18, {"undecodable": 4})
    undecodable = {"README.txt", "cat/notes.txt", "dog/list.txt", "cat/list.pdf"}
    assert reasons_of(tmp_path / "data", mixed) == dict.fromkeys(undecodable, "undecodable")
    check_statistics(tmp_path / "data")


def test_a_dataset_in_a_folder_of_which_every_file_is_read_is_refused(spark, mixed, tmp_path):
    (tmp_path / "link").symlink_to(mixed)
    for place in (mixed, mixed / "data", tmp_path / "link" / "data"):
        settings = folder_settings(place, mixed, source={"extensions": ["any"]}, max_bad_share=0.5)
        with pytest.raises(DatasetError, match=r"dataset\.path .* is in dataset\.source\.path .*: choose another"):
            ingest_dataset(spark, settings, cache="unused")
    # A hidden folder is not listed, what only begins with the folder's name is another one, and else names tell.
    for place in (mixed / ".data", tmp_path / f"{mixed.name}-data"):
        settings = folder_settings(place, mixed, source={"extensions": ["any"]}, max_bad_share=0.5)
        for _ in range(2):
            found, written = ingest_dataset(spark, settings, cache="unused")
        assert (found.input_rows, written) == (21, False)
    ingest_dataset(spark, folder_settings(mixed / "data", mixed), cache="unused")


def test_many_kinds_of_names_are_counted_and_the_most_frequent_named(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 6)
    for number in range(30):
        (folder / f"scan.{number:03d}").touch()
        (folder / f"more {number}.xml").touch()
    others = result_of(spark, tmp_path, folder, validation_share=0, test_share=0).other_files
    assert (others.files, len(others.extensions)) == (60, 20)
    assert list(others.extensions)[:3] == [".xml", ".000", ".001"]


def test_a_file_that_a_table_of_labels_names_is_never_passed_over(spark, mixed, tmp_path):
    labels = tmp_path / "labels.csv"
    rows = [*(f"{('cat', 'dog')[n % 2]}/{n}.png,a" for n in range(12)), "cat/a.gif,b", "cat/no extension,b", "x.gif,b"]
    labels.write_text("\n".join(["path,label", *rows]))
    source = {"labels": str(labels)}
    result = result_of(spark, tmp_path, mixed, source=source, max_bad_share=0.5)
    assert (sum(result.rows.values()), result.set_aside) == (12, {"missing_image": 1, "other_extension": 2})
    assert reasons_of(tmp_path / "data", mixed) == {
        "cat/a.gif": "other_extension", "cat/no extension": "other_extension", "x.gif": "missing_image",
    }  # fmt: skip
    assert result.other_files.files == 7
    source["extensions"] = ["png", "gif", ""]
    settings = folder_settings(tmp_path / "more", mixed, source=source, max_bad_share=0.5)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.set_aside == {"missing_image": 1}


def test_a_huge_file_is_set_aside_unread(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 12)
    with (folder / "cat" / "x.jpg").open("wb") as file:
        file.truncate(3 << 30)  # takes no place on the disk; read, it is more than an array of Arrow holds
    found, _ = ingest_dataset(spark, folder_settings(tmp_path / "data", folder, max_bad_share=0.1), cache="unused")
    assert (found.input_rows, found.set_aside) == (13, {"too_many_bytes": 1})
    assert reasons_of(tmp_path / "data", folder) == {"cat/x.jpg": "too_many_bytes"}
    check_statistics(tmp_path / "data")


def test_the_limit_is_the_most_that_is_read(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 12)
    sizes = sorted(path.stat().st_size for path in folder.rglob("*.png"))
    most = sizes[8]
    settings = folder_settings(tmp_path / "data", folder, source={"max_image_bytes": most}, max_bad_share=0.5)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.set_aside.get("too_many_bytes", 0) == sum(size > most for size in sizes)


def test_a_file_with_a_problem_is_not_opened(tmp_path):
    """It is not there: opened, it would be unreadable."""
    rows = [{"id": 1, "split": None, "label": 0, "path": "gone.jpg", "size": 9, "problem": "too_many_bytes"}]
    (batch,) = _read_files(pa.RecordBatch.from_pylist(rows), root=str(tmp_path), split_folders=False)
    assert batch.column("problem").to_pylist() == ["too_many_bytes"]


def test_values_of_a_table_that_are_too_large_are_set_aside(spark, tmp_path):
    files = [encoded(picture(number)) for number in range(20)]
    files[3] = files[3] + bytes(20_000)
    files[4] = encoded(picture(4, 100, 100))
    table = write_table(tmp_path / "table", {"image": files, "label": ["a", "b"] * 10, "id": range(20)})
    source = {"kind": "parquet", "id_column": "id", "max_image_bytes": 10_000}
    found, _ = ingest_dataset(
        spark, folder_settings(tmp_path / "data", table, source=source, max_bad_share=0.2), cache="unused"
    )
    assert (found.input_rows, found.set_aside) == (20, {"too_many_bytes": 2})
    assert {row["id"]: row["reason"] for row in set_aside(tmp_path / "data")} == dict.fromkeys((3, 4), "too_many_bytes")
    check_statistics(tmp_path / "data")


def test_images_of_sparks_source_that_are_too_large_are_set_aside(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 12)
    write_picture(folder / "cat" / "large.png", 30, height=90, width=90)
    table = spark.read.format("image").load(f"{folder}/*").selectExpr(
        "image", "regexp_extract(image.origin, '/(cat|dog)/', 1) label"
    )  # fmt: skip
    table.write.parquet(str(tmp_path / "table"))
    source = {"kind": "parquet", "max_image_bytes": 3 * 90 * 90 - 1}
    settings = folder_settings(tmp_path / "data", tmp_path / "table", source=source, max_bad_share=0.1)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert (found.input_rows, found.set_aside) == (13, {"too_many_bytes": 1})


def test_the_extensions_are_part_of_what_a_dataset_is(spark, tmp_path):
    """In any order and case; and the ones of 0.7.0 are no part."""
    folder = write_folder(tmp_path / "in", 12)
    found, _ = ingest_dataset(spark, folder_settings(tmp_path / "data", folder), cache="unused")
    same = {"extensions": ["WEBP", "jpg", ".png", "bmp", "Jpeg", "jpg"], "max_image_bytes": 256 << 20}
    again = ingest_dataset(spark, folder_settings(tmp_path / "data", folder, source=same), cache="unused")
    assert again == (found, False)


def test_a_tiff_is_turned_upright_once(spark, tmp_path):
    pixels = picture(1, 6, 8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "TIFF", exif=exif)
    path = tmp_path / "in" / "cat" / "a.tif"
    path.parent.mkdir(parents=True)
    path.write_bytes(buffer.getvalue())
    settings = folder_settings(
        tmp_path / "data", tmp_path / "in", source={"extensions": ["tif"]}, validation_share=0, test_share=0,
        image={"shape": (3, 8, 6), "resize": "none"},
    )  # fmt: skip
    ingest_dataset(spark, settings, cache="unused")
    (row,) = rows_of(tmp_path / "data").values()
    want = np.rot90(pixels, -1).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.frombuffer(row["image"], np.uint8).reshape(3, 8, 6), want)
