"""What a comparison shows, made up, with the statistics of the real ones."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np

from pipeline.report.comparison import (
    ComparedDataset,
    Comparison,
    ComparisonRun,
    LayerGradient,
    Metric,
    SearchTrial,
    StudyRun,
)
from pipeline.report.names import LEARNING_RATE, arm_name
from pipeline.report.statistics import Judge, not_measured, summaries_of, warnings_of, with_targets
from pipeline.report.verdict import verdict
from pipeline.training.predictions import Predictions
from pipeline.training.result import EvaluationPoint

ROWS, WORKERS, CHANCE = 54_000, 2, 0.1
JUDGE = Judge("accuracy", (1_000,) * 10, (600,) * 10, smallest_difference=0.005)
SCORES = ("loss", "balanced_accuracy", "macro_f1", "calibration_error")
CLASSES = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")
LAYERS = ("0", "1.stem.0", "1.stem.1", "1.stages.0.0", "1.stages.1.0", "2")


def comparison_of(
    varied: dict[str, list[Any]] | None = None,
    *,
    rates: tuple[float, ...] = (0.02, 0.1, 0.5),
    seeds: int = 2,
    epochs: int = 4,
    target_accuracy: float | None = None,
    diverged: dict[str, int] | None = None,
    gradient_norms: bool = True,
    speed: bool = True,
    level: dict[str, float] | None = None,
    confusion: bool = False,
    not_learned: dict[str, int] | None = None,
    predictions: bool = True,
    metric: Metric = "accuracy",
) -> Comparison:
    """A comparison of every combination of ``varied`` (norms none and batch where it is None).

    rates : of the search; one of them is no search
    diverged : how many of an arm's runs did, by its name
    level : an arm's accuracy after all epochs, by its name
    confusion : whether the arms have confusion matrices
    not_learned : how many of an arm's last runs were no better than chance, by its name
    predictions : whether those of the runs are there
    """
    varied = {"model.norm": ["none", "batch"]} if varied is None else varied
    arms = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    tune = [LEARNING_RATE] if len(rates) > 1 else []
    search = [_trial(values, rate) for values in arms for rate in rates if tune]
    runs = []
    for seed, (number, values) in itertools.product(range(seeds), enumerate(arms)):
        arm, known = arm_name(values) or "batch", level or {}
        best = known.get(arm, 0.885 + 0.022 * (values.get("model.norm") == "batch") - 0.0008 * number)
        fallen = seed < (diverged or {}).get(arm, 0)
        best = CHANCE if seeds - seed <= (not_learned or {}).get(arm, 0) else best
        rate = values.get(LEARNING_RATE, _chosen(search, arm, rates))
        runs.append(_run(values, rate, seed, best, epochs, tune, fallen=fallen, speed=speed, gradients=gradient_norms))
    baseline = runs[0].arm
    judge = JUDGE._replace(metric=metric)
    compared = with_targets(runs, baseline, target_accuracy, judge)
    found = {(run.arm, run.seed): predictions_of(run) for run in runs if predictions}
    summaries = summaries_of(compared, search, found, judge)
    if confusion:
        matrices = [confusion_matrix(arm.final_accuracy_mean, arm.n) for arm in summaries]
        pairs = zip(summaries, matrices, strict=True)
        summaries = [arm.model_copy(update={"confusion": matrix}) for arm, matrix in pairs]
    grid = {name: tuple(values) for name, values in varied.items()} | ({LEARNING_RATE: rates} if tune else {})
    comparison = Comparison(
        metric=metric, constant_score=CHANCE, smallest_difference=judge.smallest_difference,
        name="quickstart", evaluated_on="test", baseline=baseline, varied=tuple(varied), tuned=tuple(tune), grid=grid,
        target_accuracy=target_accuracy, side_by_side=2,
        dataset=ComparedDataset(name="fashion_mnist", digest="sha256:" + 32 * "6a", classes=10, class_names=CLASSES,
                                rows={"test": 10_000, "train": ROWS, "validation": 6_000}),
        settings={
            "model": {"network": "cnn", "norm": "batch", "depth": 3, "width": 16},
            "train": {"batch_size": None, "rank_batch_size": 128, "epochs": epochs, "schedule": "cosine"},
            "workers": {"count": WORKERS},
            "compare": {"seeds": list(range(seeds)), "search_budget": 0.5, "search_on": "validation", "metric": "auto"},
        },
        runs=tuple(compared), arms=tuple(summaries), search=tuple(search),
        warnings=tuple(warnings_of(summaries, grid, tune)),
        not_measured=tuple(not_measured(grid, seeds, gradient_norms=gradient_norms)),
        mlflow=ComparisonRun(parent_run_id="f4c70096e85440fb8b917ec4b5efa297", experiment="sparknorm"),
    )  # fmt: skip
    return comparison.model_copy(update={"verdict": tuple(verdict(comparison))})


def predictions_of(run: StudyRun) -> Predictions:
    """Of 10,000 images, as many of them right as the run says; the same are easy for all runs, but for some noise."""
    rows = sum(JUDGE.counts)
    label = np.repeat(np.arange(10, dtype=np.int32), JUDGE.counts)
    ease = np.random.default_rng(0).standard_normal(rows)
    noise = np.random.default_rng(list(f"{run.arm} {run.seed}".encode())).standard_normal(rows)
    wrong = np.argsort(ease + 0.3 * noise)[: round((1 - run.final_accuracy) * rows)]
    prediction = label.copy()
    prediction[wrong] = (label[wrong] + 1) % 10
    unknown = np.zeros(rows, np.float32)
    return Predictions(np.arange(rows), label, prediction, unknown, unknown)


def with_arms(comparison: Comparison, *changes: dict[str, Any]) -> Comparison:
    """The comparison with these changes to its arms, in their order."""
    arms = (arm.model_copy(update=change) for arm, change in zip(comparison.arms, changes, strict=True))
    return comparison.model_copy(update={"arms": tuple(arms)})


def with_runs(comparison: Comparison, **changes: Any) -> Comparison:
    """The comparison with changes to its runs: functions of a run, by the name of the field that they are for."""
    runs = (run.model_copy(update={key: change(run) for key, change in changes.items()}) for run in comparison.runs)
    return comparison.model_copy(update={"runs": tuple(runs)})


def many_arms(**options: Any) -> Comparison:
    """28: four norms with seven batch sizes."""
    varied = {"model.norm": ["none", "batch", "group", "layer"], "train.rank_batch_size": [2, 4, 8, 16, 32, 64, 128]}
    level = {}
    for norm, size in itertools.product(*varied.values()):
        # As in figure 1 of Wu & He (2018): the error of batch norm rises where batches are small.
        error = {"none": 0.115, "batch": 0.086 + 0.12 / size, "group": 0.094, "layer": 0.099}[norm]
        level[arm_name({"model.norm": norm, "train.rank_batch_size": size})] = 1 - error
    return comparison_of(varied, level=level, **options)


def _trial(values: dict[str, Any], rate: float) -> SearchTrial:
    arm = arm_name(values) or "batch"
    best = 0.1 if values.get("model.norm") == "batch" else 0.03
    accuracy = 0.87 - 0.05 * math.log10(rate / best) ** 2
    fallen = rate > 10 * best
    return SearchTrial(
        arm=arm, values=values, tuned={LEARNING_RATE: rate}, learning_rate=rate, global_batch=256, seed=1000,
        best_accuracy=0.31 if fallen else accuracy, final_accuracy=0.1 if fallen else accuracy,
        **final_scores(scores_of(0.1 if fallen else accuracy, gone=fallen)),
        diverged=fallen, steps=200, images_per_second=4000.0, data_wait_share=0.01, world_size=WORKERS, attempts=1,
        learned=not fallen, rungs=1, run_id=f"search-{arm}-{rate:g}",
    )  # fmt: skip


def scores_of(accuracy: float, *, gone: bool) -> dict[str, float | None]:
    """What an evaluation of this accuracy says beside it; ``gone``: of a network whose logits are not finite."""
    values = None if gone else 2.3 * (1 - accuracy), accuracy - 0.01, accuracy - 0.02, None if gone else 0.03
    return dict(zip(SCORES, values, strict=True))


def final_scores(scores: dict[str, float | None]) -> dict[str, Any]:
    """The scores by their names in a training's summary."""
    return {f"final_{score}": value for score, value in scores.items()}


def confusion_matrix(accuracy: float, runs: int) -> tuple[tuple[int, ...], ...]:
    """Of 1,000 images of each class in each run: what is wrong was taken for the class after it."""
    wrong = round(1000 * (1 - accuracy)) * runs
    rows = [[0] * len(CLASSES) for _ in CLASSES]
    for label, row in enumerate(rows):
        row[label] = 1000 * runs - wrong
        row[(label + 1) % len(rows)] = wrong
    return tuple(tuple(row) for row in rows)


def _chosen(search: list[SearchTrial], arm: str, rates: tuple[float, ...]) -> float:
    trials = [trial for trial in search if trial.arm == arm]
    return max(trials, key=lambda t: (not t.diverged, t.best_accuracy)).learning_rate if trials else rates[0]


def _run(
    values: dict[str, Any], rate: float, seed: int, best: float, epochs: int, tune: list[str],
    *, fallen: bool, speed: bool, gradients: bool,
) -> StudyRun:  # fmt: skip
    arm = arm_name(values) or "batch"
    noise = random.Random(f"{arm} {seed}")
    batch = WORKERS * values.get("train.rank_batch_size", 128)
    total, looks = ROWS * epochs // batch, 4 * epochs
    curve: list[EvaluationPoint] = []
    for look in range(1, looks + 1):
        rise = 1 - math.exp(-(7 + 5 * (values.get("model.norm") == "batch")) * look / looks)
        accuracy = round((best + noise.gauss(0, 0.001)) * (rise - noise.uniform(0, 0.02) * (1 - look / looks)), 4)
        step, gone = total * look // looks, fallen and look == looks // 2
        point = {"step": step - 3 - seed, "accuracy": 0.1} if gone else {"step": step}
        numbers = {"epoch": epochs * look / looks, "accuracy": accuracy, **point}
        curve.append(EvaluationPoint(**numbers, **scores_of(numbers["accuracy"], gone=gone)))
        if gone:
            break
    accuracies = [point.accuracy for point in curve]
    per_second = (5800.0 - 1200 * (values.get("model.norm") != "none")) * noise.uniform(0.9, 1.1)
    vanish = 0.5 if values.get("model.norm") == "none" else 0.95
    layers = [name for name in LAYERS if values.get("model.norm") != "none" or name != "1.stem.1"]
    norms = tuple(
        LayerGradient(layer=name, first=1.0, median=0.6 * vanish ** (len(layers) - n) * noise.uniform(0.8, 1.2))
        for n, name in enumerate(layers)
    )
    return StudyRun(
        arm=arm, values=values, tuned=dict.fromkeys(tune, rate), learning_rate=rate, global_batch=batch, seed=seed,
        best_accuracy=max(accuracies), final_accuracy=accuracies[-1], recall=tuple(accuracies[-1:] * len(CLASSES)),
        **final_scores(curve[-1].model_dump(include=set(SCORES))), predictions=None, steps=curve[-1].step,
        images_per_second=per_second if speed else None, data_wait_share=0.01 if speed else None, diverged=fallen,
        curve=tuple(curve), train_loss=tuple(None if point.loss is None else point.loss + 0.05 for point in curve),
        train_seconds=tuple(point.step * batch / per_second for point in curve), checkpoint="step.pt",
        world_size=WORKERS, attempts=1, ranks=(), run_id=f"{arm} {seed}".replace(",", "").replace(" ", "-"),
        **({"gradient_norms": norms} if gradients else {}),
    )  # fmt: skip
