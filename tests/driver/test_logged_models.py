"""What was evaluated within a training, as models of MLflow: step, metrics, dataset, and which was the best."""

import mlflow
import numpy as np
import pytest
import torch

from pipeline.config.settings import Settings
from pipeline.data import load_manifest
from pipeline.driver import train

pytestmark = pytest.mark.spark


def with_models(settings: Settings, which: str) -> Settings:
    tree = settings.model_dump()
    tree["tracking"] |= {"log_models": which, "system_metrics": False}
    tree["train"] |= {"evaluations_per_epoch": 2}
    return Settings.model_validate(tree)


def models_of(run_id: str) -> dict[int, mlflow.entities.LoggedModel]:
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    steps = {output.model_id: output.step for output in client.get_run(run_id).outputs.model_outputs}
    by_step = {steps[model.model_id]: client.get_logged_model(model.model_id) for model in found}
    assert len(by_step) == len(found)
    assert all(int(model.tags["sparknorm.step"]) == step for step, model in by_step.items())
    return by_step


def test_every_evaluated_state_is_a_model_of_its_step(spark, settings):
    result = train(spark, with_models(settings, "evaluated"))
    found = models_of(result.run_id)
    assert sorted(found) == [point.step for point in result.curve]
    assert len(found) == 4
    manifest = load_manifest(settings.dataset.path)
    for point in result.curve:
        # MLflow itself also links the run's own metrics of that step to a model that has weights.
        metrics = {metric.key: metric for metric in found[point.step].metrics if metric.key.startswith("model/")}
        assert metrics["model/accuracy"].value == pytest.approx(point.accuracy)
        assert metrics["model/loss"].value == pytest.approx(point.loss)
        assert {metric.dataset_name for metric in metrics.values()} == {manifest.name}
        digests = {metric.dataset_digest for metric in metrics.values()}
        assert digests == {manifest.digest.removeprefix("sha256:")[:36]}
    best = max(result.curve, key=lambda point: (point.accuracy, -point.step))
    assert [step for step, model in found.items() if model.tags.get("sparknorm.best")] == [best.step]
    # The weights of the last are in MLflow, those of the others in checkpoints at most.
    last = result.curve[-1].step
    assert [step for step, model in found.items() if model.name == "model"] == [last]
    network = mlflow.pytorch.load_model(f"models:/{found[last].model_id}")
    with torch.inference_mode():
        assert network(torch.from_numpy(np.zeros((2, 1, 12, 12), np.uint8))).shape == (2, 3)


def test_no_model_or_the_final_one_alone(spark, settings):
    result = train(spark, with_models(settings, "none"))
    client = mlflow.MlflowClient()
    assert not client.get_run(result.run_id).outputs.model_outputs
    result = train(spark, with_models(settings, "final"))
    (step,) = models_of(result.run_id)
    assert step == result.steps
