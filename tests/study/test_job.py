"""`make run` in a shortened form: real images, a real Spark stage of two workers, a real MLflow store."""

import csv
import json
import math
import re
import sqlite3
import statistics
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import RunStatus
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from pipeline import __main__ as commands
from pipeline.cluster import barrier
from pipeline.cluster.errors import LaunchError
from pipeline.config.study import CompareSettings
from pipeline.report.comparison import ArmSummary, Comparison
from pipeline.study import compare
from pipeline.study.summary import metrics_of
from pipeline.training import predictions

pytestmark = [pytest.mark.spark, pytest.mark.long]

REPOSITORY = Path(__file__).parents[2]
RUN_KEYS = {
    "arm", "values", "tuned", "learning_rate", "global_batch", "seed", "best_accuracy", "final_accuracy", "steps",
    "target", "steps_to_target", "images_to_target", "seconds_to_target", "images_per_second", "diverged", "run_id",
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
        "compare.seeds=[0, 1]",
        "dataset.row_group_rows=250",
        "train.batch_size=64",
        "train.learning_rate=[0.02, 0.1]",
        "model.norm=[none, batch]",
        "train.diagnostics.every_steps=40",
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
    """As the file has it: what a user's own program reads."""
    return json.loads((study / "comparison.json").read_text())


def test_the_file_is_what_its_types_say(study, comparison):
    read = Comparison.model_validate_json((study / "comparison.json").read_text())
    assert read.model_dump(mode="json", exclude_unset=True) == comparison


def test_every_arm_and_seed_has_its_run(comparison):
    assert [(run["arm"], run["seed"]) for run in comparison["runs"]] == [
        ("none", 0), ("batch", 0), ("none", 1), ("batch", 1),
    ]  # fmt: skip
    for run in comparison["runs"]:
        assert run.keys() >= RUN_KEYS
        assert run["values"] == {"model.norm": run["arm"]}
        assert 0.5 < run["final_accuracy"] <= run["best_accuracy"] < 1
        assert run["steps"] == run["curve"][-1]["step"]
        assert run["images_per_second"] > 0
        assert run["diverged"] is False
        seconds = run["train_seconds"]
        assert len(seconds) == len(run["curve"])
        assert 0 < seconds[0] < seconds[-1]
        # Convolutions, norms and the last layer, in the network's order; looks at steps 1, 41, ...
        assert len(run["gradient_norms"]) >= 4
        assert all(layer["first"] > 0 and layer["median"] > 0 for layer in run["gradient_norms"])


def test_each_arm_has_the_learning_rate_that_was_best_on_validation(comparison, client):
    first = [trial for trial in comparison["search"] if trial["seed"] == 1000]
    assert sum(trial["learning_rate"] in (0.02, 0.1) for trial in first) == 4
    for arm in comparison["arms"]:
        trials = {t["learning_rate"]: t for t in comparison["search"] if (t["arm"], t["seed"]) == (arm["arm"], 1000)}
        tied = [values["train.learning_rate"] for values in arm["search_tied"]]
        chosen = {run["learning_rate"] for run in comparison["runs"] if run["arm"] == arm["arm"]}
        assert chosen == {arm["tuned"]["train.learning_rate"]}
        assert trials[min(chosen)]["learned"]
        if tied:
            assert chosen <= set(tied)
            assert arm["search_undecided"] == "tied"
            assert any(
                line.get("grade") == "search undecided" and line.get("arm") == arm["arm"]
                for line in comparison["verdict"]
            )
        else:  # none that came as far, with as many seeds, was better in the mean
            losses: dict[float, list[float]] = {}
            rungs = trials[min(chosen)]["rungs"]
            for trial in comparison["search"]:
                if trial["arm"] == arm["arm"] and trial["rungs"] == rungs:
                    history = client.get_metric_history(trial["run_id"], "validation/loss")
                    losses.setdefault(trial["learning_rate"], []).append(history[-1].value)
            most = {rate: np.mean(values) for rate, values in losses.items() if len(values) == arm["search_seeds"]}
            assert chosen == {min(most, key=most.__getitem__)}


def test_the_search_is_within_its_budget_and_says_what_it_cost(comparison, study):
    """A share of 2 seeds x 2 epochs x 84 steps for each arm."""
    for arm in comparison["arms"]:
        steps = sum(trial["steps"] for trial in comparison["search"] if trial["arm"] == arm["arm"])
        assert arm["search_cost"] == steps / (2 * 2 * comparison["runs"][0]["steps"] / 2)
        assert arm["search_cost"] <= 0.5
    assert comparison["search_cost"] == pytest.approx(np.mean([arm["search_cost"] for arm in comparison["arms"]]))
    assert f"The search trained {100 * comparison['search_cost']:.0f}% as many" in (study / "report.html").read_text()


def test_each_trial_of_the_search_is_one_mlflow_run_over_its_rungs(comparison, client):
    """Cycles of 13 and 26 steps, the first a 13th of the half of 2 x 2 epochs of 85 steps: every step once, an
    evaluation at the end of each rung, one file of predictions."""
    assert {trial["steps"] for trial in comparison["search"]} <= {13 * (2**rungs - 1) for rungs in (1, 2)}
    for trial in comparison["search"]:
        losses = client.get_metric_history(trial["run_id"], "train/loss")
        assert [metric.step for metric in losses] == list(range(1, trial["steps"] + 1))
        evaluated = [metric.step for metric in client.get_metric_history(trial["run_id"], "validation/accuracy")]
        assert [13 * (2**rung - 1) for rung in range(1, trial["rungs"] + 1)] == evaluated
        assert trial["attempts"] == trial["rungs"]


def test_targets_follow_from_the_curves(comparison):
    last = {run["seed"]: run["final_accuracy"] for run in comparison["runs"] if run["arm"] == "none"}
    for run in comparison["runs"]:
        reached = [point["step"] for point in run["curve"] if point["accuracy"] >= last[run["seed"]]]
        assert run["steps_to_target"] == (reached[0] if reached else None)
        assert run["images_to_target"] == (64 * reached[0] if reached else None)
    assert all(run["steps_to_target"] for run in comparison["runs"] if run["arm"] == "none")


def test_arms_are_mean_deviation_and_paired_difference_of_their_runs(comparison):
    accuracies = {
        arm["arm"]: [run["final_accuracy"] for run in comparison["runs"] if run["arm"] == arm["arm"]]
        for arm in comparison["arms"]
    }
    for arm in comparison["arms"]:
        assert arm["n"] == 2
        assert math.isclose(arm["score_mean"], np.mean(accuracies[arm["arm"]]))
        assert math.isclose(arm["score_std"], np.std(accuracies[arm["arm"]], ddof=1), abs_tol=1e-12)
    differences = np.subtract(accuracies["batch"], accuracies["none"])
    found = comparison["arms"][1]["difference"]
    half = 12.706204736 * np.std(differences, ddof=1) / math.sqrt(2)  # Student's t for one degree of freedom
    assert found["mean"] == pytest.approx(differences.mean(), abs=1e-12)
    ends = (differences.mean() - half, differences.mean() + half)
    assert (found["seeds_low"], found["seeds_high"]) == pytest.approx(ends)


def test_intervals_cover_the_test_images_of_the_predictions(comparison):
    found = comparison["arms"][1]["difference"]
    right = {}
    for run in comparison["runs"]:
        scores = predictions.read(run["predictions"])
        right[run["arm"], run["seed"]] = scores.prediction == scores.label
        assert right[run["arm"], run["seed"]].mean() == pytest.approx(run["final_accuracy"])
    differences = np.array([right["batch", seed].astype(int) - right["none", seed] for seed in (0, 1)])
    images = differences.shape[1]
    # And one image more than was seen to differ.
    half = 1.959964 * np.sqrt(max(0, np.cov(differences)[0, 1]) / images + 1 / images**2)
    assert found["covers"] == "seeds and images"
    assert (found["images_low"], found["images_high"]) == pytest.approx((found["mean"] - half, found["mean"] + half))
    assert found["low"] <= found["seeds_low"] < found["seeds_high"] <= found["high"]
    ahead, behind = (int(np.sum(differences[0] == sign)) for sign in (1, -1))
    tail = sum(math.comb(ahead + behind, k) for k in range(min(ahead, behind) + 1)) / 2 ** (ahead + behind)
    assert found["mcnemar_p"] == pytest.approx(min(1, 2 * tail))


def test_the_verdict_rests_on_the_metric_that_the_classes_ask_for(comparison):
    assert comparison["metric"] == "accuracy"  # ten classes of one size
    assert {"verdict-best", "verdict-difference-1"} <= {line["id"] for line in comparison["verdict"]}
    (line,) = [line for line in comparison["verdict"] if line["id"] == "verdict-difference-1"]
    assert line["grade"] == comparison["arms"][1]["grade"]
    assert line["evidence"]["/arms/1/difference/low"] == comparison["arms"][1]["difference"]["low"]


def test_scores_are_those_of_the_predictions_that_were_kept(comparison):
    for arm in comparison["arms"]:
        runs = [run for run in comparison["runs"] if run["arm"] == arm["arm"]]
        matrix = np.zeros((10, 10), int)
        for run in runs:
            found = predictions.read(run["predictions"])
            matrix += confusion_matrix(found.label, found.prediction)
            assert len(found) == 1000
            assert run["final_accuracy"] == np.mean(found.label == found.prediction)
            assert run["final_balanced_accuracy"] == pytest.approx(
                balanced_accuracy_score(found.label, found.prediction)
            )
            assert run["final_loss"] == pytest.approx(found.loss.mean(dtype=float), rel=1e-6)
        assert arm["confusion"] == matrix.tolist()
        for score in ("balanced_accuracy", "macro_f1", "loss", "calibration_error"):
            values = [run[f"final_{score}"] for run in runs]
            assert math.isclose(arm[f"final_{score}_mean"], np.mean(values))
            assert math.isclose(arm[f"final_{score}_std"], np.std(values, ddof=1), abs_tol=1e-12)


def test_page_json_and_mlflow_have_the_same_numbers(study, comparison, runs):
    page = (study / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import', page)
    cells = {
        (arm, key): value
        for arm, key, value in re.findall(r'data-arm="([^"]*)" data-key="([^"]*)" data-value="([^"]*)"', page)
    }
    metrics = runs[comparison["mlflow"]["parent_run_id"]].data.metrics
    assert len(cells) >= 10
    for arm in comparison["arms"]:
        for key in ("best_accuracy_mean", "best_accuracy_std", "final_accuracy_mean", "images_per_second_mean"):
            assert float(cells[arm["arm"], key]) == arm[key] == metrics[f"{arm['arm']}/{key}"]
        logged = metrics_of([ArmSummary.model_validate(arm)])
        assert {name: metrics[name] for name in logged} == logged
    for run in comparison["runs"]:
        assert f'data-run="{run["run_id"]}"' in page
        assert f"{100 * run['best_accuracy']:.2f}%" in page


def test_every_figure_is_a_picture_and_a_table(study, comparison, client):
    names = {"learning_curves", "training_loss", "learning_rates", "gradient_norms", "steps_to_target", "cost",
             "confusion_1_none", "confusion_2_batch"}  # fmt: skip
    there = {path.name for path in (study / "report").iterdir()}
    assert there == {f"{name}.{kind}" for name in names for kind in ("png", "csv")}
    logged = {file.path for file in client.list_artifacts(comparison["mlflow"]["parent_run_id"], "report")}
    assert logged == {f"report/{name}" for name in there}
    rates = {(trial["arm"], trial["learning_rate"]) for trial in comparison["search"]}  # over their seeds
    with (study / "report" / "learning_rates.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rates)


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
    assert len(children) == 4 + len(comparison["search"]) == len(runs) - 1
    assert {run.info.status for run in runs.values()} == {RunStatus.to_string(RunStatus.FINISHED)}
    assert parent.data.params["model.norm"] == "none, batch"
    assert (parent.data.params["train.learning_rate"], parent.data.params["train.seed"]) == ("0.02, 0.1", "0, 1")
    assert sorted(run.data.tags["kind"] for run in children) == ["arm"] * 4 + ["search"] * len(comparison["search"])


def test_mlflow_has_the_numbers_of_every_run(comparison, runs, client):
    for result in comparison["runs"]:
        run = runs[result["run_id"]]
        assert run.data.params["model.norm"] == run.data.tags["norm"] == run.data.tags["arm"] == result["arm"]
        assert float(run.data.params["train.learning_rate"]) == result["learning_rate"]
        assert run.data.metrics["best_accuracy"] == result["best_accuracy"]
        history = client.get_metric_history(result["run_id"], "test/accuracy")
        assert [(m.step, m.value) for m in history] == [(p["step"], p["accuracy"]) for p in result["curve"]]
        for score in ("loss", "balanced_accuracy", "macro_f1", "calibration_error"):
            history = client.get_metric_history(result["run_id"], f"test/{score}")
            assert [m.value for m in history] == [point[score] for point in result["curve"]]
            assert run.data.metrics[f"final_{score}"] == result[f"final_{score}"] == result["curve"][-1][score]
        recall = {name: value for name, value in run.data.metrics.items() if name.startswith("recall/")}
        assert list(recall.values()) == result["recall"]
        assert list(recall)[:2] == ["recall/00 shirt", "recall/01 trouser"]
        losses = client.get_metric_history(result["run_id"], "train/loss")
        assert [m.step for m in losses] == list(range(1, result["steps"] + 1))
        assert run.inputs.dataset_inputs[0].dataset.name == "fashion_mnist"
        assert run.data.tags["dataset_digest"] == comparison["dataset"]["digest"]


def test_mlflow_has_what_diagnostics_saw(comparison, client):
    for result in comparison["runs"]:
        for layer in result["gradient_norms"]:
            history = client.get_metric_history(result["run_id"], f"diagnostics/gradient_norm/{layer['layer']}")
            assert [m.step for m in history] == list(range(1, result["steps"] + 1, 40))
            assert history[0].value == layer["first"]
            assert statistics.median(m.value for m in history) == layer["median"]
        pictures = {file.path for file in client.list_artifacts(result["run_id"], "diagnostics")}
        assert {"diagnostics/gradient_norms.png", "diagnostics/activation_drift.png"} <= pictures


def test_report_and_comparison_are_artifacts_of_the_parent(comparison, client):
    found = {file.path for file in client.list_artifacts(comparison["mlflow"]["parent_run_id"])}
    assert {"report.html", "comparison.json"} <= found


def test_the_logged_model_predicts_what_was_measured(comparison, study, fashion_mnist_part):
    """Loaded through MLflow, the model scores the test images as the evaluation did."""
    import gzip

    arm = next(run for run in comparison["runs"] if run["arm"] == "batch")
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


def varied(settings, **compare):
    """The settings with these of `compare`."""
    return settings.model_copy(update={"compare": CompareSettings(**{"seeds": (0,), **compare})})


NORMS = {"model.norm": ("none", "batch")}


def test_a_study_that_fails_leaves_no_result_and_a_failed_run(spark, settings, tmp_path, monkeypatch):
    output = Path(settings.output)
    output.mkdir(parents=True)
    (output / "comparison.json").write_text("{}")
    (output / "report.html").write_text("of the study before")
    collect = barrier.run

    def fail_later(*args, **kwargs):
        if list((output / "trials").glob("*/checkpoints")):  # the first trial is done
            raise LaunchError("executors were lost")
        return collect(*args, **kwargs)

    monkeypatch.setattr(barrier, "run", fail_later)
    with pytest.raises(LaunchError, match="executors were lost"):
        compare(spark, varied(settings, grid=NORMS))
    assert not (output / "comparison.json").exists()
    assert not (output / "report.html").exists()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        states = [state for (state,) in store.execute("SELECT status FROM runs")]
        reasons = [value for (value,) in store.execute("SELECT value FROM tags WHERE key = 'failure'")]
    assert sorted(states) == ["FAILED", "FAILED", "FINISHED"]  # the parent, the second trial; the first trial
    assert reasons == ["LaunchError: executors were lost"] * 2


def test_a_learning_rate_is_not_chosen_on_the_split_that_judges_it(spark, settings, empty_store, tmp_path):
    grid = {**NORMS, "train.learning_rate": (0.1, 0.2)}
    with pytest.raises(
        ValueError, match=r"search_on and train\.evaluate_on are both 'test'.*set one of them to another split"
    ):
        compare(spark, varied(settings, grid=grid, search_on="test"))
    assert (tmp_path / "mlflow.db").read_bytes() == empty_store.read_bytes()  # nothing was tracked


def test_a_search_that_stops_goes_on_with_the_rung_it_was_at(spark, settings, tmp_path, monkeypatch):
    """Two rates that are close train two rungs with two seeds; the first call of the second rung fails."""
    options = {"grid": {"train.learning_rate": (0.1, 0.1001)}, "search_budget": 8.0, "search_extensions": 0}
    study, launch, calls = varied(settings, **options), barrier.run, []

    def fail_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise LaunchError("executors were lost")
        return launch(*args, **kwargs)

    monkeypatch.setattr(barrier, "run", fail_third)
    with pytest.raises(LaunchError, match="executors were lost"):
        compare(spark, study)
    comparison = compare(spark, study)
    assert len(calls) == 3 + 2 + 4 + 1  # both second rungs, all with the second seed, and the training that is compared
    (arm,) = comparison.arms
    assert [(trial.rungs, trial.steps, trial.learned) for trial in comparison.search] == [(2, 75, True)] * 4
    assert [trial.seed for trial in comparison.search] == [1000, 1000, 1001, 1001]
    assert (arm.search_seeds, arm.search_undecided) == (2, "tied")
    assert arm.search_cost == comparison.search_cost == 300 / 50
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        states = [state for (state,) in store.execute("SELECT status FROM runs")]
    assert (
        states == ["FINISHED"] * 6
    )  # the parent, one run for each candidate and seed over both rungs, the compared one
