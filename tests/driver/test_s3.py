"""Everything on a real S3 server: images, dataset, output with checkpoints, events and results, export; and faults."""

import json
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
from image_files import put_pictures
from rank_faults import hang
from settings_on_s3 import everything_on
from small_data import dataset_settings
from small_training import TWO, equal, final_state, launch, make_job, steps_not_told

from pipeline import storage
from pipeline.cluster import barrier
from pipeline.cluster.watch import Watch
from pipeline.data import load_manifest
from pipeline.driver import train
from pipeline.ingest import ingest
from pipeline.ingest.job import ingest_dataset
from pipeline.serving import export, export_folder
from pipeline.telemetry.driver_link import DriverAddress
from pipeline.telemetry.events import EventReader
from pipeline.training.predictions import FILE as PREDICTIONS

pytestmark = [pytest.mark.spark, pytest.mark.long]


def test_images_dataset_output_and_export_on_s3(spark, s3, bucket, store_uri, tmp_path):
    """From images to an exported network, then more images as a second version: all that is left is on S3."""
    settings = everything_on(bucket, store_uri, tmp_path)
    put_pictures(f"{bucket}/pictures", 96)
    first = ingest(spark, settings)
    assert (first.written, sum(first.rows.values()), first.set_aside) == (True, 96, {})
    with s3.faults.at_random(1, 0.05) as made:
        trained = train(spark, settings)
    assert made
    assert (trained.attempts, trained.checkpoint.startswith(f"{bucket}/runs/trials/")) == (1, True)
    assert json.loads(storage.read_bytes(f"{bucket}/runs/train.json"))["steps"] == trained.steps
    job = trained.checkpoint.rpartition("/checkpoints/")[0]
    steps = [event["step"] for event in EventReader(f"{job}/events").new() if event["kind"] == "step"]
    assert steps == list(range(1, trained.steps + 1))
    assert {PREDICTIONS, "record.json"} <= set(storage.names(job))
    assert list(Path(tmp_path, "cache").iterdir())
    exported = export(settings)
    assert [file.accuracy for file in exported.files.values()] == [pytest.approx(trained.final_accuracy)]
    assert storage.names(export_folder(settings)) == ["export.json", "model.ts"]

    put_pictures(f"{bucket}/pictures", 24, first=84)  # twelve of them are there already
    more = ingest(spark, everything_on(bucket, store_uri, tmp_path, append=True))
    assert (more.written, sum(more.rows.values()), more.set_aside) == (True, 108, {})
    assert load_manifest(settings.dataset.path).version == 2
    assert load_manifest(settings.dataset.path, 1).digest == first.digest
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "mlflow.db", ".mlflow.db.lock", "artifacts"}


@pytest.fixture(scope="module")
def undisturbed(spark, s3, idx_folder):
    """A dataset on S3, and the end of a training that met no fault."""
    bucket = s3.new_bucket()
    ingest_dataset(spark, dataset_settings(f"{bucket}/data", idx_folder), cache="unused")
    job = make_job(f"{bucket}/data", f"{bucket}/undisturbed", every_steps=10, epochs=3)
    assert launch(spark, job).error == ""
    return bucket, final_state(job)


@pytest.mark.parametrize("how", ["sleep", "stopped"])
@pytest.mark.parametrize("reached", [True, False])
def test_a_rank_that_hangs_is_named_also_where_the_driver_cannot_be_reached(
    spark, s3, undisturbed, monkeypatch, how, reached
):
    bucket, _ = undisturbed
    if not reached:  # as behind a firewall: nobody answers where the driver says that it listens

        @contextmanager
        def nobody_listening(*_):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            yield DriverAddress("127.0.0.1", port, "token")

        monkeypatch.setattr(barrier, "listening", nobody_listening)
    hear, heard = Watch.hear, set()

    def note(watch, text):
        hear(watch, text)
        heard.add(json.loads(text)["rank"])

    monkeypatch.setattr(Watch, "hear", note)
    job = make_job(f"{bucket}/data", f"{bucket}/{how}-{reached}", every_steps=10, epochs=2)
    workers = TWO.model_copy(update={"stall_seconds": 6})
    s3.faults.requests.clear()
    outcome = launch(spark, job, workers, hook=hang(how, rank=1, step=4))
    assert outcome.error_type == "StallError"
    assert "rank 1 on" in outcome.error
    if how == "sleep":
        assert "in data loading at step 4" in outcome.error
        assert "_batch_that_does_not_come" in outcome.error
    else:  # what it was at when it gave its last sign of life is all that can be known
        assert "is stopped, or hangs in native code" in outcome.error
    assert heard == ({0, 1} if reached else set())
    written = {request.path.rpartition("/")[2] for request in s3.faults.requests if request.kind == "PUT"}
    # Of ranks that are heard the last beats may be written: the driver does not listen while they are ended.
    assert reached or {"rank-00000.json", "rank-00001.json"} <= written


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_training_through_faults_ends_with_equal_bits(spark, s3, undisturbed, seed):
    bucket, expected = undisturbed
    job = make_job(f"{bucket}/data", f"{bucket}/seed-{seed}", every_steps=10, epochs=3)
    with s3.faults.at_random(seed, 0.1, longest=3) as made:
        outcome = launch(spark, job)
    print(f"seed {seed}: {made.total()} faults {dict(made)}, {outcome.seconds:.0f} s, {outcome.error}")
    assert outcome.error == ""
    assert made.total() >= 20
    assert equal(final_state(job), expected)
    assert steps_not_told(job, outcome.result.steps) == []
