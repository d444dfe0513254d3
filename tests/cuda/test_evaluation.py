"""Evaluations on the device: what stays on a GPU, and in which precision they compute."""

from contextlib import closing

import pytest
import torch
from gpu_jobs import make_job

from pipeline.config.dataset import ReaderSettings
from pipeline.data import load_manifest
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble
from pipeline.training.evaluation_split import EvaluationSplit


def images_of(split):
    with split.batches() as batches:
        found = [(batch.images.cpu(), batch.labels.cpu()) for batch in batches]
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


@pytest.mark.parametrize("gpu_bytes", [0, 512 * 3 * 8 * 8 - 1, 512 * 3 * 8 * 8])
def test_a_split_stays_on_a_gpu_once_it_was_read(gpu_bytes, shards, tmp_path, device, monkeypatch):
    reads, read = [], SplitFiles.read
    monkeypatch.setattr(SplitFiles, "read", lambda files, *segment: reads.append(segment) or read(files, *segment))
    train, manifest = make_job(shards, tmp_path / "job").train, load_manifest(shards)
    settings = ReaderSettings(gpu_bytes=gpu_bytes)
    with closing(EvaluationSplit(alone(device.type), shards, manifest, "train", train, settings)) as split:
        images, labels = images_of(split)
        once = len(reads)
        again, and_labels = images_of(split)
        assert len(images) == split.rows == len(split.ids()) == 512
    stays = device.type == "cuda" and gpu_bytes == 512 * 3 * 8 * 8
    assert len(reads) == (once if stays else 2 * once)
    assert torch.equal(images, again)
    assert torch.equal(labels, and_labels)


class Remembering(torch.nn.Module):
    """Passes on what it gets, and remembers its dtype."""

    dtype = None

    def forward(self, x):
        Remembering.dtype = x.dtype
        return x


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_computes_as_training_does(bf16, shards, tmp_path, device):
    with assemble(alone(device.type), make_job(shards, tmp_path / "job", bf16=bf16)) as training:
        training.state.model.append(Remembering())
        network = training.evaluator.run()
    assert Remembering.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert network.evaluation.rows == 512
    assert network.evaluation.loss > 0
