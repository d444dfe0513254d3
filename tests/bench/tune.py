"""A search of 32 trials: with a pruner against the same without, and against `mlflow.pyspark.optuna`.

Real searches on Fashion-MNIST on Spark's local[2], each trial one worker with one thread, two at a time. All have the
same space, sampler, seed, number of trials and, where they have one, pruner. Not the same: MlflowSparkStudy draws each
trial's values in the task that trains it, with samplers that it seeds anew where tasks run at once; it asks MLflow for
all trials at each of these moments; its trial is a plain task, without a gang, a relay of its metrics or a run that
goes on after a kill, and cannot have several ranks. Its objective trains with this package's own loop, so that the
networks, the data path and the evaluations are the same. Neither search is confirmed with new seeds here.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import Result, compare, leave

from pipeline.config.settings import Settings
from pipeline.telemetry.events import EventReader

TRIALS = int(os.environ.get("BENCH_TRIALS", "32"))
PASSES = int(os.environ.get("BENCH_PASSES", "1"))
EPOCHS = int(os.environ.get("BENCH_EPOCHS", "1"))
# Trials of about 25 s of training on two quiet cores, so that all four searches take less than 25 minutes. Those of
# 7 s, of width 8, measured what surrounds a trial.
WIDTH = int(os.environ.get("BENCH_WIDTH", "24"))
EVALUATIONS, SEED, FACTOR = 9, 0, 3
RATES, MOMENTA = (0.001, 1.0), (0.01, 0.5)
PRUNED, WHOLE = f"sparknorm tune, {TRIALS} trials with a pruner", f"sparknorm tune, {TRIALS} trials without"
PEER, PEER_WHOLE = f"MlflowSparkStudy, {TRIALS} trials with a pruner", f"MlflowSparkStudy, {TRIALS} trials without"
BEST = ", best score on validation"
SPACE = {
    "model.norm": ["none", "batch"],
    "train.learning_rate": {"low": RATES[0], "high": RATES[1], "log": True},
    "train.batch_size": [128, 256],
    "model.norm_momentum": {"low": MOMENTA[0], "high": MOMENTA[1], "log": True, "when": {"model.norm": "batch"}},
}


def run(spark: Any, dataset: str, work: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = work / "tune"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that did not get to its end
    contenders = {PRUNED: (ours, True), PEER: (theirs, True), WHOLE: (ours, False), PEER_WHOLE: (theirs, False)}
    wanted = os.environ.get("BENCH_CONTENDERS")
    seconds: dict[str, list[float]] = {name: [] for name in contenders if wanted is None or name in wanted}
    best: dict[str, list[float]] = {name: [] for name in seconds}
    warm_up(spark, dataset, folder / "warm-up")
    for number in range(PASSES):
        for place, name in enumerate(seconds):
            search, prunes = contenders[name]
            began_at = time.perf_counter()
            best[name].append(search(spark, dataset, folder / f"{number}-{place}", prunes=prunes))
            seconds[name].append(time.perf_counter() - began_at)
            print(name, seconds[name], best[name], flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    results = [Result(name, "s", passes) for name, passes in seconds.items()]
    results += [Result(name + BEST, "share", passes) for name, passes in best.items()]
    pairs = ((PRUNED, WHOLE), (PRUNED + BEST, WHOLE + BEST), (PRUNED, PEER), (WHOLE, PEER_WHOLE))
    known = {result.name for result in results}
    results += [compare(results, name, against) for name, against in pairs if {name, against} <= known]
    leave("tune", results, "searches on local[2], 1 worker with 1 thread a trial, 2 at a time")


def warm_up(spark: Any, dataset: str, folder: Path) -> None:
    """What a process and its session do once (imports, Python's daemon, compiled plans) is no part of any search:
    whoever is first would pay for all."""
    from pipeline.study import tune

    made = settings_of(dataset, folder, trials=2)
    small = {"model": made.model.model_copy(update={"width": 2})}
    small["train"] = made.train.model_copy(update={"evaluations_per_epoch": 1})
    tune(spark, made.model_copy(update=small))


def settings_of(dataset: str, folder: Path, **tune: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "bench",
            "output": str(folder.absolute()),
            "dataset": {"path": str(Path(dataset).absolute())},
            "model": {"width": WIDTH},
            "train": {"epochs": EPOCHS, "batch_size": 128, "evaluations_per_epoch": EVALUATIONS, "log_every_steps": 10},
            "workers": {"count": 1},
            "tune": {"space": SPACE, "trials": TRIALS, "seed": SEED, "confirm": 0, "reduction_factor": FACTOR, **tune},
            "tracking": {"uri": f"sqlite:///{folder.absolute()}/mlflow.db", "artifacts": f"{folder}/artifacts"},
        }
    )


def ours(spark: Any, dataset: str, folder: Path, *, prunes: bool) -> float:
    """The best score of the whole command, report and all."""
    from pipeline.study import tune

    found = tune(spark, settings_of(dataset, folder, pruner="successive_halving" if prunes else "none"))
    return max(trial.score or 0.0 for trial in found.trials)


def theirs(spark: Any, dataset: str, folder: Path, *, prunes: bool) -> float:
    """The same search by MLflow's integration, with as many tasks at once."""
    import mlflow
    import optuna
    from mlflow.optuna.storage import MlflowStorage
    from mlflow.pyspark.optuna.study import MlflowSparkStudy

    folder.mkdir(parents=True)
    uri = f"sqlite:///{folder.absolute()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    experiment = mlflow.create_experiment("bench", artifact_location=f"{folder.absolute()}/artifacts")
    study = MlflowSparkStudy(
        study_name="bench",
        storage=MlflowStorage(experiment_id=experiment),
        sampler=optuna.samplers.TPESampler(seed=SEED, n_startup_trials=10, multivariate=False),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR)
        if prunes
        else optuna.pruners.NopPruner(),
        mlflow_tracking_uri=uri,
        direction="maximize",
    )
    tree = settings_of(dataset, folder).model_dump(mode="json")

    def objective(trial: Any) -> float:
        return _train(trial, tree)

    study.optimize(objective, n_trials=TRIALS, n_jobs=2)
    done = [trial for trial in study._study.trials if trial.value is not None]
    return max(trial.value for trial in done if trial.state == optuna.trial.TrialState.COMPLETE)


def _train(trial: Any, tree: Mapping[str, Any]) -> float:
    """One trial in one task: the same training, whose evaluations are reported as they come."""
    import optuna

    from pipeline import storage
    from pipeline.distributed.worker import alone
    from pipeline.study.tuning.space import trial_settings
    from pipeline.training import fit
    from pipeline.training.job import Job

    values = {
        "model.norm": trial.suggest_categorical("model.norm", SPACE["model.norm"]),
        "train.learning_rate": trial.suggest_float("train.learning_rate", *RATES, log=True),
        "train.batch_size": trial.suggest_categorical("train.batch_size", SPACE["train.batch_size"]),
    }
    if values["model.norm"] == "batch":
        values["model.norm_momentum"] = trial.suggest_float("model.norm_momentum", *MOMENTA, log=True)
    made = trial_settings(Settings.model_validate(tree), values)
    folder = storage.join(made.output, "trials", str(trial.number))
    events = EventReader(storage.join(folder, "events"))

    def report(moment: Any) -> None:
        if moment.name != "after_evaluation":
            return
        for event in events.new():
            if event["kind"] == "evaluation":
                number = round(event["epoch"] * EVALUATIONS)
                trial.report(event["accuracy"], number)
                if number < EVALUATIONS * EPOCHS and trial.should_prune():
                    raise optuna.TrialPruned

    job = Job(made.dataset.path, folder, made.model, made.train, reader=made.reader, hook=report, live=True)
    return fit(alone("cpu"), job).final_accuracy
