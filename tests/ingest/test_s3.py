"""Images on a real S3 server that fails now and then: a read error is not a bad image."""

import pyarrow as pa
import pytest
from image_files import folder_settings, put_pictures

from pipeline import storage
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources.folder import _list, _read_files

pytestmark = pytest.mark.spark


def test_storage_that_fails_sets_no_image_aside(spark, s3, bucket):
    """Nor does it end the job, after 4 s without any service at its start."""
    folder = put_pictures(f"{bucket}/pictures", 24)
    settings = folder_settings(f"{bucket}/data", folder, shard_bytes=20 * 3 * 8 * 8)
    with s3.faults.at_random(3, 0.4) as made:
        s3.faults.down(4)
        dataset, written = ingest_dataset(spark, settings, cache="unused")
    assert made.total() >= 10
    assert (written, dataset.set_aside, dataset.input_rows) == (True, {}, 24)


def read(folder: str, *paths: str) -> dict[str, str | None]:
    """The problem of each file, as an executor finds it."""
    rows = [{"id": 1, "split": None, "label": 0, "path": path, "size": 100, "problem": None} for path in paths]
    batches = list(_read_files(pa.RecordBatch.from_pylist(rows), root=folder, split_folders=False))
    return {row["origin"]: row["problem"] for batch in batches for row in batch.to_pylist()}


def test_an_image_that_is_missing_or_forbidden_is_set_aside(s3, bucket):
    folder = put_pictures(f"{bucket}/pictures", 2)
    with s3.faults.at_random(1, 1, kinds=("forbidden",), only=r"cat/0\.png"):
        problems = read(folder, "cat/0.png", "dog/1.png", "dog/gone.png")
    assert problems == {
        f"{folder}/cat/0.png": "unreadable_file",
        f"{folder}/dog/1.png": None,
        f"{folder}/dog/gone.png": "unreadable_file",
    }


def test_an_image_that_is_too_large_is_not_asked_for(spark, s3, bucket):
    folder = put_pictures(f"{bucket}/pictures", 24)
    storage.publish(f"{folder}/cat/x.jpg", bytes(50_000))
    settings = folder_settings(f"{bucket}/data", folder, source={"max_image_bytes": 49_999}, max_bad_share=0.1)
    with s3.faults.at_random(1, 1, only=r"x\.jpg") as made:
        dataset, _ = ingest_dataset(spark, settings, cache="unused")
    assert made.total() == 0  # every request for it would have failed
    assert (dataset.set_aside, dataset.input_rows) == ({"too_many_bytes": 1}, 25)


@pytest.mark.parametrize(("kind", "reason"), [("expired", "token has expired"), ("unknown_key", "not in our records")])
def test_storage_that_goes_on_failing_ends_the_job_and_names_the_file(s3, bucket, kind, reason):
    """Also where S3 says 403, as it does of what is forbidden."""
    folder = put_pictures(f"{bucket}/pictures", 2)
    with (
        s3.faults.at_random(1, 1, kinds=(kind,)),
        storage.retry_for(0.5),
        pytest.raises(storage.UnreachableError, match=rf"{folder}/cat/0\.png cannot be read from .*{reason}"),
    ):
        read(folder, "cat/0.png")


def test_a_folder_that_cannot_be_listed_is_not_taken_for_missing(spark, s3, bucket):
    folder = put_pictures(f"{bucket}/pictures", 2)
    with (
        s3.faults.at_random(1, 1, kinds=("expired",)),
        storage.retry_for(0.5),
        pytest.raises(storage.UnreachableError, match=f"{folder} cannot be looked up from "),
    ):
        _list(spark, folder)


@pytest.fixture(scope="module")
def pictures(spark, s3):
    """A folder of 400 pictures, and the digest of the dataset that they make where nothing fails."""
    bucket = s3.new_bucket()
    folder = put_pictures(f"{bucket}/pictures", 400)
    dataset, _ = ingest_dataset(spark, folder_settings(f"{bucket}/data", folder), cache="unused")
    return folder, dataset.digest


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_hundreds_of_faults_lose_no_image(spark, s3, pictures, bucket, seed):
    """The dataset is that of a store without a fault, byte for byte."""
    folder, digest = pictures
    with s3.faults.at_random(seed, 0.33, longest=2) as made:
        dataset, _ = ingest_dataset(spark, folder_settings(f"{bucket}/data", folder), cache="unused")
    print(f"seed {seed}: {made.total()} faults {dict(made)}")
    assert made.total() >= 200
    assert (dataset.set_aside, dataset.input_rows, dataset.digest) == ({}, 400, digest)
