"""What a search shows, made up, with the statistics of the real ones."""

from __future__ import annotations

import math
import random

from small_comparisons import CLASSES

from pipeline.config.settings import Settings
from pipeline.report.comparison import ComparedDataset, ComparisonRun, Objective, StudyRun
from pipeline.report.confirmation import confirmed_trials, test_figure, verdict_of
from pipeline.report.statistics import Judge
from pipeline.report.tuning import EvaluatedScore, SeedScore, TunedTrial, Tuning
from pipeline.training.result import EvaluationPoint

EVALUATIONS, IMAGES = 8, 110_000
JUDGE = Judge("accuracy", (500,) * 10, (), smallest_difference=0.005)
SPACE = {
    "model.norm": ["none", "batch", "group"],
    "train.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
    "train.batch_size": [64, 128, 256],
    "model.norm_momentum": {"low": 0.01, "high": 0.5, "log": True, "when": {"model.norm": "batch"}},
    "model.norm_eps": {"low": 1e-6, "high": 1e-2, "log": True, "when": {"model.norm": "batch"}},
    "model.norm_scale": {"choices": ["learned", "off"], "when": {"model.norm": "batch"}},
}


def tuning_of(
    trials: int = 24,
    *,
    confirm: int = 3,
    seeds: int = 3,
    seed_deviation: float = 0.002,
    metric: Objective = "accuracy",
) -> Tuning:
    """A search of so many trials; of those after the fifth, the worse half is pruned.

    A cross-entropy is one minus the accuracy.
    """
    draw = random.Random(0)
    settings = Settings.model_validate({"name": "made up", "tune": {"space": SPACE, "trials": trials}})
    made = [_trial(number, draw) for number in range(trials)]
    best = sorted((t for t in made if t.score is not None), key=lambda t: -(t.score or 0))
    judge = JUDGE._replace(metric=metric)
    runs = [
        run_of(trial, 1000 + number, (trial.score or 0) - 0.004 + draw.gauss(0, seed_deviation))
        for number in range(seeds)
        for trial in best[:confirm]
    ]
    made = [_in_unit(trial, metric) for trial in made]
    searched = {trial.number: made[trial.number].score or 0 for trial in best}
    confirmed = confirmed_trials(runs, searched, {}, judge) if confirm else []
    winner = confirmed[0].number if confirmed else best[0].number
    tested = [
        SeedScore(seed=1000 + n, score=_unit(0.9 + 0.001 * n, metric), diverged=False, run_id=f"t{n}")
        for n in range(seeds)
    ]
    tuning = Tuning(
        name="made up", metric=metric, search_on="validation", evaluations=EVALUATIONS, sampler="tpe",
        pruner="median", space={name: each.words for name, each in settings.tune.space.items()},
        dataset=ComparedDataset(name="fashion_mnist", digest="sha256:" + "0" * 64, classes=10, class_names=CLASSES,
                                rows={"train": 55_000, "validation": 5_000, "test": 10_000}),
        trials=tuple(made), ended_by="trials", images=sum(t.images for t in made), seconds=321.0,
        importance={"train.learning_rate": 0.62, "model.norm": 0.3, "train.batch_size": 0.08}, confirmed=confirmed,
        winner=winner, values=made[winner].values, smallest_difference=0.005,
        test=test_figure("test", tested) if confirmed else None, side_by_side=2,
        settings=settings.model_dump(mode="json"), mlflow=ComparisonRun(parent_run_id="parent", experiment="x"),
    )  # fmt: skip
    return tuning.model_copy(update={"verdict": tuple(verdict_of(tuning))})


def _unit(score: float, metric: Objective) -> float:
    return 1 - score if metric == "cross_entropy" else score


def _in_unit(trial: TunedTrial, metric: Objective) -> TunedTrial:
    curve = tuple(point.model_copy(update={"score": _unit(point.score, metric)}) for point in trial.curve)
    score = None if trial.score is None else _unit(trial.score, metric)
    return trial.model_copy(update={"curve": curve, "score": score})


def _trial(number: int, draw: random.Random) -> TunedTrial:
    rate, norm = 10 ** draw.uniform(-2, 0), draw.choice(["none", "batch", "group"])
    values = {"model.norm": norm, "train.learning_rate": rate, "train.batch_size": draw.choice([64, 128, 256])}
    if norm == "batch":
        values |= {"model.norm_momentum": 10 ** draw.uniform(-2, -0.3), "model.norm_eps": 10 ** draw.uniform(-6, -2),
                   "model.norm_scale": draw.choice(["learned", "off"])}  # fmt: skip
    end = 0.91 - 0.03 * (math.log10(rate) + 0.8) ** 2 - (0.02 if norm == "none" else 0) + draw.gauss(0, 0.002)
    diverges = norm == "none" and rate > 0.7
    curve = [EvaluatedScore(evaluation=n, score=end * (1 - 0.5 * 0.6**n)) for n in range(1, EVALUATIONS + 1)]
    if diverges:
        curve = [EvaluatedScore(evaluation=1, score=0.1)]
    is_pruned = not diverges and number > 5 and end < 0.89
    shown = curve[: 2 + number % 3] if is_pruned else curve
    state = "diverged" if diverges else "pruned" if is_pruned else "complete"
    return TunedTrial(
        number=number, state=state, values=values, score=shown[-1].score if state == "complete" else None,
        curve=tuple(shown), images=IMAGES * len(shown) // EVALUATIONS, learning_rate=rate,
        global_batch=int(values["train.batch_size"]), run_id=f"run{number}",
    )  # fmt: skip


def run_of(trial: TunedTrial, seed: int, score: float) -> StudyRun:
    point = EvaluationPoint(
        step=800, epoch=2.0, accuracy=score, loss=1 - score, balanced_accuracy=score, macro_f1=score,
        calibration_error=0.01,
    )  # fmt: skip
    return StudyRun(
        arm=str(trial.number), values=trial.values, tuned={}, learning_rate=trial.learning_rate,
        global_batch=trial.global_batch, seed=seed, best_accuracy=score, final_accuracy=score,
        final_balanced_accuracy=score, final_macro_f1=score, final_loss=1 - score, final_calibration_error=0.01,
        steps=800, images_per_second=None, data_wait_share=None, diverged=False, world_size=1, attempts=1,
        curve=(point,),
        recall=(score,) * 10, train_loss=(0.3,), train_seconds=(1.0,), checkpoint="x", predictions=None, ranks=(),
        versions={}, run_id=f"{trial.number}-{seed}",
    )  # fmt: skip
