"""Whole trainings on the device: to the end, resumed, diverged; what they wait for, and what memory they leave."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_jobs import AUGMENT, PHOTOGRAPHS, assert_same_end, make_job, newest
from ranks import fit_until, run_ranks

from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble
from pipeline.training.augment import augment, mix
from pipeline.training.augment.draws import BatchRows
from pipeline.training.loop import fit
from pipeline.training.word import Word


@pytest.mark.parametrize("settings", [AUGMENT, PHOTOGRAPHS], ids=["small", "photographs"])
def test_changes_to_images_are_those_of_the_cpu(settings, device):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=random)
    labels, ids = torch.arange(24) % 5, torch.arange(24)
    options = {"seed": 3, "step": 7, "lanes": range(4), "num_lanes": 4, "mean": [0.5, 0.2, 0.1], "ids": ids}
    here, on_cpu = (augment(images.to(there), settings, size=(7, 7), **options) for there in (device, "cpu"))
    assert torch.equal(here.cpu(), on_cpu)
    if settings.mixes:
        rows = BatchRows(3, 7, range(4), 4, 6)
        found = mix(here, labels.to(device), settings, rows, classes=5)
        expected = mix(on_cpu, labels, settings, rows, classes=5)
        assert all(torch.equal(values.cpu(), others) for values, others in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"accumulate": 2}, {"weight_ema": 0.9}, {"gradient_checkpointing": True}], ids=str
)
def test_a_training_ends_where_the_cpu_does(options, shards, tmp_path, device):
    """The labels are noise: the loss that both have after some steps is the point, not the accuracy."""
    if device.type == "cpu" and options:
        pytest.skip("tests/training has it")
    job = make_job(shards, tmp_path / "job", epochs=1, **options)
    found = fit(alone(device.type), job)
    expected = fit(alone("cpu"), make_job(shards, tmp_path / "cpu", epochs=1, **options))
    assert found.steps == expected.steps == 16
    assert found.curve[-1].loss == pytest.approx(expected.curve[-1].loss, rel=0.1)
    assert found.train_loss[-1] == pytest.approx(expected.train_loss[-1], rel=0.05)


@pytest.mark.parametrize("with_dropout", [False, True], ids=["", "dropout"])
def test_a_training_that_was_ended_goes_on_with_the_same_bits(with_dropout, shards, tmp_path, device):
    whole, cut = (make_job(shards, tmp_path / name, deterministic=True) for name in ("whole", "cut"))
    assert fit_until(alone(device.type), whole, None, with_dropout)
    assert fit_until(alone(device.type), cut, 17, with_dropout) is None
    assert newest(cut)["progress"]["step"] == 16  # the end of the first epoch
    assert fit_until(alone(device.type), cut, None, with_dropout)
    assert not torch.are_deterministic_algorithms_enabled()  # of this process, whatever it does next
    assert_same_end(whole, cut)


def test_checkpoints_go_to_the_cpu_and_back(shards, tmp_path, device):
    """A training is begun on one device, goes on on another, and ends on the first."""
    job = make_job(shards, tmp_path / "job")
    assert fit_until(alone(device.type), job, 7) is None
    assert fit_until(alone("cpu"), job, 18) is None
    result = fit(alone(device.type), job)
    assert result.steps == 32
    assert result.curve[-1].loss == pytest.approx(fit(alone("cpu"), replace(job, folder=str(tmp_path / "other")))
                                                  .curve[-1].loss, rel=0.2)  # fmt: skip


def test_a_checkpoint_takes_no_memory_of_the_gpu_beside_the_network(shards, tmp_path, cuda):
    """What is loaded stays on the host: on the GPU is the network, and then its momentum."""
    job = make_job(shards, tmp_path / "job", {"width": 64})
    assert fit_until(alone("cuda"), job, 7) is None
    with assemble(alone("cuda"), job) as training:
        size = sum(parameter.nbytes for parameter in training.state.model.parameters())
        assert size > 4 << 20
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training.checkpoints.restore()
        assert training.state.progress.step > 0
        assert torch.cuda.max_memory_allocated() - before < 1.5 * size


@pytest.mark.parametrize("last_step", [0, 3])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(last_step, shards, tmp_path, device):
    job = make_job(shards, tmp_path / "job", weight_ema=0.9)
    with assemble(alone(device.type), job) as training:
        step, state = training.step, training.state
        step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as batches:
            for _ in range(last_step):
                step.take(batches)
            weights = [parameter.detach().clone() for parameter in state.model.parameters()]
            average = {name: value.clone() for name, value in state.average.state().items()}
            momentum = [
                None if (value := state.optimizer.state[parameter].get("momentum_buffer")) is None else value.clone()
                for parameter in state.model.parameters()
            ]
            step.loss = lambda images, labels, forward: forward(images).sum() * float("nan")
            assert step.take(batches) is Word.GO_ON
        assert state.progress.diverged
        assert state.progress.step == last_step
        for parameter, before, moved in zip(state.model.parameters(), weights, momentum, strict=True):
            assert torch.equal(parameter, before)
            now = state.optimizer.state[parameter].get("momentum_buffer")
            assert (now is None) == (moved is None)
            assert now is None or torch.equal(now, moved)
        assert all(torch.equal(value, average[name]) for name, value in state.average.state().items())


def test_no_memory_outlives_a_training(shards, tmp_path, cuda, held):
    fit(alone("cuda"), make_job(shards, tmp_path / "first"))  # libraries keep workspaces of their own
    before = held()
    for name in ("second", "third"):
        fit(alone("cuda"), make_job(shards, tmp_path / name))
        assert held() <= before


def held_after_trainings(worker, job):
    """Bytes in use on the GPU after one training of this rank, and after another."""
    held = []
    for name in ("one", "another"):
        fit(worker, replace(job, folder=f"{job.folder}/{name}"))
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    return held


def test_no_memory_outlives_a_training_of_two_ranks(shards, tmp_path, cuda):
    """DistributedDataParallel and its hook are gone with it; what libraries keep for the next does not grow."""
    for one, another in run_ranks(held_after_trainings, 2, make_job(shards, tmp_path / "job"), device="cuda"):
        assert another <= one


def weights_after(worker, job):
    fit(worker, job)
    state = newest(job)
    return {name: np.asarray(tensor) for name, tensor in state["model"].items()}


def test_two_ranks_train_as_one(shards, tmp_path, device):
    """With statistics by lane, which are the same for any number of ranks."""
    options = {"epochs": 1, "tf32": False}
    one, two = (make_job(shards, tmp_path / name, {"norm_statistics": "lane"}, **options) for name in ("one", "two"))
    (alone_,) = run_ranks(weights_after, 1, one, device=device.type)
    for rank in run_ranks(weights_after, 2, two, device=device.type):
        for name, values in rank.items():
            np.testing.assert_allclose(values, alone_[name], rtol=2e-2, atol=5e-3, err_msg=name)
