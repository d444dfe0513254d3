import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import CLASSES, dataset_settings, make_images, write_idx, write_idx_folder

from pipeline import storage
from pipeline.data import load_manifest, versions
from pipeline.data.manifest import DatasetError
from pipeline.ingest import ingest
from pipeline.ingest.job import IngestError, ingest_dataset
from pipeline.ingest.sources import records
from pipeline.ingest.sources.source import SourceError

pytestmark = pytest.mark.spark


def files_of(folder: Path) -> dict[str, tuple[float, str]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def rows_of(dataset: str, split: str) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(f"{dataset}/{shard.path}") for shard in load_manifest(dataset).split(split).shards]
    )


def test_every_image_arrives_once_with_its_label(dataset):
    for splits, rows, seed, first_id in ((("train", "validation"), 1003, 1, 0), (("test",), 301, 2, 1003)):
        images, labels = make_images(rows, seed)
        table = pa.concat_tables([rows_of(dataset, split) for split in splits])
        assert sorted(table["id"].to_pylist()) == list(range(first_id, first_id + rows))
        for row in table.to_pylist():
            assert row["image"] == images[row["id"] - first_id].tobytes()
            assert row["label"] == labels[row["id"] - first_id]


def test_the_manifest_says_what_is_there(dataset, spark):
    found = load_manifest(dataset)
    assert found.input_rows == 1304
    assert found.set_aside == {}
    assert found.classes == CLASSES
    assert found.spark_application == spark.sparkContext.applicationId
    assert 150 < found.splits["validation"].rows < 250  # a fifth of 1,003
    for name, split in found.splits.items():
        table = rows_of(dataset, name)
        pixels = np.stack([np.frombuffer(image, np.uint8) for image in table["image"].to_pylist()]) / 255
        np.testing.assert_allclose([split.mean[0], split.std[0]], [pixels.mean(), pixels.std()], rtol=1e-12)
        assert split.label_counts == tuple(np.bincount(table["label"].to_numpy(), minlength=3))
        for shard in split.shards:
            data = Path(dataset, shard.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)


def test_shards_are_plain_parquet_made_for_training(dataset):
    shard = load_manifest(dataset).split("train").shards[0]
    file = pq.ParquetFile(f"{dataset}/{shard.path}")
    assert file.schema_arrow.remove_metadata() == pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("image", pa.binary(), nullable=False),
        ]
    )
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    assert tuple(group.num_rows for group in groups) == shard.row_groups
    assert set(shard.row_groups[:-1]) == {30}
    for group in groups:
        image = group.column(2)
        assert not image.is_stats_set
        assert not image.has_dictionary_page
        assert group.column(0).is_stats_set


def test_rows_are_shuffled_over_the_whole_split(dataset):
    ids = rows_of(dataset, "train")["id"].to_numpy()
    assert abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 0.15
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.02


def test_the_same_input_and_settings_change_nothing(spark, idx_folder, dataset):
    before = files_of(Path(dataset))
    again, written = ingest_dataset(spark, dataset_settings(Path(dataset), idx_folder), cache="unused")
    assert not written
    assert again.digest == load_manifest(dataset).digest
    assert files_of(Path(dataset)) == before


def test_a_dataset_made_twice_is_the_same_byte_for_byte(spark, idx_folder, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SLICE_ROWS", 77)
    monkeypatch.setattr(records, "_FEWEST_ROWS", 77)  # read by 18 tasks instead of 2
    other, written = ingest_dataset(spark, dataset_settings(tmp_path / "other", idx_folder), cache="unused")
    assert written
    assert other.digest == load_manifest(dataset).digest
    shards = {name: digest for name, (_, digest) in files_of(tmp_path / "other").items() if name.endswith("parquet")}
    assert shards == {n: d for n, (_, d) in files_of(Path(dataset)).items() if n.endswith("parquet")}


def test_another_seed_is_another_order(spark, idx_folder, dataset, tmp_path):
    other, _ = ingest_dataset(spark, dataset_settings(tmp_path / "other", idx_folder, seed=1), cache="unused")
    assert other.digest != load_manifest(dataset).digest


def test_other_settings_at_the_same_place_are_refused(spark, idx_folder, dataset):
    before = files_of(Path(dataset))
    with pytest.raises(DatasetError, match=r"other settings .*choose another dataset.path, delete that folder first"):
        ingest_dataset(spark, dataset_settings(Path(dataset), idx_folder, row_group_rows=31), cache="unused")
    assert files_of(Path(dataset)) == before


@pytest.fixture
def folder_with_bad_labels(tmp_path):
    """Four of 500 labels are no class."""
    folder = write_idx_folder(tmp_path / "idx", train_rows=500, test_rows=50)
    _, labels = make_images(500, seed=1)
    labels[[0, 100, 200, 499]] = 7
    write_idx(folder, "train-labels-idx1-ubyte", labels)
    return folder


def test_bad_rows_are_set_aside_with_a_reason(spark, folder_with_bad_labels, tmp_path):
    found, _ = ingest_dataset(spark, dataset_settings(tmp_path / "data", folder_with_bad_labels), cache="unused")
    assert found.set_aside == {"unknown_label": 4}
    assert sum(split.rows for split in found.splits.values()) == 546
    aside = pq.read_table(tmp_path / "data" / "quarantine").to_pylist()
    assert sorted(row["id"] for row in aside) == [0, 100, 200, 499]
    assert {row["reason"] for row in aside} == {"unknown_label"}
    assert aside[0]["origin"].endswith(f"train-images-idx3-ubyte.gz#{aside[0]['id']}")


def test_too_many_bad_rows_fail_the_job_and_leave_no_dataset(spark, folder_with_bad_labels, tmp_path):
    settings = dataset_settings(tmp_path / "data", folder_with_bad_labels, max_bad_share=0.005)
    with pytest.raises(DatasetError, match=r"4 of 550 rows cannot be used \(unknown_label 4\), more than .*0\.005"):
        ingest_dataset(spark, settings, cache="unused")
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert not list((tmp_path / "data" / "train").glob("*.parquet"))
    assert list((tmp_path / "data" / "quarantine").glob("*.parquet"))


def test_a_job_that_dies_leaves_no_dataset_and_can_be_run_again(spark, idx_folder, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(versions, "publish", disk_full)
    settings = dataset_settings(tmp_path / "data", idx_folder)
    with pytest.raises(OSError, match="No space left"):
        ingest_dataset(spark, settings, cache="unused")
    assert not list((tmp_path / "data").rglob("*.parquet"))
    monkeypatch.undo()
    leftover = tmp_path / "data" / "train" / "part-deadbeef-00000.parquet"
    leftover.write_bytes(b"of a job that was killed")
    assert ingest_dataset(spark, settings, cache="unused")[1]
    assert not leftover.exists()


def test_storage_that_executors_do_not_share_is_noticed(spark, idx_folder, tmp_path, monkeypatch):
    """Executors write where the driver does not look, as on hosts with disks of their own."""
    real = storage.filesystem

    def elsewhere(path):
        return real(path if path.endswith(".json") else path.replace("/data/", "/of-another-host/"))

    monkeypatch.setattr(storage, "filesystem", elsewhere)
    with pytest.raises(DatasetError, match=r"an executor wrote .* the driver does not see it: set dataset.path"):
        ingest_dataset(spark, dataset_settings(tmp_path / "data", idx_folder), cache="unused")
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_an_executors_error_is_one_line_with_its_cause(spark, idx_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").write_text("a file where a folder must be")
    with pytest.raises(IngestError) as error:
        ingest_dataset(spark, dataset_settings(tmp_path / "data", idx_folder), cache="unused")
    assert str(error.value).startswith("the Spark job failed: FileExistsError: ")
    assert "\n" not in str(error.value)


def test_a_cut_shard_is_made_again(spark, idx_folder, dataset, tmp_path):
    settings = dataset_settings(tmp_path / "data", idx_folder)
    first, _ = ingest_dataset(spark, settings, cache="unused")
    shard = tmp_path / "data" / first.split("train").shards[0].path
    shard.write_bytes(shard.read_bytes()[:-1])
    second, written = ingest_dataset(spark, settings, cache="unused")
    assert written
    assert second.digest == first.digest


def test_a_bad_source_starts_no_job(spark, idx_folder, tmp_path):
    cut = tmp_path / "idx"
    cut.mkdir()
    for path in idx_folder.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"-ubyte\.gz is cut or damaged"):
        ingest_dataset(spark, dataset_settings(tmp_path / "data", cut), cache="unused")
    assert not (tmp_path / "data").exists()


def test_the_result_is_left_as_json(spark, settings):
    result = ingest(spark, settings)
    dataset = load_manifest(settings.dataset.path)
    assert json.loads(Path(settings.output, "ingest.json").read_text()) == {
        "dataset": settings.dataset.path,
        "written": False,
        "digest": dataset.digest,
        "rows": {name: split.rows for name, split in dataset.splits.items()},
        "set_aside": {},
        "already_there": 0,
        "other_files": {"files": 0, "extensions": {}, "examples": []},
    }
    assert result.digest == dataset.digest


def test_a_failure_does_not_leave_the_result_of_an_earlier_call(spark, settings):
    left = Path(settings.output, "ingest.json")
    storage.publish(str(left), b"{}")
    other = settings.dataset.model_copy(update={"row_group_rows": 31})
    with pytest.raises(DatasetError, match="other settings"):
        ingest(spark, settings.model_copy(update={"dataset": other}))
    assert not left.exists()
