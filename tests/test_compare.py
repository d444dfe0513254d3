"""`make run` in a shortened form: real images, a real Spark stage of two workers, a real MLflow store."""

import json
import math
import re
import sqlite3
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import RunStatus

from pipeline import __main__ as commands
from pipeline import barrier
from pipeline.compare import compare, summarize

pytestmark = pytest.mark.spark

REPOSITORY = Path(__file__).parents[1]
RESULT_KEYS = {
    "norm", "seed", "learning_rate", "best_accuracy", "final_accuracy", "steps", "steps_to_baseline_best",
    "images_per_second", "diverged",
}  # fmt: skip


@pytest.fixture(scope="module")
def study(spark, fashion_mnist_part, tmp_path_factory):
    """The shipped settings on 6,000 real images, ingested and compared by the commands themselves."""
    root = tmp_path_factory.mktemp("study")
    classes = "[shirt, trouser, pullover, dress, coat, sandal, blouse, sneaker, bag, boot]"
    overrides = [
        f"output={root}/runs",
        f"dataset.path={root}/data",
        "dataset.source.kind=idx",
        f"dataset.source.path={fashion_mnist_part}",
        f"dataset.source.classes={classes}",
        "train.epochs=2",
        "dataset.row_group_rows=250",
        "train.batch_size=64",
        "compare.learning_rates=[0.02, 0.1]",
        "compare.norms=[none, batch]",
        f"tracking.uri=sqlite:///{root}/runs/mlflow.db",
        f"tracking.artifacts={root}/runs/mlartifacts",
    ]
    options = [
        "-c",
        str(REPOSITORY / "conf" / "quickstart.yaml"),
        *(part for text in overrides for part in ("-o", text)),
    ]
    commands.app(["ingest", *options], standalone_mode=False)
    commands.app(["compare", *options], standalone_mode=False)
    return root / "runs"


@pytest.fixture(scope="module")
def comparison(study):
    return json.loads((study / "comparison.json").read_text())


def test_every_arm_and_seed_has_its_result(comparison):
    assert [(arm["norm"], arm["seed"]) for arm in comparison["arms"]] == [
        ("none", 0), ("batch", 0), ("none", 1), ("batch", 1),
    ]  # fmt: skip
    for arm in comparison["arms"]:
        assert arm.keys() >= RESULT_KEYS
        assert 0.5 < arm["final_accuracy"] <= arm["best_accuracy"] < 1
        assert arm["steps"] == arm["curve"][-1]["step"]
        assert arm["images_per_second"] > 0
        assert arm["diverged"] is False


def test_each_arm_has_the_learning_rate_that_was_best_on_validation(comparison):
    assert len(comparison["search"]) == 4
    for norm in ("none", "batch"):
        trials = [trial for trial in comparison["search"] if trial["norm"] == norm]
        best = max(trials, key=lambda trial: trial["best_accuracy"])
        assert {a["learning_rate"] for a in comparison["arms"] if a["norm"] == norm} == {best["learning_rate"]}


def test_steps_to_the_baselines_best_follow_from_the_curves(comparison):
    best = {arm["seed"]: arm["best_accuracy"] for arm in comparison["arms"] if arm["norm"] == "none"}
    for arm in comparison["arms"]:
        reached = [point["step"] for point in arm["curve"] if point["accuracy"] >= best[arm["seed"]]]
        assert arm["steps_to_baseline_best"] == (reached[0] if reached else None)
    assert all(arm["steps_to_baseline_best"] for arm in comparison["arms"] if arm["norm"] == "none")


def test_summary_is_the_mean_and_deviation_of_the_runs(comparison):
    for summary in comparison["summary"]:
        accuracies = [a["best_accuracy"] for a in comparison["arms"] if a["norm"] == summary["norm"]]
        assert summary["n"] == 2
        assert math.isclose(summary["best_accuracy_mean"], np.mean(accuracies))
        assert math.isclose(summary["best_accuracy_std"], np.std(accuracies, ddof=1), abs_tol=1e-12)


def test_the_report_stands_alone_and_shows_the_numbers(study, comparison):
    page = (study / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import', page)
    assert page.count("<svg") == 4
    for arm in comparison["arms"]:
        assert f"{100 * arm['best_accuracy']:.2f}%" in page
    assert "prefers-color-scheme: dark" in page
    assert "NaN" not in page


@pytest.fixture(scope="module")
def client(study):
    return mlflow.MlflowClient(f"sqlite:///{study}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client):
    experiment = client.get_experiment_by_name("sparknorm")
    return {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}


def test_one_parent_and_a_child_for_each_trial(comparison, runs):
    parent = runs[comparison["mlflow"]["parent_run_id"]]
    children = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 8 == len(runs) - 1
    assert {run.info.status for run in runs.values()} == {RunStatus.to_string(RunStatus.FINISHED)}
    assert sorted(run.data.tags["kind"] for run in children) == ["arm"] * 4 + ["search"] * 4


def test_mlflow_has_the_numbers_of_the_comparison(comparison, runs, client):
    for arm in comparison["arms"]:
        run = runs[arm["run_id"]]
        assert run.data.params["model.norm"] == arm["norm"]
        assert float(run.data.params["train.learning_rate"]) == arm["learning_rate"]
        assert run.data.metrics["best_accuracy"] == arm["best_accuracy"]
        history = client.get_metric_history(arm["run_id"], "test/accuracy")
        assert [(m.step, m.value) for m in history] == [(p["step"], p["accuracy"]) for p in arm["curve"]]
        losses = client.get_metric_history(arm["run_id"], "train/loss")
        assert [m.step for m in losses] == list(range(1, arm["steps"] + 1))
        assert run.inputs.dataset_inputs[0].dataset.name == "fashion_mnist"
        assert run.data.tags["dataset_digest"] == comparison["dataset"]["digest"]


def test_report_and_comparison_are_artifacts_of_the_parent(comparison, client):
    found = {file.path for file in client.list_artifacts(comparison["mlflow"]["parent_run_id"])}
    assert {"report.html", "comparison.json"} <= found


def test_the_logged_model_predicts_what_was_measured(comparison, study, fashion_mnist_part):
    """Loaded through MLflow, the model scores the test images as the evaluation did."""
    import gzip

    arm = next(a for a in comparison["arms"] if a["norm"] == "batch")
    mlflow.set_tracking_uri(f"sqlite:///{study}/mlflow.db")
    (logged,) = mlflow.search_logged_models(
        experiment_ids=[mlflow.get_experiment_by_name("sparknorm").experiment_id],
        filter_string=f"source_run_id='{arm['run_id']}'",
        output_format="list",
    )
    model = mlflow.pyfunc.load_model(logged.model_uri)
    assert model.metadata.signature.inputs.inputs[0].type == np.dtype("uint8")
    assert model.input_example is not None
    images = np.frombuffer(
        gzip.decompress((fashion_mnist_part / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    labels = np.frombuffer(
        gzip.decompress((fashion_mnist_part / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8
    )
    logits = model.predict(images.reshape(-1, 1, 28, 28))
    assert logits.shape == (1000, 10)
    assert np.mean(logits.argmax(1) == labels) == pytest.approx(arm["final_accuracy"], abs=0.0021)


def test_a_study_that_fails_leaves_no_result_and_a_failed_run(spark, settings, tmp_path, monkeypatch):

    output = Path(settings.output)
    output.mkdir(parents=True)
    (output / "comparison.json").write_text("{}")
    (output / "report.html").write_text("of the study before")
    collect = barrier.run

    def fail_later(*args, **kwargs):
        if list((output / "trials").glob("*/checkpoints")):  # the first trial is done
            raise barrier.LaunchError("executors were lost")
        return collect(*args, **kwargs)

    monkeypatch.setattr(barrier, "run", fail_later)
    with pytest.raises(barrier.LaunchError, match="executors were lost"):
        compare(spark, settings)
    assert not (output / "comparison.json").exists()
    assert not (output / "report.html").exists()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        states = [state for (state,) in store.execute("SELECT status FROM runs")]
        reasons = [value for (value,) in store.execute("SELECT value FROM tags WHERE key = 'failure'")]
    assert sorted(states) == ["FAILED", "FAILED", "FINISHED"]  # the parent, the second trial; the first trial
    assert reasons == ["LaunchError: executors were lost"] * 2


def test_a_learning_rate_is_not_chosen_on_the_split_that_judges_it(spark, settings, tmp_path):
    options = settings.compare.model_copy(update={"learning_rates": (0.1, 0.2), "search_on": "test"})
    with pytest.raises(ValueError, match=r"search_on and train\.evaluate_on are both 'test'.*use `validation`"):
        compare(spark, settings.model_copy(update={"compare": options}))
    assert not (tmp_path / "mlflow.db").exists()


def arm(norm, seed, accuracies, diverged=False):
    curve = [{"step": 10 * (n + 1), "epoch": n + 1, "accuracy": a, "loss": 1.0} for n, a in enumerate(accuracies)]
    return {
        "norm": norm, "seed": seed, "learning_rate": 0.1, "best_accuracy": max(accuracies),
        "final_accuracy": accuracies[-1], "steps": 10 * len(accuracies), "images_per_second": 100.0,
        "diverged": diverged, "curve": curve, "train_loss": [1.0] * len(curve),
    }  # fmt: skip


def test_an_arm_that_diverged_or_never_arrived_is_shown_as_such(settings):
    from pipeline.report import render, verdict

    arms = [
        arm("none", 0, [0.5, 0.6, 0.7]), arm("batch", 0, [0.6, 0.75, 0.8]),
        arm("none", 1, [0.5, 0.6, 0.6]), arm("batch", 1, [0.1], diverged=True),
    ]  # fmt: skip
    result = summarize(settings, arms, search=[])
    result["mlflow"] = {"parent_run_id": "0", "experiment": "x"}
    none, batch = result["summary"]
    assert none["steps_to_baseline_best_mean"] == 25  # 30 and 20: each against its own seed's best
    assert (batch["diverged"], batch["reached_baseline_best"], batch["steps_to_baseline_best_mean"]) == (1, 1, 20)
    assert any("Batch norm diverged in 1 of 2 runs" in line for line in verdict(result))
    page = render(result)
    assert "20 (1 of 2)" in page
    json.dumps(result, allow_nan=False)
