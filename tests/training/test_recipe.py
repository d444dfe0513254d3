"""Settings of how to train that change results only as much as they say: averages of weights, compilation, layouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import fit_until, run_ranks

from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.distributed.worker import alone
from pipeline.training import checkpoint
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit
from pipeline.training.weight_average import WeightAverage

pytestmark = pytest.mark.long


def make_job(dataset, folder, model=None, **changes):
    settings = {"epochs": 2, "batch_size": 32, "lanes": 4, "learning_rate": 0.05}
    model = {"depth": 3, "width": 8, "norm": "batch", **(model or {})}
    return Job(dataset, str(folder), ModelSettings(**model), TrainSettings(**{**settings, **changes}))


class Enough(Exception):  # noqa: N818 - not an error
    pass


def losses(worker, job):
    """Of the first 20 steps."""
    losses = []

    def note(moment):
        if moment.name == "after_step":
            losses.append(moment.loss)
        if len(losses) == 20:
            raise Enough

    with pytest.raises(Enough):
        fit(worker, replace(job, hook=note))
    return losses


def test_an_average_of_weights_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, decay=0.9)
    expected = 0.0
    for step in range(1, 200):
        model.weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.state()["weight"].item() == pytest.approx(expected, rel=1e-5)
    with average.in_place_of_weights():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 199
    assert average.state()["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_the_average_is_evaluated_and_saved_and_training_goes_on_with_the_weights(dataset, tmp_path):
    plain, averaged = (
        make_job(dataset, tmp_path / name, weight_ema=decay) for name, decay in (("plain", None), ("averaged", 0.8))
    )
    fit(alone("cpu"), plain)
    result = fit(alone("cpu"), averaged)
    one, two = (
        checkpoint.load_newest(f"{job.folder}/checkpoints", identity=identity(job), device=torch.device("cpu"))
        for job in (plain, averaged)
    )
    assert all(torch.equal(one["model"][name], weight) for name, weight in two["weights"].items())
    assert not any(torch.equal(two["model"][name], weight) for name, weight in two["weights"].items())
    assert result.best_accuracy > 0.8


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_an_average_that_dies_ends_with_the_same_bits(dataset, tmp_path, world_size):
    undisturbed, killed = (make_job(dataset, tmp_path / name, weight_ema=0.8) for name in ("undisturbed", "killed"))
    run_ranks(fit, world_size, undisturbed)
    run_ranks(fit_until, world_size, killed, 30)
    run_ranks(fit, world_size, killed)
    one, two = (
        checkpoint.load_newest(f"{job.folder}/checkpoints", identity=identity(job), device=torch.device("cpu"))
        for job in (undisturbed, killed)
    )
    for part in ("model", "weights"):
        assert all(torch.equal(two[part][name], value) for name, value in one[part].items())


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"channels_last": False}, 1e-3), ({"compile": True}, 1e-3), ({"bf16": True}, 0.05)],
)
def test_how_it_is_computed_changes_losses_only_within_tolerance(dataset, tmp_path, changes, tolerance):
    """Relative, over 20 steps of training, in which differences grow."""
    expected = losses(alone("cpu"), make_job(dataset, tmp_path / "plain"))
    found = losses(alone("cpu"), make_job(dataset, tmp_path / "other", **changes))
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_two_compiled_ranks(dataset, tmp_path):
    """As many images for each rank as for the one above: the ranks find its compiled code in torch's cache."""
    expected = run_ranks(losses, 2, make_job(dataset, tmp_path / "plain", batch_size=64))[0]
    found = run_ranks(losses, 2, make_job(dataset, tmp_path / "compiled", batch_size=64, compile=True))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_missing_compiler_is_named(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"train.compile needs a C\+\+ compiler on every worker: install g\+\+"):
        fit(alone("cpu"), make_job(dataset, tmp_path, compile=True))
