"""Every optimizer over several ranks: the same steps for any number of them, and the same bits after a restart."""

from dataclasses import replace

import pytest
import torch
from ranks import fit_until, run_ranks
from small_halves import write_halves
from small_training import equal, final_state, make_job

from pipeline.config.training import TrainSettings

OPTIMIZERS = {
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "schedule": "one_cycle"},
    "lars": {"optimizer": "lars", "learning_rate": 2.0, "trust_coefficient": 0.01, "clip_norm": 0.5},
    "lamb": {"optimizer": "lamb", "learning_rate": 0.01, "clip_adaptive": 0.05, "head_learning_rate": 0.03},
}
# One of them shows in seconds what all do.
SLOWLY = [pytest.param(name, marks=[] if name == "lamb" else pytest.mark.slow) for name in OPTIMIZERS]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_halves(tmp_path_factory.mktemp("halves") / "three")


def job_of(dataset, folder, name, norm="batch", **changes):
    job = make_job(dataset, folder, **{"epochs": 1, **OPTIMIZERS[name], **changes})
    return replace(job, model=job.model.model_copy(update={"norm": norm, "norm_groups": 2}))


@pytest.mark.parametrize("name", SLOWLY)
def test_a_restart_ends_with_the_same_bits(dataset, tmp_path, name):
    undisturbed, killed = (job_of(dataset, tmp_path / folder, name) for folder in ("undisturbed", "killed"))
    run_ranks(fit_until, 2, undisturbed, None)
    run_ranks(fit_until, 2, killed, 5)
    run_ranks(fit_until, 2, killed, None)
    assert equal(final_state(undisturbed), final_state(killed))


@pytest.mark.parametrize("name", SLOWLY)
def test_two_ranks_that_accumulate_take_the_steps_of_one(dataset, tmp_path, name):
    """Gradients are clipped once they are those of the global batch."""
    alone = job_of(dataset, tmp_path / "one", name, norm="group")
    two = job_of(dataset, tmp_path / "two", name, norm="group", accumulate=2)
    first, second = run_ranks(fit_until, 1, alone, None)[0], run_ranks(fit_until, 2, two, None)[0]
    assert first.curve[-1].loss == pytest.approx(second.curve[-1].loss, rel=1e-3)
    assert first.steps == second.steps > 5
    for weight, other in zip(*(final_state(job)["model"].values() for job in (alone, two)), strict=True):
        torch.testing.assert_close(weight, other, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_diverges_as_sgd_does(dataset, tmp_path, name):
    result = run_ranks(fit_until, 1, job_of(dataset, tmp_path / "good", name, epochs=4, bf16=True), None)[0]
    assert result.train_loss[-1] < 0.95 * result.train_loss[0]
    assert result.best_accuracy > 0.5  # of three classes
    unbounded = {"learning_rate": 1e30, "clip_adaptive": None, "clip_norm": None}
    diverged = run_ranks(fit_until, 1, job_of(dataset, tmp_path / "bad", name, **unbounded), None)[0]
    assert diverged.diverged


def test_defaults_are_those_of_the_papers():
    train = TrainSettings()
    assert (train.optimizer, train.beta2, train.optimizer_eps, train.trust_coefficient) == ("sgd", 0.999, None, 0.001)
