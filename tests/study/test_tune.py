"""`tune` on real Spark, with a real store: trials side by side, pruned while they train, the best confirmed."""

import json
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml

from pipeline import __main__ as commands
from pipeline.config import load_settings
from pipeline.driver.lease import BusyError
from pipeline.report.tuning import Tuning
from pipeline.study import tune
from pipeline.study.tuning import job
from pipeline.study.tuning.sampling import Search
from pipeline.telemetry.heartbeat import read_beat

pytestmark = [pytest.mark.spark, pytest.mark.long]

SPACE = {
    "model.norm": ["none", "batch"],
    "train.learning_rate": {"low": 0.0005, "high": 0.3, "log": True},
    "model.norm_momentum": {"low": 0.01, "high": 0.5, "log": True, "when": {"model.norm": "batch"}},
}


def write(settings, folder, **tune_settings):
    """Settings of a search of trials of one worker, as a file."""
    tree = settings.model_dump(mode="json")
    tree["train"] |= {"epochs": 3}
    tree["workers"] |= {"count": 1}
    tree["tracking"] |= {"system_metrics": False}
    tree["tune"] |= {"space": SPACE, "trials": 7, "random_trials": 4, "pruner_trials": 2, "confirm": 2,
                     "confirm_seeds": [1, 2], **tune_settings}  # fmt: skip
    path = Path(folder, "search.yaml")
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_search_side_by_side_from_the_command_to_the_settings_that_train_takes(spark, settings, tmp_path, capsys):
    path = write(settings, tmp_path)
    commands.app(["tune", "-c", str(path)], standalone_mode=False)
    output = tmp_path / "runs"
    assert capsys.readouterr().out.splitlines()[-1] == str(output / "tune.json")
    found = json.loads((output / "tune.json").read_text())
    read = Tuning.model_validate(found)
    assert read.model_dump(mode="json", exclude_unset=True) == found
    assert read.side_by_side == 2
    assert [trial.number for trial in read.trials] == list(range(7))
    _every_trial_is_whole(read)
    _the_best_are_confirmed(read)
    _mlflow_has_all(read, settings)
    best = load_settings(output / "best.yaml", single_run=True)
    assert {name: value for name, value in read.values.items() if name != "train.learning_rate"} == {
        name: getattr(best.model, name.removeprefix("model.")) for name in read.values if name.startswith("model.")
    }
    assert (best.train.learning_rate, best.train.evaluate_on, best.tune.space) == (
        read.values["train.learning_rate"], "test", {},
    )  # fmt: skip
    page = (output / "tune.html").read_text()
    assert all(line in page for line in read.verdict if "&" not in line and "'" not in line)
    assert {file.name for file in (output / "tune").glob("*.png")} >= {"history.png", "curves.png", "slices.png"}


def _every_trial_is_whole(read):
    assert {trial.state for trial in read.trials} >= {"complete"}
    for trial in read.trials:
        assert trial.run_id
        assert ("model.norm_momentum" in trial.values) == (trial.values["model.norm"] == "batch")
        assert trial.learning_rate == trial.values["train.learning_rate"]
        evaluations = [point.evaluation for point in trial.curve]
        if trial.state == "complete":
            assert evaluations == [1, 2, 3]
            assert trial.score == trial.curve[-1].score
        if trial.state == "pruned":
            assert evaluations == list(range(1, len(evaluations) + 1))
            assert len(evaluations) < 3
            assert trial.score is None


def _the_best_are_confirmed(read):
    assert len(read.confirmed) == 2
    best = sorted(read.complete, key=lambda trial: (-trial.score, trial.number))[:2]
    assert {trial.number for trial in best} == {each.number for each in read.confirmed}
    winner, other = read.confirmed
    assert read.winner == winner.number
    assert winner.mean >= other.mean
    assert [run.seed for run in winner.runs] == [1, 2]
    assert other.difference.mean == pytest.approx(other.mean - winner.mean)
    assert read.test.split == "test"
    assert [run.seed for run in read.test.runs] == [1, 2]
    assert sum("test split" in line for line in read.verdict) == 1


def _mlflow_has_all(read, settings):
    client = mlflow.MlflowClient(settings.tracking.uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "sparknorm")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 1 + 7 + 2 * 2 + 2
    parent = runs.pop(read.mlflow.parent_run_id)
    assert (parent.info.status, parent.data.tags["kind"]) == ("FINISHED", "search")
    assert parent.data.params["train.learning_rate"] == "0.0005 to 0.3 (log)"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {read.mlflow.parent_run_id}
    for trial in read.trials:
        run = runs[trial.run_id]
        is_pruned = trial.state == "pruned"
        assert run.info.status == ("KILLED" if is_pruned else "FINISHED")
        assert run.data.tags.get("state") == ("pruned" if is_pruned else None)
        assert "failure" not in run.data.tags
        logged = client.get_metric_history(trial.run_id, "validation/accuracy")
        assert [point.value for point in logged][: len(trial.curve)] == [point.score for point in trial.curve]
        assert "test/accuracy" not in run.data.metrics
    assert sum("test/accuracy" in run.data.metrics for run in runs.values()) == 2
    names = {artifact.path for artifact in client.list_artifacts(read.mlflow.parent_run_id)}
    assert names >= {"tune.json", "best.yaml", "tune.html", "tune"}


def test_a_pruned_trial_of_two_ranks_is_ended_in_the_middle_and_the_next_trains(spark, settings, tmp_path, monkeypatch):
    """Of trials of 2 and 400 epochs, one after the other on the two slots, the long ones end at their second. Their
    processes end the training by themselves, and are there for the next."""
    space = {"train.epochs": [2, 400], "train.learning_rate": [0.01, 0.02]}
    path = write(settings, tmp_path, trials=None, sampler="grid", confirm=0, space=space, metric="cross_entropy")
    loaded = load_settings(path, ["workers.count=2"])
    report = Search.report

    def report_and_prune(self, number, evaluation, value):
        return report(self, number, evaluation, value) or evaluation >= 2

    monkeypatch.setattr(Search, "report", report_and_prune)
    result = tune(spark, loaded)
    assert (result.ended_by, result.side_by_side) == ("grid", 1)
    assert sorted((trial.state, trial.values["train.epochs"]) for trial in result.trials) == [
        ("complete", 2), ("complete", 2), ("pruned", 400), ("pruned", 400),
    ]  # fmt: skip
    client = mlflow.MlflowClient(settings.tracking.uri)
    for trial in result.trials:
        assert len(trial.curve) == 2
        losses = client.get_metric_history(trial.run_id, "validation/loss")
        assert [point.value for point in losses][:2] == [point.score for point in trial.curve]
        assert trial.images == result.trials[0].images
        steps = client.get_metric_history(trial.run_id, "train/loss")[-1].step
        assert steps * trial.global_batch == trial.images if trial.state == "complete" else steps < 200 * 25
    folders = list(Path(loaded.output, "trials").glob("*"))
    assert len(folders) == 4
    assert all(psutil.pid_exists(read_beat(str(folder), rank).pid) for folder in folders for rank in (0, 1))
    assert (result.confirmed, result.test) == ((), None)
    assert "It was not confirmed with other seeds (tune.confirm is 0)" in result.verdict[0]
    best = min((trial for trial in result.trials if trial.state == "complete"), key=lambda trial: trial.score)
    assert result.winner == best.number
    assert result.verdict[0].startswith(f"Trial {best.number} was the best of 4: cross-entropy {best.score:.4f} on")


def test_a_search_that_another_process_is_at_is_refused_and_left_alone(spark, settings, tmp_path):
    loaded = load_settings(write(settings, tmp_path))
    opened, manifest = job.open_dataset(loaded)
    with (
        job._find_record(opened, manifest).claim("other"),
        pytest.raises(BusyError, match="is being trained by process"),
    ):
        tune(spark, loaded)
    assert not list(tmp_path.glob("runs/trials/*"))


def test_lists_that_are_for_compare_are_refused_before_launch(spark, settings, tmp_path):
    path = write(settings, tmp_path)
    listed = load_settings(path, ["model.depth=[3, 4]"])
    with pytest.raises(ValueError, match=r"model\.depth lists \[3, 4\] in its own place, which is for `compare`"):
        tune(spark, listed)
    assert not Path(tmp_path, "runs", "studies").exists()
