import os
import shutil

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
    write_picture,
)  # fmt: skip
from PIL import Image

from pipeline.config.dataset import SourceSettings
from pipeline.data.manifest import DatasetError
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources import listing
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import SourceError

pytestmark = [pytest.mark.spark, pytest.mark.long]


def opened(spark, folder, **changes):
    return open_source(spark, SourceSettings(kind="folder", path=str(folder), **changes), "unused")


def labels_by_path(source):
    """What is known of every file before its content is read."""
    return {row.path: (source.classes[row.label] if row.label is not None and row.label >= 0 else row.label)
            for row in source.items.collect()}  # fmt: skip


def test_files_of_every_format_and_size_become_images_of_one_shape(spark, tmp_path):
    folder = tmp_path / "Bilder [1] {x}"
    names = ("a.png", "b.jpg", "c.JPEG", "d.webp", "e.BMP", "ü ñ 犬.Png")
    for number, (kind, name) in enumerate(zip(("PNG", "JPEG", "JPEG", "WEBP", "BMP", "PNG"), names, strict=True)):
        write_picture(folder / "big" / name, number, kind, height=20 + number, width=30)
        write_picture(folder / "small" / "below" / name, 100 + number, kind)
    (folder / "big" / "README.txt").write_text("about these")
    (folder / "big" / ".DS_Store").write_bytes(b"\0\0")
    (folder / "Thumbs.db").write_bytes(b"x")
    write_picture(folder / "big" / ".hidden.png", 50)
    write_picture(folder / ".cache" / "x.png", 51)
    write_picture(folder / "small" / ".thumbnails" / "x.png", 52)
    settings = folder_settings(tmp_path / "data [1]", folder)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.classes == ("big", "small")
    assert (found.input_rows, found.set_aside) == (12, {})
    made = found.preparation  # what a model that was trained on it does with new images
    assert (made.resize, made.background, made.max_bytes) == ("crop", 255, 256 << 20)
    assert made.formats == ("JPEG", "PNG", "WEBP", "BMP")
    images = {row["image"] for row in rows_of(tmp_path / "data [1]").values()}
    assert {stored(100), stored(104), stored(105)} <= images  # lossless, and of the shape already
    check_statistics(tmp_path / "data [1]")
    # Adding reads the dataset's own files, whose path has characters that Spark takes for a pattern.
    write_picture(folder / "big" / "new.png", 7)
    grown, _ = ingest_dataset(spark, settings.model_copy(update={"append": True}), cache="unused")
    assert (grown.input_rows, grown.version) == (13, 2)


def test_every_file_has_its_folder_as_label_and_links_are_followed(spark, tmp_path):
    folder = write_folder(tmp_path / "a", 4)
    elsewhere = write_folder(tmp_path / "b", 2, classes=("bird",))
    (folder / "bird").symlink_to(elsewhere / "bird")
    (folder / "cat" / "deeper").symlink_to(elsewhere / "bird")
    (folder / "cat" / "link.png").symlink_to(elsewhere / "bird" / "0.png")
    (folder / "cat" / "back").symlink_to(folder)  # in circles
    (folder / "all").symlink_to(".")
    os.mkfifo(folder / "cat" / "pipe.png")  # reading it would never end
    assert labels_by_path(opened(spark, folder)) == {
        "cat/0.png": "cat", "cat/2.png": "cat", "dog/1.png": "dog", "dog/3.png": "dog", "bird/0.png": "bird",
        "bird/1.png": "bird", "cat/deeper/0.png": "cat", "cat/deeper/1.png": "cat", "cat/link.png": "cat",
    }  # fmt: skip


def test_what_cannot_be_used_is_set_aside_with_its_reason(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 20)
    write_picture(folder / "in no class.png", 70)
    (folder / "cat" / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (folder / "cat" / "empty.png").touch()
    (folder / "dog" / "text.jpg").write_text("no image")
    (folder / "dog" / "cut.jpg").write_bytes(encoded(picture(3, 64, 64), "JPEG")[:700])
    (folder / "dog" / "a folder.jpg").mkdir()
    write_picture(folder / "dog" / "a folder.jpg" / "inside.png", 71)
    with open(os.fsencode(folder / "cat") + b"/not-utf8-\xff.png", "wb") as file:  # noqa: PTH123
        file.write(encoded(picture(72)))
    found, _ = ingest_dataset(spark, folder_settings(tmp_path / "data", folder, max_bad_share=0.5), cache="unused")
    reasons = {row["origin"].removeprefix(f"{folder}/"): row["reason"] for row in set_aside(tmp_path / "data")}
    assert reasons.pop("dog/cut.jpg") in ("truncated", "undecodable")
    assert reasons == {
        "in no class.png": "missing_label",
        "cat/nowhere.jpg": "unreadable_file",
        "cat/empty.png": "empty",
        "dog/text.jpg": "undecodable",
        "cat/not-utf8-\\xff.png": "unreadable_file",
    }
    assert found.input_rows == 27
    check_statistics(tmp_path / "data")


def test_the_source_may_name_the_split(spark, tmp_path):
    folder = tmp_path / "in"
    for split, count in (("Train", 12), ("val", 4), ("test", 3), ("unsure", 2)):
        write_folder(folder / split, count, first=100 * count)
    write_picture(folder / "stray.png", 5)
    settings = folder_settings(tmp_path / "data", folder, source={"split_folders": True}, max_bad_share=0.5)
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert {name: split.rows for name, split in found.splits.items()} == {"train": 12, "validation": 4, "test": 3}
    assert found.set_aside == {"unknown_split": 3}
    assert found.classes == ("cat", "dog")
    for row in rows_of(tmp_path / "data").values():
        first = {"train": 1200, "validation": 400, "test": 300}[row["split"]]
        assert row["image"] in {stored(number) for number in range(first + row["label"], first + 12, 2)}
    shutil.rmtree(folder / "Train")
    with pytest.raises(SourceError, match="split_folders is set, but there are no images in its folder `train`"):
        opened(spark, folder, split_folders=True)


LABELS = [("./cat/0.png", "mouse"), ("/dog/1.png", "cow"), ("dog/3.png", ""), ("cat/4.png", "yeti"),
          ("cat/gone.png", "cow"), ("cat/6.png", "cow")]  # fmt: skip


def write_labels(path, rows, names=("path", "label")):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
    else:
        path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    return path


@pytest.mark.parametrize("name", ["labels [1].csv", "labels.parquet"])
def test_labels_from_a_table(spark, tmp_path, name):
    folder = write_folder(tmp_path / "in", 8)
    labels = write_labels(tmp_path / name, LABELS)
    source = opened(spark, folder, labels=str(labels), classes=("cow", "mouse"))
    assert labels_by_path(source) == {
        "cat/0.png": "mouse", "dog/1.png": "cow", "cat/2.png": None, "dog/3.png": None, "cat/4.png": -1,
        "dog/5.png": None, "cat/6.png": "cow", "dog/7.png": None, "cat/gone.png": "cow",
    }  # fmt: skip
    assert opened(spark, folder, labels=str(labels)).classes == ("cow", "mouse", "yeti")


def test_images_and_labels_without_each_other_are_set_aside(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 8)
    labels = write_labels(tmp_path / "labels.csv", [(f"./{path}", label) for path, label in LABELS], ("file", "kind"))
    settings = folder_settings(
        tmp_path / "data",
        folder,
        source={"labels": str(labels), "path_column": "file", "label_column": "kind", "classes": ["cow", "mouse"]},
        max_bad_share=1,
        validation_share=0,
        test_share=0,
    )
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.set_aside == {"missing_image": 1, "missing_label": 4, "unknown_label": 1}
    assert found.input_rows == 9
    assert {row["image"]: row["label"] for row in rows_of(tmp_path / "data").values()} == {
        stored(0): 1, stored(1): 0, stored(6): 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\ncat/0.png,a\n./cat/0.png,b\n", r"labels\.csv has 2 rows for cat/0\.png: one is right"),
        ("file,label\ncat/0.png,a\n", r"labels\.csv has no column 'path'; it has file, label"),
        ("path,label\n,a\n", r"labels\.csv has 1 rows without a 'path': fill it"),
        ("path,label\ncat/0.png,\n", r"no image has a label"),
        (
            "path,label\ncat/0.png,gr\udcfcn\ndog/1.png,gr\udce4n\n",
            r"labels\.csv has 2 rows with a 'path' or 'label' that "
            "is not UTF-8: save it as UTF-8",
        ),
        (
            "path,label\ncat/0.png,a\ndog/\udcff.png,b\n",
            r"labels\.csv has 1 rows with a .* not UTF-8: save it as UTF-8",
        ),
        ("pfad,l\udce4bel\ncat/0.png,a\n", r"labels\.csv has names of columns that are not UTF-8: save it as UTF-8"),
        (None, r"labels\.csv cannot be read as a table of labels: .*does not exist"),
    ],
)
def test_a_table_of_labels_that_cannot_be_used_is_named(spark, tmp_path, text, message):
    folder = write_folder(tmp_path / "in", 2)
    if text is not None:
        (tmp_path / "labels.csv").write_bytes(os.fsencode(text))
    with pytest.raises(SourceError, match=message) as error:
        opened(spark, folder, labels=str(tmp_path / "labels.csv"))
    assert "\n" not in str(error.value)


def test_a_table_of_labels_as_spreadsheets_write_it(spark, tmp_path):
    folder = tmp_path / "in"
    for name in ("a, b.png", 'say "x".png', "c.png"):
        write_picture(folder / name, 1)
    text = '\ufeffpath,label\r\n"a, b.png",cat\r\n"say ""x"".png", dog\r\nc.png , cat\r\n'
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    source = opened(spark, folder, labels=str(tmp_path / "labels.csv"))
    assert labels_by_path(source) == {"a, b.png": "cat", 'say "x".png': "dog", "c.png": "cat"}


def test_numbers_as_labels_are_classes_in_their_order(spark, tmp_path):
    assert opened(spark, write_folder(tmp_path / "in", 12, classes=("10", "9", "2"))).classes == ("2", "9", "10")


def test_a_folder_without_images_is_an_error(spark, tmp_path):
    with pytest.raises(SourceError, match=r"source.path .*nowhere: no such folder"):
        opened(spark, tmp_path / "nowhere")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "cat" / "a.gif").touch()
    with pytest.raises(
        SourceError, match=r"empty: no files that end in \.bmp, .*\.webp .*; others: 1 \.gif, such as cat/a\.gif"
    ):
        opened(spark, tmp_path / "empty")
    write_picture(tmp_path / "empty" / "a.png", 1)
    with pytest.raises(
        SourceError, match=r"no image has a label; put each class into a folder of its own, or set source.labels"
    ):
        opened(spark, tmp_path / "empty")


def test_what_was_kept_for_the_job_is_let_go(spark, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_MOST_BY_DRIVER", 3)  # what the driver lists is not kept by Spark
    source = opened(spark, write_folder(tmp_path / "in", 4))
    assert source.persisted.is_cached
    source.close()
    assert not source.persisted.is_cached
    write_folder(tmp_path / "in", 2, first=4)
    assert opened(spark, tmp_path / "in").rows == {"": 6}  # listed anew


def test_a_split_is_for_ever_and_a_copy_is_the_same_dataset(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 60)
    first, _ = ingest_dataset(spark, folder_settings(tmp_path / "first", folder), cache="unused")
    shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    copied, _ = ingest_dataset(spark, folder_settings(tmp_path / "second", tmp_path / "moved"), cache="unused")
    assert copied.digest == first.digest
    write_folder(folder, 40, first=60)
    ingest_dataset(spark, folder_settings(tmp_path / "third", folder), cache="unused")
    before, after = rows_of(tmp_path / "first"), rows_of(tmp_path / "third")
    assert len(after) == 100
    assert {key: row["split"] for key, row in before.items()} == {key: after[key]["split"] for key in before}
    assert min(split.rows for split in first.splits.values()) > 3


def test_a_file_that_was_replaced_is_noticed(spark, tmp_path):
    folder = tmp_path / "in"
    for number in range(12):
        write_picture(folder / "cat" / f"{number}.bmp", number, "BMP")  # all of one size
    settings = folder_settings(tmp_path / "data", folder)
    ingest_dataset(spark, settings, cache="unused")
    assert not ingest_dataset(spark, settings, cache="unused")[1]
    write_picture(folder / "cat" / "3.bmp", 99, "BMP")
    with pytest.raises(DatasetError, match="files of the source were written again since: delete that folder"):
        ingest_dataset(spark, settings, cache="unused")


def test_photographs(spark, tmp_path):
    photos = pytest.importorskip("sklearn.datasets").load_sample_images()
    for name, pixels in zip(photos.filenames, photos.images, strict=True):
        path = tmp_path / "in" / "photo" / f"{os.path.basename(name)}"  # noqa: PTH119
        path.parent.mkdir(parents=True, exist_ok=True)
        turned = Image.fromarray(np.rot90(pixels))
        exif = turned.getexif()
        exif[0x0112] = 6  # to be shown turned to the right by 90 degrees
        turned.save(path, quality=95, exif=exif)
    settings = folder_settings(
        tmp_path / "data", tmp_path / "in", image={"shape": (3, 64, 96)}, validation_share=0, test_share=0
    )
    ingest_dataset(spark, settings, cache="unused")
    made = [np.frombuffer(row["image"], np.uint8).reshape(3, 64, 96) for row in rows_of(tmp_path / "data").values()]
    for pixels in photos.images:
        want = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert min(np.abs(image.astype(int) - want).mean() for image in made) < 6
