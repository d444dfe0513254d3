import gzip

import numpy as np
import pytest
from image_files import check_statistics, rows_of
from PIL import Image
from pydantic import ValidationError
from small_data import CLASSES, dataset_settings, make_images, write_idx, write_idx_folder

from pipeline.config.dataset import DatasetSettings, SourceSettings
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources import records
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import SourceError

pytestmark = pytest.mark.spark

FINE = [f"fine{number}" for number in range(100)]


def cifar_records(rows: int, seed: int, label_bytes: int, classes: int) -> np.ndarray:
    """CIFAR records as published: the label bytes, of which the last counts, then 3,072 pixels, a colour at a time."""
    random = np.random.default_rng(seed)
    made = random.integers(0, 256, (rows, label_bytes + 3072), dtype=np.uint8)
    made[:, label_bytes - 1] = random.integers(0, classes, rows)
    return made


def write_cifar10(folder, rows=20):
    folder.mkdir(parents=True)
    made = {name: cifar_records(rows, seed, 1, 10) for seed, (name, _) in enumerate(records.CIFAR_FILES["cifar10"])}
    for name, data in made.items():
        (folder / name).write_bytes(data.tobytes())
    return np.concatenate(list(made.values()))


def write_cifar100(folder, rows=30):
    folder.mkdir(parents=True)
    made = [cifar_records(rows, seed, 2, 100) for seed in (1, 2)]
    for name, data in zip(("train.bin", "test.bin"), made, strict=True):
        (folder / name).write_bytes(data.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    return np.concatenate(made)


def cifar_settings(dataset, folder, kind, **changes):
    source = {"kind": kind, "path": str(folder)}
    return DatasetSettings.model_validate({"path": str(dataset), "name": kind, "source": source, **changes})


def test_cifar10_arrives_as_published(spark, tmp_path):
    data = write_cifar10(tmp_path / "cifar")
    found, _ = ingest_dataset(spark, cifar_settings(tmp_path / "data", tmp_path / "cifar", "cifar10"), cache="unused")
    assert found.classes == records.CIFAR10_CLASSES
    assert found.image.shape == (3, 32, 32)
    assert (found.input_rows, found.split("test").rows) == (120, 20)
    rows = rows_of(tmp_path / "data")
    for number, record in enumerate(data):
        assert rows[number]["label"] == record[0]
        assert rows[number]["image"] == record[1:].tobytes()
        assert (rows[number]["split"] == "test") == (number >= 100)
    check_statistics(tmp_path / "data")


def test_the_fine_label_of_cifar100_counts(spark, tmp_path):
    data = write_cifar100(tmp_path / "cifar")
    found, _ = ingest_dataset(spark, cifar_settings(tmp_path / "data", tmp_path / "cifar", "cifar100"), cache="unused")
    assert found.classes == tuple(FINE)
    rows = rows_of(tmp_path / "data")
    assert [rows[number]["label"] for number in range(60)] == data[:, 1].tolist()
    assert [rows[number]["image"] for number in range(60)] == [record[2:].tobytes() for record in data]


def opened(spark, folder, kind, **changes):
    return open_source(spark, SourceSettings(kind=kind, path=str(folder), **changes), "unused")


def test_what_is_wrong_with_cifar_files_is_named(spark, tmp_path):
    write_cifar10(tmp_path / "ten")
    write_cifar100(tmp_path / "hundred")
    batch = tmp_path / "ten" / "data_batch_3.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(SourceError, match=r"data_batch_3\.bin is cut or no cifar10 file: 61459 bytes are not .* 3073"):
        opened(spark, tmp_path / "ten", "cifar10")
    batch.unlink()
    with pytest.raises(SourceError, match=r"data_batch_3\.bin: no such file, nor data_batch_3\.bin\.gz"):
        opened(spark, tmp_path / "ten", "cifar10")
    batch.with_suffix(".bin.gz").write_bytes(gzip.compress(whole))
    assert opened(spark, tmp_path / "ten", "cifar10").rows == {"train": 100, "test": 20}
    with pytest.raises(SourceError, match="cifar10 has 10 classes, but 3 names were given: name each in "):
        opened(spark, tmp_path / "ten", "cifar10", classes=("a", "b", "c"))
    (tmp_path / "hundred" / "fine_label_names.txt").write_text("apple\nbear")
    with pytest.raises(SourceError, match="cifar100 has 100 classes, but 2 names were given"):
        opened(spark, tmp_path / "hundred", "cifar100")
    (tmp_path / "hundred" / "fine_label_names.txt").unlink()
    with pytest.raises(SourceError, match=r"fine_label_names\.txt: no such file; set dataset\.source\.classes"):
        opened(spark, tmp_path / "hundred", "cifar100")


def test_damage_inside_a_compressed_file_is_named(spark, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=25, test_rows=10)
    path = folder / "train-images-idx3-ubyte.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :: 7] = bytes(len(data[len(data) // 2 :: 7]))
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"train-images-idx3-ubyte\.gz is cut or damaged") as error:
        opened(spark, folder, "idx", classes=CLASSES)
    assert "\n" not in str(error.value)


def test_images_without_a_pixel_are_refused(spark, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=25, test_rows=10)
    for prefix, rows in (("train", 25), ("t10k", 10)):
        write_idx(folder, f"{prefix}-images-idx3-ubyte", np.zeros((rows, 0, 12), np.uint8))
    with pytest.raises(SourceError, match=r"train-images.* has images without a pixel: \(0, 12\)"):
        opened(spark, folder, "idx", classes=CLASSES)


def test_large_images_are_read_in_small_slices(spark, tmp_path, monkeypatch):
    folder = write_idx_folder(tmp_path / "idx", train_rows=25, test_rows=10)
    monkeypatch.setattr(records, "_SLICE_BYTES", 4 * 144)
    slices = opened(spark, folder, "idx", classes=CLASSES).items.collect()
    assert sorted((row.end - row.start, row.part) for row in slices) == sorted(
        [(4, 0)] * 6 + [(1, 0)] + [(4, 1)] * 2 + [(2, 1)]
    )


def test_idx_images_become_larger_and_coloured(spark, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=40, test_rows=10)
    settings = dataset_settings(tmp_path / "data", folder, image={"shape": (3, 16, 18), "resize": "letterbox"})
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.image.shape == (3, 16, 18)
    images, labels = make_images(40, seed=1)
    rows = rows_of(tmp_path / "data")
    for number in range(40):
        want = np.full((16, 18), 255, np.uint8)
        want[:, 1:17] = np.asarray(Image.fromarray(images[number]).resize((16, 16), Image.Resampling.BILINEAR))
        assert rows[number]["label"] == labels[number]
        np.testing.assert_array_equal(np.frombuffer(rows[number]["image"], np.uint8).reshape(3, 16, 18), [want] * 3)
    check_statistics(tmp_path / "data")


def test_sizes_are_kept_where_resizing_is_off(spark, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=40, test_rows=10)
    image = {"shape": (1, 8, 8), "resize": "none"}
    settings = dataset_settings(tmp_path / "data", folder, image=image, max_bad_share=0.1)
    with pytest.raises(ValueError, match=r"50 of 50 rows cannot be used \(wrong_size 50\)"):
        ingest_dataset(spark, settings, cache="unused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "idx", "path": "x"}, "needs `path` .* and `classes`"),
        ({"kind": "cifar10"}, "kind: cifar10 needs `path`"),
        ({"kind": "idx", "path": "x", "classes": ("a", "a")}, "classes lists a name twice"),
        ({"kind": "cifar10", "path": "x", "id_column": "id"}, "id_column is for kind: table or parquet or delta"),
    ],
)
def test_settings_that_do_not_fit_the_kind_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        SourceSettings(**changes)
