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
    ComparedRun,
    Comparison,
    ComparisonRun,
    StudyRun,
    by,
)
from pipeline.report.confusion import confusion_of
from pipeline.study.search import ArmSearch


def summarize(
    settings: Settings,
    manifest: Manifest,
    runs: Sequence[StudyRun],
    searches: Sequence[ArmSearch],
    *,
    notes: Sequence[str] = (),
    side_by_side: int,
    parent_run_id: str,
) -> Comparison:
    """Every run, and for each arm what its runs show.

    Parameters
    ----------
    settings : of the study
    manifest : of its dataset
    runs : every arm with every seed, the baseline first
    searches : for the tuned values of each arm; empty where nothing was chosen
    notes : what was said of the dataset before training, as sentences
    side_by_side : how many trials trained at once
    parent_run_id : the MLflow run whose children they are
    """
    options, baseline = settings.compare, runs[0].arm
    tuned = tuple(name for name in options.grid if name in options.tune)
    search = [trial for each in searches for trial in each.trials()]
    compared = statistics.with_targets(runs, baseline, options.target_accuracy)
    arms = _arms_of(compared, searches, len(manifest.classes))
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
        **_search_cost(searches),
        warnings=(*notes, *statistics.warnings_of(arms, options.grid, tuned, search)),
        not_measured=tuple(statistics.not_measured(options.grid, len(options.seeds), gradient_norms=norms_known)),
        side_by_side=side_by_side,
        mlflow=ComparisonRun(parent_run_id=parent_run_id, experiment=settings.tracking.experiment),
    )


def _arms_of(runs: Sequence[ComparedRun], searches: Sequence[ArmSearch], classes: int) -> list[ArmSummary]:
    """What the runs of each arm show, and what its search has found; the baseline first."""
    runs_of, search_of = by(runs, lambda run: run.arm), {search.arm.name: search for search in searches}
    base = next(iter(runs_of.values()))
    arms = []
    for name, of_arm in runs_of.items():
        search = search_of.get(name)
        arm = statistics.summary_of(of_arm, base, search.trials() if search else (), 1 / classes)
        matrix = confusion_of(of_arm, classes)
        found = {**(_search_summary(search) if search else {}), **({} if matrix is None else {"confusion": matrix})}
        arms.append(arm.model_copy(update=found))
    return arms


def _search_summary(search: ArmSearch) -> dict[str, object]:
    """The fields of an arm's summary that its search fills."""
    undecided = search.choice.undecided if search.choice else None
    return {
        "search_tied": tuple(search.tied),
        "search_undecided": undecided,
        "search_cost": search.images / search.compared_images,
    }


def _search_cost(searches: Sequence[ArmSearch]) -> dict[str, float]:
    """The cost of all searches together; nothing where there were none."""
    if not searches:
        return {}
    return {"search_cost": sum(each.images for each in searches) / sum(each.compared_images for each in searches)}


def metrics_of(arms: Sequence[ArmSummary]) -> dict[str, float]:
    """The arms' numbers by name in MLflow, ``ARM/KEY``; MLflow allows few letters in the name of a metric."""
    metrics: dict[str, float] = {}
    for arm in arms:
        difference = {f"difference_{key}": value for key, value in arm.difference or ()}
        for key, value in {**dict(arm), **difference}.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                metrics[re.sub(r"[^\w\-. /]", "", f"{arm.arm}/{key}")] = value
    return metrics
