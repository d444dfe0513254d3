"""Results of a study's trainings -> a `Comparison`, and its numbers in MLflow."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence

from pipeline.config import Settings
from pipeline.config.secrets import masked
from pipeline.data import Manifest
from pipeline.report import statistics
from pipeline.report.comparison import (
    ArmSummary,
    ComparedDataset,
    Comparison,
    ComparisonRun,
    Metric,
    StudyRun,
    by,
)
from pipeline.report.confusion import confusion_of
from pipeline.report.learned import constant_score, metric_for
from pipeline.report.names import is_number
from pipeline.report.verdict import verdict
from pipeline.study.search import ArmSearch
from pipeline.training import predictions
from pipeline.training.predictions import Predictions

log = logging.getLogger(__name__)

# Letters of an arm's name in that of a metric, of which MLflow takes 250.
_LONGEST_ARM = 180


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
    judge = judge_of(settings, manifest, searched=bool(searches))
    tuned = tuple(name for name in options.grid if name in options.tune)
    search = [trial for each in searches for trial in each.trials()]
    compared = statistics.with_targets(runs, baseline, options.target_accuracy, judge)
    arms = statistics.summaries_of(compared, search, predictions_of(runs), judge)
    arms = _with_searches(_with_confusion(arms, runs, len(manifest.classes)), searches)
    norms_known = any(run.gradient_norms for run in runs)
    comparison = Comparison(
        name=settings.name,
        baseline=baseline,
        varied=tuple(name for name in options.grid if name not in options.tune),
        tuned=tuned,
        grid=options.grid,
        evaluated_on=settings.train.evaluate_on,
        **({"selected_on": settings.train.select_on} if options.checkpoint != "last" else {}),
        metric=judge.metric,
        constant_score=constant_score(judge.metric, judge.counts),
        smallest_difference=judge.smallest_difference,
        target_accuracy=options.target_accuracy,
        dataset=_dataset_of(manifest),
        settings=masked(settings.model_dump(mode="json")),
        runs=tuple(compared),
        arms=tuple(arms),
        search=tuple(search),
        **_search_cost(searches),
        **_trials_saved(settings, runs),
        warnings=(*notes, *statistics.warnings_of(arms, options.grid, tuned, search)),
        not_measured=tuple(
            statistics.not_measured(options.grid, len({run.seed for run in runs}), gradient_norms=norms_known)
        ),
        side_by_side=side_by_side,
        mlflow=ComparisonRun(parent_run_id=parent_run_id, experiment=settings.tracking.experiment),
    )
    return comparison.model_copy(update={"verdict": tuple(verdict(comparison))})


def _dataset_of(manifest: Manifest) -> ComparedDataset:
    return ComparedDataset(
        name=manifest.name,
        digest=manifest.digest,
        classes=len(manifest.classes),
        class_names=manifest.classes,
        rows={name: split.rows for name, split in manifest.splits.items()},
    )


def judge_of(settings: Settings, manifest: Manifest, *, searched: bool) -> statistics.Judge[Metric]:
    """What the runs of a study are judged by.

    searched : whether tuned values were chosen
    """
    counts = manifest.split(settings.train.evaluate_on).label_counts
    search_counts = manifest.split(settings.compare.search_on).label_counts if searched else ()
    metric = metric_for(settings.compare.metric, counts)
    options = settings.compare
    max_seeds = options.max_seeds if options.seeds == "auto" else None
    return statistics.Judge(metric, counts, search_counts, options.smallest_difference, max_seeds)


def predictions_of(runs: Sequence[StudyRun]) -> dict[tuple[str, int], Predictions]:
    """Of the runs whose files are there; the others are logged."""
    found = {}
    for run in runs:
        if run.predictions is None:
            continue
        try:
            found[run.arm, run.seed] = predictions.read(run.predictions)
        except (OSError, ValueError) as error:
            log.warning("%s: intervals of the arm %s do not cover test images: %s", run.predictions, run.arm, error)
    return found


def _with_confusion(arms: Sequence[ArmSummary], runs: Sequence[StudyRun], classes: int) -> list[ArmSummary]:
    """The arms with their confusion matrices, where predictions and few enough classes allow them."""
    matrices = {name: confusion_of(of_arm, classes) for name, of_arm in by(runs, lambda run: run.arm).items()}
    return [arm.model_copy(update={"confusion": matrices[arm.arm]}) if matrices[arm.arm] else arm for arm in arms]


def _with_searches(arms: Sequence[ArmSummary], searches: Sequence[ArmSearch]) -> list[ArmSummary]:
    """The arms with what their searches have found."""
    search_of = {search.arm.name: search for search in searches}
    return [arm.model_copy(update=_search_summary(search_of[arm.arm])) if arm.arm in search_of else arm for arm in arms]


def _search_summary(search: ArmSearch) -> dict[str, object]:
    """The fields of an arm's summary that its search fills."""
    assert search.choice is not None
    return {
        "search_tied": tuple(search.tied),
        "search_undecided": search.choice.undecided,
        "search_seeds": search.choice.seeds,
        "search_cost": search.images / search.compared_images,
    }


def _trials_saved(settings: Settings, runs: Sequence[StudyRun]) -> dict[str, int]:
    """Of a study that adds seeds until it is certain; nothing of any other."""
    if settings.compare.seeds != "auto":
        return {}
    return {"trials_saved": len({run.arm for run in runs}) * settings.compare.max_seeds - len(runs)}


def _search_cost(searches: Sequence[ArmSearch]) -> dict[str, float]:
    """The cost of all searches together; nothing where there were none."""
    if not searches:
        return {}
    return {"search_cost": sum(each.images for each in searches) / sum(each.compared_images for each in searches)}


def metrics_of(arms: Sequence[ArmSummary]) -> dict[str, float]:
    """The arms' numbers by name in MLflow, ``ARM/KEY``; MLflow allows few letters in the name of a metric."""
    metrics: dict[str, float] = {}
    parts = Counter(_metric_part(arm.arm) for arm in arms)
    for arm in arms:
        name = _metric_part(arm.arm)
        name = name if parts[name] == 1 else f"{name}-{_digest(arm.arm)}"  # they differ in letters that were left out
        difference = {f"difference_{key}": value for key, value in arm.difference or ()}
        for key, value in {**dict(arm), **difference}.items():
            if is_number(value):
                metrics[f"{name}/{key}"] = value
    return metrics


def _metric_part(name: str) -> str:
    """The name of an arm as a part of a metric's: without other letters, and with no slash of its own."""
    allowed = re.sub(r"[^\w\-. ]", "", name.replace("/", "_"))
    if len(allowed) <= _LONGEST_ARM:
        return allowed
    return f"{allowed[:_LONGEST_ARM]}-{_digest(name)}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
