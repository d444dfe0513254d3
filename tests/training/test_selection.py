"""The network that a training ends with: the best on another split than the one that judges."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from last_network import evaluated_directly, weights_after
from ranks import Killed, run_ranks

from pipeline.config.augment import AugmentSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.data.manifest import DatasetError
from pipeline.distributed.worker import alone
from pipeline.telemetry.events import EventReader, metric_values
from pipeline.training import predictions
from pipeline.training.job import Job
from pipeline.training.loop import fit

CHOICES = [("lowest_loss", "loss", min), ("highest_accuracy", "accuracy", max),
           ("highest_balanced_accuracy", "balanced_accuracy", max)]  # fmt: skip
FINAL = {"selected_step", "final_accuracy", "final_loss", "final_balanced_accuracy", "final_macro_f1",
         "final_calibration_error", "recall", "curve", "steps"}  # fmt: skip


def make_job(dataset, folder, norm="batch", **changes):
    # So large a rate that the validation loss goes up and down.
    train = {"epochs": 3, "batch_size": 32, "lanes": 4, "learning_rate": 1.5, "schedule": "constant", "seed": 3,
             "evaluations_per_epoch": 2, "augment": AugmentSettings(flip=True, shift=1), **changes}  # fmt: skip
    model = ModelSettings(depth=3, width=4, norm=norm, norm_groups=2)
    return Job(dataset, str(folder), model, TrainSettings(**train), checkpoint=CheckpointSettings(every_steps=5))


def on_validation(job):
    """The scores on the split that chooses, as the events tell them, by step."""
    events = EventReader(f"{job.folder}/events").new()
    return {event["step"]: event["selection"] for event in events if event["kind"] == "evaluation"}


@pytest.mark.parametrize(("choice", "score", "best_of"), CHOICES)
def test_it_ends_with_the_evaluation_that_is_best_on_validation(dataset, tmp_path, choice, score, best_of):
    for seed in range(3, 13):  # which evaluation is best hangs on how a machine rounds
        job = make_job(dataset, tmp_path / f"chosen-{seed}", final_network=choice, seed=seed)
        result = fit(alone("cpu"), job)
        scores = {step: scores[score] for step, scores in on_validation(job).items()}
        best = best_of(scores, key=scores.get)  # of equals the first
        assert result.selected_step == best or best == result.steps
        if best < result.steps:
            break
    assert result.selected_step == best < result.steps
    expected = fit(alone("cpu"), make_job(dataset, tmp_path / "last", seed=seed))
    assert result.curve == expected.curve  # to look at another split changes no training
    point = next(point for point in result.curve if point.step == best)
    assert (result.final_accuracy, result.final_loss) == (point.accuracy, point.loss)
    assert (result.final_balanced_accuracy, result.final_macro_f1) == (point.balanced_accuracy, point.macro_f1)
    assert expected.selected_step is None
    found = predictions.read(result.predictions)
    assert (found.prediction == found.label).mean() == pytest.approx(point.accuracy)
    direct = evaluated_directly(job)  # the checkpoint holds the same network
    np.testing.assert_allclose(found.loss, direct.loss, rtol=1e-3, atol=1e-4)


def test_scores_on_validation_are_metrics_beside_those_of_the_test_split(dataset, tmp_path):
    job = make_job(dataset, tmp_path, final_network="lowest_loss")
    result = fit(alone("cpu"), job)
    event = next(event for event in EventReader(f"{job.folder}/events").new() if event["kind"] == "evaluation")
    values = metric_values(event)
    assert values["test/accuracy"] == result.curve[0].accuracy
    assert values["validation/loss"] == event["selection"]["loss"] != values["test/loss"]
    check = fit(alone("cpu"), make_job(dataset, tmp_path / "check", evaluate_on="validation"))
    assert [scores["loss"] for scores in on_validation(job).values()] == [point.loss for point in check.curve]


def die(moment, *, at):
    if moment.name == "checkpoint_begun":
        moment.wait_until_written()
    if (moment.name, moment.step) == at:
        raise Killed


@pytest.mark.parametrize("moment", ["before_data", "after_evaluation"])
@pytest.mark.parametrize("changes", [{}, {"weight_ema": 0.9}])
def test_a_training_that_was_killed_ends_with_the_same_network(dataset, tmp_path, moment, changes):
    changes = {"final_network": "lowest_loss", **changes}
    undisturbed, killed = (make_job(dataset, tmp_path / name, **changes) for name in ("undisturbed", "killed"))
    expected = fit(alone("cpu"), undisturbed)
    step = expected.steps - 1 if moment == "before_data" else expected.steps
    with pytest.raises(Killed):
        fit(alone("cpu"), replace(killed, hook=partial(die, at=(moment, step))))
    result = fit(alone("cpu"), killed)
    assert result.selected_step == expected.selected_step
    assert result.model_dump(include=FINAL) == expected.model_dump(include=FINAL)
    for name, weight in weights_after(undisturbed).items():
        assert torch.equal(weights_after(killed)[name], weight), name
    path = Path(killed.folder, predictions.FILE)
    assert path.read_bytes() == Path(undisturbed.folder, predictions.FILE).read_bytes()
    path.unlink()
    assert fit(alone("cpu"), killed).model_dump(include=FINAL) == expected.model_dump(include=FINAL)
    assert path.read_bytes() == Path(undisturbed.folder, predictions.FILE).read_bytes()


def test_two_ranks_choose_alike(dataset, tmp_path):
    job = make_job(dataset, tmp_path, "group", final_network="lowest_loss")
    results = run_ranks(fit, 2, job)
    scores = {step: scores["loss"] for step, scores in on_validation(job).items()}
    assert {result.selected_step or result.steps for result in results} == {min(scores, key=scores.get)}
    assert results[0].final_accuracy == results[1].final_accuracy
    found = predictions.read(results[0].predictions)
    assert (found.prediction == found.label).mean() == pytest.approx(results[0].final_accuracy)


def test_a_training_that_diverges_ends_with_what_it_had_last(dataset, tmp_path):
    result = fit(alone("cpu"), make_job(dataset, tmp_path, "none", learning_rate=1e4, final_network="lowest_loss"))
    assert result.diverged
    assert result.selected_step is None
    assert result.final_accuracy == result.curve[-1].accuracy


def test_the_split_that_judges_does_not_choose(dataset, tmp_path):
    with pytest.raises(ValueError, match="select_on and evaluate_on are both 'test'"):
        make_job(dataset, tmp_path, final_network="lowest_loss", select_on="test")
    with pytest.raises(DatasetError, match="holdout"):
        fit(alone("cpu"), make_job(dataset, tmp_path, final_network="lowest_loss", select_on="holdout"))
