"""The training loop's view of the data: either reader, the same number of steps on every rank."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from pipeline.config.dataset import ReaderSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest, loader, shard_cache
from pipeline.data.manifest import DatasetError
from pipeline.distributed.worker import alone
from pipeline.training.loop import Job, fit

TRAIN = TrainSettings(epochs=2, batch_size=32, lanes=4, evaluation_batch_size=64)


def job(dataset, folder, kind):
    model = ModelSettings(network="cnn", norm="batch", depth=3, width=4)
    return Job(dataset, str(folder), model, TRAIN, reader=ReaderSettings(kind=kind))


@pytest.mark.parametrize("kind", ["arrow", "petastorm"])
def test_a_loader_has_the_steps_it_says_from_any_step_on(dataset, kind):
    found = load_manifest(dataset)
    source = loader.TrainLoader(dataset, found, TRAIN, ReaderSettings(kind=kind), alone("cpu"))
    with source.batches(0) as batches:
        whole = list(batches)
    assert len(whole) == TRAIN.epochs * source.steps_per_epoch
    with source.batches(source.steps_per_epoch + 3) as batches:
        rest = list(batches)
    source.close()
    assert len(rest) == source.steps_per_epoch - 3
    for a, b in zip(whole[source.steps_per_epoch + 3 :], rest, strict=True):
        assert a.images.equal(b.images)
        assert a.labels.equal(b.labels)


def test_petastorm_shuffles_over_as_many_row_groups_as_the_training_says(dataset):
    def images(window):
        train = TRAIN.model_copy(update={"shuffle_row_groups": window})
        source = loader.TrainLoader(
            dataset, load_manifest(dataset), train, ReaderSettings(kind="petastorm"), alone("cpu")
        )
        with source.batches(0) as batches:
            found = [batch.images for batch in batches]
        source.close()
        return found

    one, four = images(1), images(4)
    assert len(one) == len(four)
    assert not all(map(torch.equal, one, four))


def all_batches(dataset, **reader):
    source = loader.TrainLoader(dataset, load_manifest(dataset), TRAIN, ReaderSettings(**reader), alone("cpu"))
    try:
        with source.batches(0) as batches:
            return list(batches)
    finally:
        source.close()


@pytest.fixture
def altered(dataset, tmp_path):
    """A copy of the dataset in which one image of a shard, but not its size, is another; and the shard's path."""
    copy = shutil.copytree(dataset, tmp_path / "altered")
    path = Path(copy, load_manifest(dataset).split("train").shards[1].path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2  # where images lie
    content[middle : middle + 8] = bytes(np.frombuffer(content[middle : middle + 8], np.uint8) ^ 255)
    path.write_bytes(content)
    return str(copy), path


@pytest.mark.parametrize("kind", ["arrow", "petastorm"])
def test_an_altered_shard_is_not_trained_on(altered, kind):
    dataset, path = altered
    with pytest.raises(DatasetError, match=rf"{path.name}.*: was altered: its SHA-256 is [0-9a-f]{{64}}, the manifest"):
        all_batches(dataset, kind=kind)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=rf"{path.name}.*: is cut: \d+ bytes, the manifest says"):
        all_batches(dataset, kind=kind, verify="off")


def test_petastorm_too_hashes_each_shard_once(dataset, monkeypatch):
    hashed = []
    sha256_of = shard_cache.sha256_of
    monkeypatch.setattr(shard_cache, "sha256_of", lambda file: hashed.append(sha256_of(file)) or hashed[-1])
    all_batches(dataset, kind="petastorm", verify="off")
    assert hashed == []
    all_batches(dataset, kind="petastorm")
    assert sorted(hashed) == sorted(shard.sha256 for shard in load_manifest(dataset).split("train").shards)


def test_pages_have_checksums_that_petastorm_looks_at(altered):
    dataset, path = altered
    with pytest.raises(DatasetError, match=rf"{path.name}, row group \d+: cannot be read: .*CRC checksum"):
        all_batches(dataset, kind="petastorm", verify="off")


def test_training_through_petastorm_ends_where_it_did_before(dataset, tmp_path):
    first = run_ranks(fit, 2, job(dataset, tmp_path / "a", "petastorm"))
    again = run_ranks(fit, 2, job(dataset, tmp_path / "b", "petastorm"))
    assert first[0].steps == TRAIN.epochs * loader.steps_per_epoch(
        load_manifest(dataset), TRAIN, ReaderSettings(kind="petastorm"), 2
    )
    assert first[0].curve == first[1].curve == again[0].curve
    assert first[0].best_accuracy > 0.6  # three classes


def test_both_readers_learn_the_same_task(dataset, tmp_path):
    results = {kind: fit(alone("cpu"), job(dataset, tmp_path / kind, kind)) for kind in ("arrow", "petastorm")}
    assert abs(results["arrow"].best_accuracy - results["petastorm"].best_accuracy) < 0.15


def test_batches_that_are_not_taken_leave_no_thread_behind(dataset):
    import threading

    source = loader.TrainLoader(dataset, load_manifest(dataset), TRAIN, ReaderSettings(memory_bytes=0), alone("cpu"))
    with source.batches(0) as batches:
        next(batches)
    source.close()
    ours = ("sparknorm-reader", "sparknorm-prefetch")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]
