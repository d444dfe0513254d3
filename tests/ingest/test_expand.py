"""An expanded source: deformed copies of the training images."""

import functools

import numpy as np
import pytest
from image_files import check_statistics, folder_settings, rows_of, write_folder, write_picture
from small_data import dataset_settings, write_idx_folder

from pipeline.config.dataset import DeformSettings
from pipeline.data import load_manifest
from pipeline.data.codec import decode_stored
from pipeline.ingest import layout
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources import records

pytestmark = pytest.mark.spark

COPIES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("idx"), train_rows=150, test_rows=30)


def expanded_settings(path, folder, expand=COPIES, **changes):
    settings = dataset_settings(path, folder, **changes)
    return settings.model_copy(update={"source": settings.source.model_copy(update={"expand": expand})})


@pytest.fixture(scope="module")
def base(spark, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "data"
    ingest_dataset(spark, expanded_settings(path, folder, expand=1), cache="unused")
    return path


@pytest.fixture(scope="module")
def expanded(spark, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("expanded") / "data"
    ingest_dataset(spark, expanded_settings(path, folder), cache="unused")
    return path


def test_only_training_images_are_multiplied(base, expanded):
    few, many = load_manifest(str(base)), load_manifest(str(expanded))
    assert many.split("train").rows == COPIES * few.split("train").rows
    assert many.input_rows == 180 + (COPIES - 1) * few.split("train").rows
    assert many.sources[0].rows == 180
    for name in ("validation", "test"):
        assert many.split(name).rows == few.split(name).rows > 0
    check_statistics(expanded)


def copy_ids(spark, ids, copy):
    rows = spark.createDataFrame([(key, copy) for key in ids], "id long, copy int").selectExpr("xxhash64(id, copy)")
    return [row[0] for row in rows.collect()]


def test_the_first_of_each_is_the_original_and_copies_have_its_label(spark, base, expanded):
    originals, rows = rows_of(base), rows_of(expanded)
    assert {key: rows[key] for key in originals} == originals
    train = [key for key, row in originals.items() if row["split"] == "train"]
    for copy in range(1, COPIES):
        for key, made in zip(train, copy_ids(spark, train, copy), strict=True):
            assert (rows[made]["label"], rows[made]["split"]) == (originals[key]["label"], "train")
            assert rows[made]["image"] != originals[key]["image"]
    pixels = {row["image"] for row in rows.values()}
    assert len(pixels) == len(rows)


def test_a_copy_is_like_its_original(spark, base, expanded):
    """Shift, rotation and noise leave the bright half of an image where it is."""
    originals, rows = rows_of(base), rows_of(expanded)
    train = [key for key, row in originals.items() if row["split"] == "train" and row["label"] == 1]
    for made in copy_ids(spark, train, 1):
        image = np.frombuffer(rows[made]["image"], np.uint8).reshape(12, 12).astype(int)
        assert image[:, :4].mean() > image[:, 8:].mean()


def test_copies_do_not_hang_on_how_the_work_is_cut(spark, folder, expanded, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SLICE_ROWS", 60)
    monkeypatch.setattr(records, "_FEWEST_ROWS", 20)
    monkeypatch.setattr(layout, "BATCH_BYTES", 13 * 144)
    again, _ = ingest_dataset(spark, expanded_settings(tmp_path / "data", folder), cache="unused")
    assert again.digest == load_manifest(str(expanded)).digest


def test_copies_that_may_not_differ_are_the_originals(spark, folder, tmp_path):
    originals = set(range(180))
    settings = expanded_settings(tmp_path / "still", folder, expand=2)
    still = DeformSettings(shift=0, rotation=0, scale=0, elastic=0)
    source = settings.source.model_copy(update={"deform": still})
    ingest_dataset(spark, settings.model_copy(update={"source": source}), cache="unused")
    rows = rows_of(tmp_path / "still")
    train = [row for key, row in rows.items() if key in originals and row["split"] == "train"]
    copies = [row for key, row in rows.items() if key not in originals]
    assert sorted(row["image"] for row in train) == sorted(row["image"] for row in copies)


def test_copies_are_made_of_pixels_and_then_encoded(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 20)
    made = {}
    for kind in ("raw", "png", "jpeg"):
        image = {"encoding": kind, "jpeg_quality": 100}
        ingest_dataset(
            spark, folder_settings(tmp_path / kind, folder, image=image, source={"expand": 2}), cache="unused"
        )
        decode = functools.partial(decode_stored, encoding=kind, shape=(3, 8, 8))
        made[kind] = {key: decode(row["image"]).astype(int) for key, row in rows_of(tmp_path / kind).items()}
        check_statistics(tmp_path / kind, decode)
    assert made["raw"].keys() == made["png"].keys() == made["jpeg"].keys()
    for key, pixels in made["raw"].items():
        np.testing.assert_array_equal(pixels, made["png"][key])
        assert np.abs(pixels - made["jpeg"][key]).mean() < 5


def test_copies_of_jpeg_files_that_would_be_kept(spark, tmp_path):
    """Copies are of pixels, so no file is kept where there are any."""
    for number in range(20):
        write_picture(tmp_path / "in" / "cat" / f"{number}.jpg", number, "JPEG")
    image = {"encoding": "jpeg", "keep_jpeg": True}
    settings = folder_settings(tmp_path / "data", tmp_path / "in", image=image, source={"expand": 3})
    dataset, _ = ingest_dataset(spark, settings, cache="unused")
    others = sum(split.rows for name, split in dataset.splits.items() if name != "train")
    assert dataset.split("train").rows == 3 * (20 - others)
