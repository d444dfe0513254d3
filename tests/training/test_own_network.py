"""A training of a network by its import path: tried before, resumed, and refused once its source has changed."""

import sys
from dataclasses import replace

import pytest
import torch
from ranks import fit_until
from small_training import equal

from pipeline.cluster.rendezvous import check_agreement
from pipeline.config.cluster import WorkerSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.data import load_manifest
from pipeline.distributed.worker import alone
from pipeline.training import checkpoint
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.job import Job, facts, identity
from pipeline.training.loop import fit
from pipeline.training.own_network import check_own_network, check_source, network_facts

SOURCE = """from torch import nn

def build(image_shape, num_classes, width=4):
    return nn.Sequential(nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes))
"""
UNSEEDED = (
    SOURCE
    + """
def unseeded(num_classes):
    import os
    linear = nn.Linear(144, num_classes)
    linear.bias.data[0] = int.from_bytes(os.urandom(2), "little")
    return nn.Sequential(nn.Flatten(), linear)
"""
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The file of the module ``trained``."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "trained.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop("trained", None)


def job_of(dataset, folder, norm="batch", **options):
    train = TrainSettings(epochs=1, batch_size=32, lanes=4, learning_rate=0.1)
    model = ModelSettings(network="trained:build", options=options, norm=norm, norm_groups=2)
    return Job(dataset, str(folder), model, train, checkpoint=CheckpointSettings(every_steps=3))


def weights(job):
    folder = f"{job.folder}/checkpoints"
    return checkpoint.load_newest(folder, identity=identity(job), device=torch.device("cpu"))["model"]


@pytest.mark.parametrize("norm", ["keep", "group"])
def test_it_goes_on_from_its_checkpoint_with_the_same_bits(dataset, source, tmp_path, norm):
    whole, killed = (job_of(dataset, tmp_path / name, norm) for name in ("whole", "killed"))
    result = fit(alone("cpu"), whole)
    assert result.steps > 10
    assert fit_until(alone("cpu"), killed, 7) is None
    assert fit(alone("cpu"), killed).curve == result.curve
    assert equal(weights(killed), weights(whole))
    assert any("running_mean" in name for name in weights(whole)) == (norm == "keep")


def test_changed_source_does_not_go_on_from_an_old_checkpoint(dataset, source, tmp_path):
    job = job_of(dataset, tmp_path / "job")
    fit(alone("cpu"), job)
    before = identity(job)
    source.write_text(SOURCE.replace("nn.ReLU()", "nn.SiLU()"))
    assert identity(job) != before
    with pytest.raises(CheckpointError, match=r"another run: source of model\.network trained:build is .sha256:"):
        fit(alone("cpu"), job)
    source.write_text(SOURCE)
    assert identity(job) == before
    assert fit(alone("cpu"), job).steps


def test_every_rank_compares_its_source_and_its_parameters(dataset, source, tmp_path):
    job = job_of(dataset, tmp_path / "job", width=6)
    job = replace(job, source=check_source("trained:build", ""))
    name = "the parameters of model.network trained:build"
    assert facts(job) == {**identity(job), name: "141 in 5 tensors"}
    assert facts(replace(job, model=job_of(dataset, "", width=4).model))[name] == "95 in 5 tensors"
    source.write_text(SOURCE + "# newer\n")
    with pytest.raises(ValueError, match=r"trained:build: \S+ imports other source, from .*trained.py, than"):
        facts(job)
    source.unlink()
    sys.modules.pop("trained")
    with pytest.raises(ValueError, match=r"trained:build: on \S+: there is no module trained to import here"):
        facts(job)


def test_what_a_person_should_know_is_said_before(dataset, source):
    source.write_text(UNSEEDED)
    manifest, plain = load_manifest(dataset), (TrainSettings(), WorkerSettings())
    model = ModelSettings(network="trained:build", norm="keep")
    assert check_own_network(model, manifest, *plain) == (95, ())
    deeper = model.model_copy(update={"depth": 7})
    (note,) = check_own_network(deeper, manifest, *plain).notes
    assert note == "model.depth says nothing to trained:build, which gets model.options alone"
    unseeded = model.model_copy(update={"network": "trained:unseeded"})
    assert (
        "trained:unseeded starts from other weights each time" in check_own_network(unseeded, manifest, *plain).notes[0]
    )


def test_facts_of_a_network_of_ours_are_its_identity(dataset, tmp_path):
    job = replace(job_of(dataset, tmp_path), model=ModelSettings(width=4))
    assert facts(job) == identity(job)
    assert not any("source" in name for name in identity(job))
    assert network_facts(job.model, load_manifest(dataset), seed=0)


def test_ranks_that_build_other_parameters_are_named_before_step_one(dataset, source, tmp_path, monkeypatch):
    source.write_text(SOURCE.replace("width=4):", "width=4):\n    import os\n    width = int(os.environ['WIDTH'])"))
    job, of_ranks = job_of(dataset, tmp_path / "job"), []
    for width in ("4", "6"):  # as on two hosts
        monkeypatch.setenv("WIDTH", width)
        of_ranks.append(facts(job))
    words = (
        r"ranks disagree about the parameters of model.network trained:build: rank 0 on a has 95 in 5 tensors, "
        r"rank 1 on b has 141 in 5 tensors"
    )
    with pytest.raises(ValueError, match=words):
        check_agreement(of_ranks, ["a", "b"])
