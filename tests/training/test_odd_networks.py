"""Networks of one's own that torch allows: tried as they are trained, and trained as their author has made them."""

import pytest
import torch
from ranks import fit_until, run_ranks
from small_splits import write_easy_splits
from small_training import equal, events

from pipeline.config.cluster import WorkerSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, DiagnosticsSettings, TrainSettings
from pipeline.data import load_manifest
from pipeline.distributed.worker import alone
from pipeline.training import checkpoint
from pipeline.training.assembly import assemble
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit
from pipeline.training.own_network import check_own_network


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return write_easy_splits(str(tmp_path_factory.mktemp("data") / "small"), shape=(3, 8, 8))


def model_of(kind, norm="keep") -> ModelSettings:
    return ModelSettings(network="odd_networks:build", options={"kind": kind}, norm=norm, norm_groups=2)


def make_job(dataset, folder, kind, **train) -> Job:
    given = {"epochs": 2, "batch_size": 16, "lanes": 4, "learning_rate": 0.05, "evaluation_batch_size": 16, **train}
    when = CheckpointSettings(every_steps=1)
    return Job(dataset, str(folder), model_of(kind), TrainSettings(**given), checkpoint=when)


def model_in(job) -> dict:
    folder = f"{job.folder}/checkpoints"
    return checkpoint.load_newest(folder, identity=identity(job), device=torch.device("cpu"))["model"]


def try_it(dataset, kind, *, device="auto", norm="keep", **train):
    workers = WorkerSettings(count=2, device=device)
    return check_own_network(model_of(kind, norm), load_manifest(dataset), TrainSettings(**train), workers)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            "views",
            {},
            r"training on 4 images .* raised .*view.*: with train\.channels_last, .* write \.flatten\(1\) or",
        ),
        ("lstm", {"bf16": True, "device": "cpu"}, r"raised .*: on a CPU it cannot be trained with train\.bf16; set it"),
        (
            "synchronized",
            {"device": "cpu"},
            r"norm is a torch\.nn\.SyncBatchNorm, .* set model\.norm to batch and model",
        ),
        ("grows", {}, r"a forward pass makes the buffer seen of shape \(1,\) one of \(4,\): .* keep their shape"),
        ("lazy", {}, r"^model\.network odd_networks:build: conv do not know their sizes yet"),
        ("lazy", {"norm": "group"}, r"^model\.network odd_networks:build: conv do not know their sizes yet"),
        ("sometimes", {}, r"some passes give no gradient to extra\.weight, extra\.bias, and some do: "),
    ],
)
def test_what_workers_could_not_train_is_refused_on_the_driver(small, kind, options, words):
    with pytest.raises(ValueError, match=words):
        try_it(small, kind, **options)


def test_what_workers_can_train_is_tried_as_they_do(small, tmp_path):
    assert try_it(small, "views", channels_last=False).notes == ()
    assert try_it(small, "synchronized", device="cuda").notes == ()
    (note,) = try_it(small, "lstm", bf16=True).notes
    assert note.endswith("on a CPU it cannot be trained with train.bf16; set it to false, unless workers have GPUs")
    assert try_it(small, "volumes").notes == ()
    assert fit(alone("cpu"), make_job(small, tmp_path, "volumes")).steps == 8


def test_ranks_on_cpus_name_what_they_cannot_synchronize(small, tmp_path):
    with pytest.raises(ValueError, match=r"norm is a torch\.nn\.SyncBatchNorm, which several workers can use on GPUs"):
        run_ranks(fit, 2, make_job(small, tmp_path, "synchronized"))


@pytest.mark.parametrize("train", [{}, {"evaluation_statistics": "precise"}])
def test_a_norm_that_its_author_has_frozen_stays_so(small, tmp_path, train):
    whole, killed = (make_job(small, tmp_path / name, "frozen_norm", **train) for name in ("whole", "killed"))
    result = fit(alone("cpu"), whole)
    assert torch.equal(model_in(whole)["1.norm.running_mean"], torch.zeros(4))
    assert fit_until(alone("cpu"), killed, 6) is None  # in the second epoch: after an evaluation
    assert fit(alone("cpu"), killed).curve == result.curve
    assert equal(model_in(killed), model_in(whole))


def test_a_network_in_evaluation_mode_is_put_into_training_mode(small, tmp_path):
    (note,) = try_it(small, "evaluates").notes
    assert note.endswith("it was built in evaluation mode, and all of it is put into training mode")
    with assemble(alone("cpu"), make_job(small, tmp_path / "job", "evaluates")) as training:
        assert all(module.training for module in training.state.model.modules())


def test_how_often_it_is_evaluated_changes_no_training(small, tmp_path):
    """Its author lets it draw random numbers in evaluation, too."""
    seldom, often = (make_job(small, tmp_path / str(n), "draws", evaluations_per_epoch=n) for n in (1, 4))
    fit(alone("cpu"), seldom)
    fit(alone("cpu"), often)
    assert equal(model_in(seldom), model_in(often))


def test_layers_that_are_called_by_keyword_are_seen(small, tmp_path):
    look = DiagnosticsSettings(every_steps=3)
    job = make_job(small, tmp_path, "", evaluation_statistics="precise", diagnostics=look)
    fit(alone("cpu"), job)
    names = {name for event in events(job, "diagnostics") for name in event["values"]}
    assert {"activation_mean/1.act", "statistics_gap_mean/1.norm"} <= names
