"""A checkpoint holds the network that was evaluated, whatever its author keeps in buffers and calls its parts."""

from dataclasses import replace

import pytest
import torch
from ranks import fit_until
from small_splits import write_easy_splits
from small_training import equal
from torch import nn

from models.saved_state import load_saved
from models.weights import take_weights, tensors_of
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.data import load_manifest
from pipeline.data.manifest import Manifest
from pipeline.data.reader import evaluation_blocks
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import alone
from pipeline.training import checkpoint
from pipeline.training.evaluate import evaluate
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit
from pipeline.training.network import network_for

KINDS = ["unsaved", "made_later", "made_later_unsaved", "two_names"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return write_easy_splits(str(tmp_path_factory.mktemp("data") / "small"))


def make_job(dataset, folder, kind, **train) -> Job:
    model = ModelSettings(network="odd_networks:build", options={"kind": kind}, norm="keep")
    settings = TrainSettings(epochs=2, batch_size=16, lanes=4, learning_rate=0.05, evaluation_batch_size=16, **train)
    return Job(dataset, str(folder), model, settings, checkpoint=CheckpointSettings(every_steps=1, keep=9))


def saved(job: Job, step: int | None = None) -> dict:
    folder, options = f"{job.folder}/checkpoints", {"identity": identity(job), "device": torch.device("cpu")}
    return checkpoint.load_newest(folder, **options) if step is None else checkpoint.load_step(folder, step, **options)


def loaded(job: Job, tensors: dict) -> nn.Module:
    network = network_for(job.model, load_manifest(job.dataset))
    load_saved(network, tensors)
    return network


def loss_of(job: Job, network: nn.Module) -> float:
    manifest: Manifest = load_manifest(job.dataset)
    files = SplitFiles(job.dataset, manifest, "test")
    blocks = evaluation_blocks(files, rank=0, world_size=1, batch_size=16)
    batches = (batch for block in blocks for batch in block)
    return evaluate(alone("cpu"), network, batches, classes=3, split_rows=50).loss


@pytest.mark.parametrize("kind", KINDS)
def test_odd_networks_go_on_with_the_same_bits_and_are_loaded(small, tmp_path, kind):
    whole, killed = (make_job(small, tmp_path / name, kind) for name in ("whole", "killed"))
    result = fit(alone("cpu"), whole)
    assert fit(alone("cpu"), whole).curve == result.curve  # from the checkpoint of its end
    assert fit_until(alone("cpu"), killed, 6) is None
    assert fit(alone("cpu"), killed).curve == result.curve
    assert equal(saved(killed)["model"], saved(whole)["model"])
    assert ("1.factor" in saved(whole)["model"]) == (kind == "made_later")
    network = loaded(whole, saved(whole)["model"])
    if kind != "made_later_unsaved":  # which computes it anew from the first batch that it sees
        assert loss_of(whole, network) == pytest.approx(result.final_loss, rel=1e-6)


@pytest.mark.parametrize("change", [{"weight_ema": 0.8}, {"evaluation_statistics": "precise"}])
def test_of_a_tensor_with_two_names_both_are_what_was_evaluated(small, tmp_path, change):
    job = make_job(small, tmp_path / "job", "two_names", **change)
    result = fit_until(alone("cpu"), job, 99)  # which waits for each checkpoint
    tensors = saved(job)["model"]
    assert loss_of(job, loaded(job, tensors)) == pytest.approx(result.final_loss, rel=1e-6)
    between = saved(job, 3)["model"]  # within an epoch, where nothing was evaluated
    for values in (tensors, between):
        assert torch.equal(values["1.first.weight"], values["1.second.weight"])
        assert torch.equal(values["1.norm.running_mean"], values["1.same_norm.running_mean"])
    assert not torch.equal(tensors["1.first.weight"], between["1.first.weight"])


def test_checkpoints_of_earlier_versions_are_loaded(small, tmp_path):
    """They had buffers that are not saved, and what was evaluated under the first name alone."""
    job = make_job(small, tmp_path / "job", "two_names", weight_ema=0.8)
    result = fit(alone("cpu"), job)
    tensors = saved(job)["model"]
    old = {**tensors, "1.second.weight": torch.zeros(4, 4), "1.same_norm.running_mean": torch.zeros(4)}
    assert loss_of(job, loaded(job, old)) == pytest.approx(result.final_loss, rel=1e-6)
    job = make_job(small, tmp_path / "unsaved", "unsaved")
    fit(alone("cpu"), job)
    old = {**saved(job)["model"], "1.factor": torch.zeros(4)}
    assert torch.equal(loaded(job, old)[1].factor, torch.full((4,), 1.5))
    network = network_for(job.model, load_manifest(small))
    take_weights(network, job.model, tensors_of(old), image_shape=(1, 8, 8), num_classes=3, head=None)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loaded(job, {**old, "1.other": torch.zeros(4)})


def test_vgg_is_loaded_where_its_images_are_small(tmp_path):
    """Of images that it does not reduce to 7 x 7, its pool keeps matrices in buffers that are not saved."""
    dataset = write_easy_splits(str(tmp_path / "data"), shape=(3, 32, 32), rows=32)
    job = make_job(dataset, tmp_path / "job", "")
    train = job.train.model_copy(update={"epochs": 1})
    job = replace(job, model=ModelSettings(network="vgg11", width=1), train=train, checkpoint=CheckpointSettings())
    result = fit(alone("cpu"), job)
    assert fit(alone("cpu"), job).curve == result.curve
    assert not [name for name in saved(job)["model"] if name.endswith(("rows", "columns"))]
    loaded(job, saved(job)["model"])
