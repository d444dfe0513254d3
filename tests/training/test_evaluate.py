import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from models.norms.batch import BatchNorm
from pipeline.data import load_manifest, reader
from pipeline.data.shards import SplitFiles
from pipeline.training import norm_statistics
from pipeline.training.evaluate import evaluate

CHANNELS = 5


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).double()


class ToDouble(nn.Module):
    def forward(self, x):
        return x.double() / 255


def evaluate_rank(worker, dataset):
    files = SplitFiles(dataset, load_manifest(dataset), "test")
    model = nn.Sequential(ToDouble(), linear_model())
    batches = (
        batch
        for block in reader.evaluation_blocks(files, rank=worker.rank, world_size=worker.world_size, batch_size=50)
        for batch in block
    )
    return evaluate(worker, model, batches, classes=3, split_rows=301)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_number_of_ranks_counts_all_rows(dataset, world_size):
    """301 rows: no rank but a lone one has a whole number of batches, and ranks differ in rows."""
    results = run_ranks(evaluate_rank, world_size, dataset)
    files = SplitFiles(dataset, load_manifest(dataset), "test")
    images, labels = (
        np.concatenate(part) for part in zip(*(files.read(n) for n in range(len(files.group_rows))), strict=True)
    )
    with torch.no_grad():
        logits = linear_model()(torch.from_numpy(images.copy()).double() / 255).float()
    labels = torch.from_numpy(labels.astype(np.int64))
    for result in results:
        assert result.rows == 301
        assert result.correct == int((logits.argmax(1) == labels).sum())
        assert result.accuracy == result.correct / 301
        assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)


def test_rows_that_are_missing_are_noticed(dataset):
    with pytest.raises(RuntimeError, match="saw 301 rows of a split that has 302"):
        run_ranks(lambda worker, path: _with_rows(worker, path, 302), 1, dataset)


def _with_rows(worker, dataset, rows):
    files = SplitFiles(dataset, load_manifest(dataset), "test")
    batches = (
        batch for block in reader.evaluation_blocks(files, rank=0, world_size=1, batch_size=50) for batch in block
    )
    return evaluate(worker, nn.Sequential(ToDouble(), linear_model()), batches, classes=3, split_rows=rows)


def rows_of_rank(rank):
    return np.random.default_rng(rank).normal(loc=rank, scale=1 + rank, size=(40, CHANNELS))


def reduce_rank(worker):
    model = nn.Sequential(nn.Linear(2, 2), BatchNorm(CHANNELS), nn.GroupNorm(1, CHANNELS)).double()
    data = rows_of_rank(worker.rank)
    model[1].running_mean.copy_(torch.from_numpy(data.mean(0)))
    model[1].running_var.copy_(torch.from_numpy(data.var(0)))
    norm_statistics.of_all_ranks(worker, model, 40)
    return model[1].running_mean.numpy(), model[1].running_var.numpy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_running_statistics_are_those_of_all_rows_together(world_size):
    everything = np.concatenate([rows_of_rank(rank) for rank in range(world_size)])
    for mean, variance in run_ranks(reduce_rank, world_size):
        np.testing.assert_allclose(mean, everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(variance, everything.var(0), rtol=1e-12)
