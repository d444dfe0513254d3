"""Names of params, metrics and runs that users' own names would make, and that MLflow would refuse."""

import shutil

import mlflow
import pytest

from pipeline.cluster.errors import PrunedError
from pipeline.config import dotted
from pipeline.config.settings import VARIABLE, Settings
from pipeline.config.study import TrackingSettings
from pipeline.report.comparison import ArmSummary
from pipeline.report.names import arm_name, tag_name
from pipeline.study.summary import metrics_of
from pipeline.tracking.outage import TrackingError
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.tracker import Tracker


@pytest.fixture
def settings(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path)
    tracking = TrackingSettings(
        uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "artifacts"), system_metrics=False
    )
    return Settings(name="small", tracking=tracking)


def test_classes_of_any_name_can_have_weights(settings):
    named = {"train": {"class_weights": {"cats & dogs": 2, "a,b (c)'": 0.5}}, "spark": {"conf": {"spark.x(1)": "y"}}}
    settings = Settings.model_validate(settings.model_dump() | named)
    with Tracker(settings.tracking).run("weighted", settings=settings) as run:
        pass
    params = mlflow.get_run(run.run_id).data.params
    assert "cats & dogs" in params["train.class_weights"]
    assert params["spark.conf.spark.x_1_"] == "y"


def test_arms_of_any_name_have_metrics(settings):
    names = [f"weights {place}" for place in ("s3://b/w.pt", "file:///a/../w.pt", "x" * 400, "x" * 401)]
    names += ["class_weights C 2", "class_weights C# 2", "class_weights C++ 2", "a/b", "a_b"]
    arms = [ArmSummary.model_construct(arm=name, score_mean=0.5, difference=None) for name in names]
    with Tracker(settings.tracking).run("named", settings=settings) as run:
        run.log_summary(metrics_of(arms))
    found = mlflow.get_run(run.run_id).data.metrics
    assert len([name for name in found if name.endswith("/score_mean")]) == len(names)


def test_secrets_in_an_address_are_in_no_name(settings):
    name = f"small {arm_name({'model.weights': 'https://me:s3cret@host/w.pt?sig=abcdef'})}"
    with Tracker(settings.tracking).run(name, settings=settings, arm=name) as run:
        pass
    found = mlflow.get_run(run.run_id)
    told = f"{found.info.run_name} {found.data.tags}"
    assert "host/w.pt" in told
    assert "s3cret" not in told
    assert "abcdef" not in told


def test_a_pruned_run_whose_tag_cannot_be_written_is_ended(settings, monkeypatch):
    def refuse(*_):
        raise TrackingError("the store is away")

    with pytest.raises(TrackingError), Tracker(settings.tracking).run("pruned", settings=settings) as run:
        monkeypatch.setattr(TrackedRun, "log_summary", refuse)
        raise PrunedError("worse than others", run.run_id)
    assert mlflow.active_run() is None
    assert mlflow.get_run(run.run_id).info.status == "KILLED"


def test_no_two_settings_are_one_tag():
    taken = {"kind", "arm", "seed", "trial"}
    names = [tag_name(name) for name in dotted._names(Settings) if name.partition(".")[0] in VARIABLE]
    assert len(names) > 60
    assert len(set(names)) == len(names)
    assert taken & set(names) == {"seed"}  # train.seed, which it is
