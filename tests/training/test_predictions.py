"""What the last evaluation finds of each image: the same file for any number of ranks, also of a training resumed."""

import io
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from last_network import evaluated_directly
from ranks import Killed, run_ranks
from sklearn.metrics import recall_score

from pipeline import storage
from pipeline.config.augment import AugmentSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.data import load_manifest, reader
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import alone
from pipeline.training import predictions
from pipeline.training.image_scores import PredictionCollector, image_scores
from pipeline.training.job import Job
from pipeline.training.loop import fit
from pipeline.training.predictions import Predictions

COLUMNS = {"id": "int64", "label": "int32", "prediction": "int32", "confidence": "float32", "loss": "float32"}


def make_job(dataset, folder, norm="group", **changes):
    train = {"epochs": 1, "batch_size": 32, "lanes": 4, "learning_rate": 0.1, "evaluation_batch_size": 50,
             "augment": AugmentSettings(flip=True, shift=1), **changes}  # fmt: skip
    model = ModelSettings(depth=3, width=4, norm=norm, norm_groups=2)
    return Job(dataset, str(folder), model, TrainSettings(**train), checkpoint=CheckpointSettings(every_steps=5))


def bytes_of(job):
    return Path(job.folder, predictions.FILE).read_bytes()


def assert_close(found, expected):
    np.testing.assert_array_equal(found.id, expected.id)
    np.testing.assert_array_equal(found.label, expected.label)
    assert (found.prediction == expected.prediction).mean() > 0.99  # a tie may be rounded either way
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_they_are_those_of_a_direct_evaluation_of_the_whole_split(dataset, tmp_path, world_size, evaluate_on):
    job = make_job(dataset, tmp_path, "batch", evaluate_on=evaluate_on)
    results = run_ranks(fit, world_size, job)
    assert {result.predictions for result in results} == {str(tmp_path / "predictions.parquet")}
    found = predictions.read(results[0].predictions)
    assert len(found) == load_manifest(dataset).split(evaluate_on).rows
    assert {name: str(getattr(found, name).dtype) for name in COLUMNS} == COLUMNS
    assert_close(found, evaluated_directly(job))
    assert (found.prediction == found.label).mean() == pytest.approx(results[0].final_accuracy)
    assert found.loss.mean(dtype=np.float64) == pytest.approx(results[0].final_loss, rel=1e-6)
    assert results[0].recall == tuple(recall_score(found.label, found.prediction, average=None))
    assert results[0].final_balanced_accuracy == pytest.approx(np.mean(results[0].recall))
    last = results[0].curve[-1]
    assert results[0].final_macro_f1 == last.macro_f1
    assert results[0].final_calibration_error == last.calibration_error
    assert {result.recall for result in results} == {results[0].recall}


def collect(worker, dataset):
    """What this rank's part of the split gives, with scores that follow from id and label alone."""
    job = make_job(dataset, "")
    with closing(SplitFiles(job.dataset, load_manifest(dataset), "test")) as files:
        ids = reader.evaluation_ids(files, rank=worker.rank, world_size=worker.world_size)
        labels = torch.from_numpy(ids % 3)
        collector = PredictionCollector(worker.device)
        for part in torch.arange(len(ids)).split(17):
            logits = torch.sin(torch.from_numpy(ids)[part, None] * torch.arange(1, 4))
            collector.add(labels[part], image_scores(logits, labels[part]))
        return collector.gather(worker, ids)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_file_is_the_same_for_any_number_of_ranks(dataset, tmp_path, world_size):
    first, *others = run_ranks(collect, world_size, dataset)
    assert others == [None] * (world_size - 1)
    predictions.write(str(tmp_path / "some.parquet"), first)
    predictions.write(str(tmp_path / "one.parquet"), collect(alone("cpu"), dataset))
    assert (tmp_path / "some.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    ids = pq.read_table([f"{dataset}/{shard.path}" for shard in load_manifest(dataset).split("test").shards])["id"]
    assert first.id.tolist() == sorted(ids.to_pylist())
    assert (first.id[1:] > first.id[:-1]).all()


def die(moment, *, name, step):
    """At one moment of the last step. A checkpoint that has begun is whole; before one is written, the disk fails."""
    if (moment.name, moment.step) == (name, step):
        if name == "before_write":
            raise OSError("No space left on device")
        if name == "checkpoint_begun":
            moment.wait_until_written()
        raise Killed


def fit_until_it_dies(worker, job):
    with pytest.raises((Killed, OSError)):
        fit(worker, job)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("after_evaluation", 1), ("before_write", 1), ("checkpoint_begun", 1), ("after_evaluation", 2)],
)
def test_a_training_that_dies_at_its_last_evaluation_ends_with_the_same_file(dataset, tmp_path, name, world_size):
    undisturbed, killed = (make_job(dataset, tmp_path / folder, "batch") for folder in ("undisturbed", "killed"))
    steps = run_ranks(fit, world_size, undisturbed)[0].steps
    run_ranks(fit_until_it_dies, world_size, replace(killed, hook=partial(die, name=name, step=steps)))
    assert Path(killed.folder, predictions.FILE).exists() == (name != "after_evaluation")
    run_ranks(fit, world_size, killed)
    assert bytes_of(killed) == bytes_of(undisturbed)


@pytest.mark.parametrize("change", [{}, {"weight_ema": 0.9}, {"learning_rate": 1e30, "warmup_epochs": 0}])
def test_an_ended_training_whose_file_is_gone_writes_the_same_again(dataset, tmp_path, change):
    """Also where it has diverged, or where an average of the weights is evaluated."""
    job = make_job(dataset, tmp_path, "none" if "learning_rate" in change else "batch", **change)
    first = fit(alone("cpu"), job)
    assert first.diverged == ("learning_rate" in change)
    before = bytes_of(job)
    written = Path(first.predictions).stat().st_mtime_ns
    assert fit(alone("cpu"), job).curve == first.curve
    assert Path(first.predictions).stat().st_mtime_ns == written  # it is there: nothing is evaluated again
    Path(first.predictions).unlink()
    again = fit(alone("cpu"), job)
    assert (again.curve, again.recall) == (first.curve, first.recall)
    assert bytes_of(job) == before


def test_other_files_are_refused(tmp_path, remote):
    path = storage.join(remote, predictions.FILE)
    with pytest.raises(OSError, match=r"predictions\.parquet"):
        predictions.read(path)
    pq.write_table(pq.read_table(written_predictions(path)).drop_columns("loss"), tmp_path / "old.parquet")
    with pytest.raises(ValueError, match=r"confidence float instead of .*loss float: it holds no predictions"):
        predictions.read(str(tmp_path / "old.parquet"))
    storage.publish(path, b"nothing")
    with pytest.raises(ValueError, match="Parquet"):
        predictions.read(path)


def written_predictions(path):
    """A file of two rows, and of none, that read back as they were; on any storage."""
    for rows in (0, 2):
        columns = {name: np.arange(rows).astype(kind) for name, kind in COLUMNS.items()}
        predictions.write(path, Predictions(**columns))
        found = predictions.read(path)
        for name, column in columns.items():
            np.testing.assert_array_equal(getattr(found, name), column)
            assert getattr(found, name).dtype == column.dtype
    return io.BytesIO(storage.read_bytes(path))
