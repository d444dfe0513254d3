"""Batches in parts (``train.accumulate``): what they add up to, and which numbers of workers they go with."""

import pytest
import torch
from small_splits import write_easy_splits

from pipeline.config.model import ModelSettings
from pipeline.config.training import DiagnosticsSettings, TrainSettings
from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble
from pipeline.training.job import Job
from pipeline.training.loop import fit


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return write_easy_splits(str(tmp_path_factory.mktemp("data") / "small"))


def make_job(dataset, folder, model=None, **train) -> Job:
    given = {"epochs": 1, "batch_size": 16, "lanes": 4, "learning_rate": 0.05, **train}
    model = ModelSettings(**{"depth": 3, "width": 4, "norm": "group", "norm_groups": 2, **(model or {})})
    return Job(dataset, str(folder), model, TrainSettings(**given))


def gradients(job: Job) -> list[torch.Tensor]:
    with assemble(alone("cpu"), job) as training, training.loader.batches(0) as batches:
        training.step.gradients(next(batches), 0)
        return [parameter.grad.clone() for parameter in training.state.model.parameters()]


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_parts_of_any_size_add_up_to_the_batch(small, tmp_path, parts):
    """16 rows in 3 parts are 6, 6 and 4: a training that goes on with fewer workers may have such ones."""
    weights = {"class 0": 3.0}
    whole = gradients(make_job(small, tmp_path / "whole", class_weights=weights))
    found = gradients(make_job(small, tmp_path / "parts", class_weights=weights, accumulate=parts))
    for expected, gradient in zip(whole, found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_diagnostics_see_the_same_loss_in_parts_of_any_size(small, tmp_path):
    look, losses = DiagnosticsSettings(every_steps=1, smoothness=True), []
    for parts in (1, 3):
        job = make_job(small, tmp_path / str(parts), accumulate=parts, diagnostics=look)
        with assemble(alone("cpu"), job) as training, training.loader.batches(0) as batches:
            found = training.step.data.parts(next(batches), 0)
            losses.append(float(training.diagnostics._pass(found, with_gradient=False).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_more_parts_than_rows_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"train\.accumulate 64 is more than a worker's 16 images of a batch"):
        fit(alone("cpu"), make_job(small, tmp_path, accumulate=64))


def test_only_numbers_of_workers_whose_lanes_make_parts_are_allowed():
    train = TrainSettings(lanes=12, batch_size=48, accumulate=3)
    assert [count for count in range(1, 13) if train.allows(count, "rank")] == [1, 2, 3, 4, 6, 12]
    assert [count for count in range(1, 13) if train.allows(count, "lane")] == [1, 2, 4]


@pytest.mark.parametrize(("norm", "bound"), [("batch_renorm", "bounds"), ("power", None)])
def test_warm_up_of_norms_counts_optimizer_steps(small, tmp_path, norm, bound):
    """4 steps in 4 parts each are 16 passes, and a warm-up of 4 steps has just ended."""
    job = make_job(small, tmp_path, {"norm": norm, "norm_warmup_steps": 4}, accumulate=4)
    with assemble(alone("cpu"), job) as training, training.loader.batches(0) as batches:
        norms = [module for module in training.state.model.modules() if hasattr(module, "warmup_steps")]
        for _ in range(4):
            assert all(norm.steps < norm.warmup_steps * norm.passes_per_step for norm in norms)
            assert bound is None or all(float(layer.bounds()[1]) == 0 for layer in norms)
            training.step.take(batches)
        assert norms
        assert all(norm.steps == norm.warmup_steps * norm.passes_per_step for norm in norms)
