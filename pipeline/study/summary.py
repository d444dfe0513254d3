"""Results of a study's trainings -> a `Comparison`, and its numbers in MLflow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.config import Settings
from pipeline.data import Manifest
from pipeline.report import statistics
from pipeline.report.comparison import (
    ArmSummary,
    ComparedDataset,
    Comparison,
    ComparisonRun,
    SearchTrial,
    StudyRun,
    by,
)
from pipeline.report.confusion import confusion_of


def summarize(
    settings: Settings,
    manifest: Manifest,
    runs: Sequence[StudyRun],
    search: Sequence[SearchTrial],
    *,
    side_by_side: int,
    parent_run_id: str,
) -> Comparison:
    """Every run, and for each arm what its runs show.

    Parameters
    ----------
    settings : of the study
    manifest : of its dataset
    runs : every arm with every seed, the baseline first
    search : trials of the tuned values; empty where nothing was chosen
    side_by_side : how many trials trained at once
    parent_run_id : the MLflow run whose children they are
    """
    options, baseline = settings.compare, runs[0].arm
    tuned = tuple(name for name in options.grid if name in options.tune)
    compared = statistics.with_targets(runs, baseline, options.target_accuracy)
    runs_of, trials_of = by(compared, lambda run: run.arm), by(search, lambda trial: trial.arm)
    chance = 1 / len(manifest.classes)
    arms = []
    for name, of_arm in runs_of.items():
        arm = statistics.summary_of(of_arm, runs_of[baseline], trials_of.get(name, ()), chance)
        matrix = confusion_of(of_arm, len(manifest.classes))
        arms.append(arm if matrix is None else arm.model_copy(update={"confusion": matrix}))
    norms_known = any(run.gradient_norms for run in runs)
    return Comparison(
        name=settings.name,
        baseline=baseline,
        varied=tuple(name for name in options.grid if name not in options.tune),
        tuned=tuned,
        grid=options.grid,
        evaluated_on=settings.train.evaluate_on,
        target_accuracy=options.target_accuracy,
        dataset=ComparedDataset(
            name=manifest.name,
            digest=manifest.digest,
            classes=len(manifest.classes),
            class_names=manifest.classes,
            rows={name: split.rows for name, split in manifest.splits.items()},
        ),
        settings=settings.model_dump(mode="json"),
        runs=tuple(compared),
        arms=tuple(arms),
        search=tuple(search),
        warnings=tuple(statistics.warnings_of(arms, options.grid, tuned)),
        not_measured=tuple(statistics.not_measured(options.grid, len(options.seeds), gradient_norms=norms_known)),
        side_by_side=side_by_side,
        mlflow=ComparisonRun(parent_run_id=parent_run_id, experiment=settings.tracking.experiment),
    )


def metrics_of(arms: Sequence[ArmSummary]) -> dict[str, float]:
    """The arms' numbers by name in MLflow, ``ARM/KEY``; MLflow allows few letters in the name of a metric."""
    metrics: dict[str, float] = {}
    for arm in arms:
        difference = {f"difference_{key}": value for key, value in arm.difference or ()}
        for key, value in {**dict(arm), **difference}.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                metrics[re.sub(r"[^\w\-. /]", "", f"{arm.arm}/{key}")] = value
    return metrics
