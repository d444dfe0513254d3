"""A comparison by the network of each training that is best on validation: `compare.checkpoint`."""

import html
import shutil
from pathlib import Path

import mlflow
import pytest
from small_training import make_job, make_settings

from pipeline.config import SettingsError, load_settings
from pipeline.report.page import render
from pipeline.study import compare
from pipeline.study.arms import with_final_network
from pipeline.training import predictions

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
CHOSEN = "compare.checkpoint=best_on_validation"


def final(*overrides, metric="accuracy"):
    train = with_final_network(load_settings(QUICKSTART, overrides), metric).train
    return train.final_network, train.select_on


def test_the_setting_of_the_study_says_how_its_trainings_end():
    assert final() == ("last", "validation")
    assert final(CHOSEN) == ("lowest_loss", "validation")
    by_metric = (CHOSEN, "compare.search_metric=accuracy")
    assert final(*by_metric) == ("highest_accuracy", "validation")
    assert final(*by_metric, metric="balanced_accuracy") == ("highest_balanced_accuracy", "validation")


def test_how_trainings_end_can_be_what_is_compared():
    assert final("train.final_network=[last, lowest_loss]") == ("last", "validation")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.final_network=lowest_loss"], "train.final_network is lowest_loss, but compare.checkpoint is last"),
        ([CHOSEN, "train.final_network=[last, lowest_loss]"], "sets train.final_network, which the grid varies"),
        ([CHOSEN, "compare.search_on=test"], "compare.search_on and train.evaluate_on are both 'test'"),
    ],
)
def test_what_contradicts_it_is_an_error(overrides, message):
    with pytest.raises(SettingsError, match=message):
        final(*overrides)


@pytest.mark.spark
def test_runs_are_judged_by_the_network_that_was_best_on_validation(spark, dataset, empty_store, tmp_path):
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    # So large a rate that the validation loss goes up and down.
    job = make_job(dataset, "", epochs=3, evaluations_per_epoch=2, learning_rate=1.5, schedule="constant", seed=3)
    study = {"grid": {"model.norm": ["layer", "batch"], "train.learning_rate": [1.5]}, "seeds": [3],
             "checkpoint": "best_on_validation"}  # fmt: skip
    settings = make_settings(job, tmp_path / "runs", uri, "chosen", compare=study)
    comparison = compare(spark, settings)
    assert comparison.selected_on == "validation"
    client, chosen = mlflow.MlflowClient(uri), []
    for run in comparison.runs:
        losses = {metric.step: metric.value for metric in client.get_metric_history(run.run_id, "validation/loss")}
        assert len(losses) == len(run.curve) == 6
        best = min(losses, key=losses.__getitem__)
        point = next(point for point in run.curve if point.step == best)
        assert run.score == run.final_accuracy == point.accuracy
        assert run.selected_step == (best if best < run.steps else None)
        found = predictions.read(run.predictions)
        assert (found.prediction == found.label).mean() == pytest.approx(point.accuracy)
        chosen.append(run.selected_step)
    assert any(chosen), "nothing was chosen: take other seeds"
    page = html.unescape(render(comparison))
    assert "each run's chosen evaluation on the test split: that whose network was best on the validation split" in page
    assert "network of step" in page
