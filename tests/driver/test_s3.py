"""Everything on a real S3 server: images, dataset, output with checkpoints, events and results, export; and faults."""

import json
from pathlib import Path
from typing import Any

import pytest
from image_files import SHAPE, put_pictures
from small_data import dataset_settings
from small_training import TWO, equal, final_state, launch, make_job, steps_not_told

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.data import load_manifest
from pipeline.driver import train
from pipeline.ingest import ingest
from pipeline.ingest.job import ingest_dataset
from pipeline.serving import export, export_folder
from pipeline.telemetry.events import EventReader
from pipeline.training.predictions import FILE as PREDICTIONS

pytestmark = [pytest.mark.spark, pytest.mark.long]


def everything_on(bucket: str, store_uri: str, tmp_path: Path, **dataset: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "remote",
            "output": f"{bucket}/runs",
            "dataset": {
                "path": f"{bucket}/data",
                "name": "pictures",
                "source": {"kind": "folder", "path": f"{bucket}/pictures"},
                "image": {"shape": SHAPE},
                "validation_share": 0.2,
                "test_share": 0.2,
                "deduplicate": True,
                "shard_bytes": 20 * 3 * 8 * 8,
                "row_group_rows": 8,
                **dataset,
            },
            "model": {"network": "cnn", "norm": "batch", "depth": 3, "width": 4},
            "train": {"epochs": 1, "batch_size": 16, "lanes": 4, "evaluation_batch_size": 16},
            "reader": {"cache": str(tmp_path / "cache")},
            "checkpoint": {"every_steps": 2},
            "workers": TWO.model_dump(),
            "tracking": {"uri": store_uri, "artifacts": str(tmp_path / "artifacts"), "system_metrics": False},
            "export": {"formats": ["torchscript"]},
        }
    )


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
