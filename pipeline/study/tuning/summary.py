"""What a search has left in Optuna's storage and its confirmation -> a `Tuning`, and its numbers in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config.secrets import masked
from pipeline.report.comparison import ComparedDataset, ComparisonRun
from pipeline.report.confirmation import verdict_of
from pipeline.report.learned import goodness
from pipeline.report.tuning import ConfirmedTrial, EvaluatedScore, TestFigure, TunedTrial, Tuning
from pipeline.study.tuning.best import best_trials
from pipeline.study.tuning.space import trial_settings
from pipeline.study.tuning.trials import SearchRun, Stage

if TYPE_CHECKING:
    from pipeline.study.tuning.sampling import Search, SearchedTrial


def summarize(
    stage: Stage,
    search: Search,
    run: SearchRun,
    confirmed: Sequence[ConfirmedTrial],
    test: TestFigure | None,
    notes: Sequence[str],
) -> Tuning:
    """Every trial, the best, and how sure that is.

    Parameters
    ----------
    run : that has ended
    confirmed : the winner first; empty where nothing was confirmed
    notes : what was said of the dataset before training, as sentences
    """
    settings, manifest, trials = stage.settings, stage.manifest, search.trials()
    winner = confirmed[0].number if confirmed else best_trials(trials, 1, stage.metric)[0].number
    tuned = tuple(_tuned(stage, trial) for trial in trials)
    assert run.ended_by is not None, "a search ends by one of its limits"
    assert isinstance(settings.train.epochs, int), "auto ends when the dataset is opened"
    tuning = Tuning(
        name=settings.name,
        metric=stage.metric,
        search_on=settings.tune.search_on,
        evaluations=max(
            [settings.train.epochs * settings.train.evaluations_per_epoch, *(p for t in trials for p in t.points)]
        ),
        sampler=settings.tune.sampler,
        pruner=settings.tune.pruner,
        space={name: parameter.words for name, parameter in settings.tune.space.items()},
        dataset=ComparedDataset(
            name=manifest.name, digest=manifest.digest, classes=len(manifest.classes), class_names=manifest.classes,
            rows={name: split.rows for name, split in manifest.splits.items()},
        ),
        trials=tuned,
        ended_by=run.ended_by,
        images=sum(trial.images for trial in tuned),
        seconds=run.seconds,
        importance=search.importance(),
        confirmed=tuple(confirmed),
        winner=winner,
        values=trials[winner].values,
        smallest_difference=settings.compare.smallest_difference,
        test=test,
        notes=tuple(notes),
        side_by_side=stage.at_once,
        settings=masked(settings.model_dump(mode="json")),
        mlflow=ComparisonRun(parent_run_id=stage.parent, experiment=settings.tracking.experiment),
    )  # fmt: skip
    return tuning.model_copy(update={"verdict": tuple(verdict_of(tuning))})


def _tuned(stage: Stage, trial: SearchedTrial) -> TunedTrial:
    train = _train_of(stage, trial)
    facts = trial.facts
    known = {name: facts[name] for name in ("seconds", "same_as", "reason", "run_id") if facts.get(name) is not None}
    return TunedTrial.model_validate({
        "number": trial.number,
        "state": "diverged" if facts.get("diverged") else trial.state,
        "values": trial.values,
        "score": trial.value,
        "curve": [EvaluatedScore(evaluation=number, score=score) for number, score in trial.points.items()],
        "images": facts.get("images", 0),
        "learning_rate": train.learning_rate,
        "global_batch": train.global_batch,
        **known,
    })  # fmt: skip


def _train_of(stage: Stage, trial: SearchedTrial):
    """The training settings of a trial; those of the study where its values cannot be used."""
    try:
        return trial_settings(stage.settings, trial.values).train
    except ValueError:
        return stage.settings.train


def metrics_of(tuning: Tuning) -> dict[str, float]:
    """The numbers of a search by their name in MLflow."""
    scores = [trial.score for trial in tuning.trials if trial.score is not None]
    metrics = {
        "tune/trials": float(len(tuning.trials)),
        "tune/pruned": float(sum(trial.state == "pruned" for trial in tuning.trials)),
        "tune/images": float(tuning.images),
        "tune/best_searched_score": max(scores, key=lambda score: goodness(score, tuning.metric)),
    }
    if tuning.confirmed and tuning.confirmed[0].mean is not None:
        metrics["tune/confirmed_score"] = tuning.confirmed[0].mean
    if tuning.test is not None and tuning.test.mean is not None:
        metrics[f"{tuning.test.split}/score"] = tuning.test.mean
    return metrics
