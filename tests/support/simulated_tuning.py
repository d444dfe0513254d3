"""Searches whose trials are curves that follow from their values: real Optuna and the real driver's logic, no Spark.

A driver can be killed at any write of the history and at any evaluation: it then raises `Killed`, which nothing
catches, and a new one goes on with what is on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_manifests import make

from pipeline.cluster.errors import PrunedError, WorkerError
from pipeline.cluster.stop import Stop
from pipeline.config.settings import Settings
from pipeline.data import Manifest
from pipeline.report.comparison import TrialResult
from pipeline.study.tuning.sampling import Search, SearchedTrial
from pipeline.study.tuning.trials import SearchRun, Stage
from pipeline.training.result import EvaluationPoint

EPOCHS, STEPS = 4, 5  # of a trial; of an epoch
SPACE = {
    "model.norm": ["none", "batch"],
    "train.learning_rate": {"low": 0.001, "high": 1.0, "log": True},
    "model.norm_momentum": {"low": 0.01, "high": 0.5, "log": True, "when": {"model.norm": "batch"}},
}


class Killed(BaseException):
    """The driver is gone."""


@dataclass
class Doom:
    """Kills a driver at the so-manieth moment; ``None`` never."""

    at: int | None = None
    passed: int = 0

    def moment(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            raise Killed


def tune_settings(**changes: Any) -> Settings:
    """Settings of a search; ``changes`` are of the section ``tune``."""
    tune = {"space": SPACE, "trials": 20, "random_trials": 5, "pruner_trials": 3, **changes}
    train = {"epochs": EPOCHS, "batch_size": 2, "lanes": 1}
    return Settings.model_validate({"name": "sim", "train": train, "workers": {"count": 1}, "tune": tune})


def true_score(settings: Settings) -> float:
    """Of a training to its end: best at a rate of 0.1, with batch norm, at a momentum of 0.1."""
    loss = abs(math.log10(settings.train.learning_rate) + 1) / 4
    loss += 0.1 if settings.model.norm == "none" else abs(math.log10(settings.model.norm_momentum) + 1) / 50
    return 0.95 - loss


class _Lease:
    """What a search asks of its lease."""

    def __init__(self) -> None:
        self.stop = Stop()

    def check(self) -> None:
        """It is held."""


@dataclass(frozen=True)
class SimulatedStage(Stage):
    """Trains at once. A finished training is known, and one that goes on gives its evaluations from the first again.

    trained : number of the trial for each training that was begun anew
    """

    doom: Doom = field(default_factory=Doom)
    results: dict[str, TrialResult] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    diverging: frozenset[int] = frozenset()
    failing: frozenset[int] = frozenset()
    endless: frozenset[int] = frozenset()  # whose last loss is not finite, though they did not diverge
    checks: bool = False  # whether its trials are checked as real ones are; the manifest must be one to train on then

    def check(self, settings: Settings) -> None:
        if self.checks:
            super().check(settings)

    def train(self, name, settings, slot, *, early_end=None, log_model=False, tags) -> TrialResult:
        if name in self.results:
            return self.results[name]
        with slot:
            self.trained.append(name)
            number = tags["trial"]
            if number in self.failing:
                raise WorkerError("rank 0 on host x: out of memory\ntraceback")
            curve = []
            for epoch in range(1, EPOCHS + 1):
                self.doom.moment()
                diverged = number in self.diverging and epoch == 2
                score = true_score(settings) * (1 - 0.5**epoch)
                loss = None if diverged or (number in self.endless and epoch == EPOCHS) else 1 - score
                curve.append(
                    EvaluationPoint(
                        step=STEPS * epoch,
                        epoch=float(epoch),
                        accuracy=score,
                        loss=loss,
                        balanced_accuracy=score,
                        macro_f1=score,
                        calibration_error=0.0,
                    )
                )
                event = {"kind": "evaluation", "split": settings.train.evaluate_on, **curve[-1].model_dump()}
                if early_end is not None:
                    early_end.see([event])
                    if early_end.error is not None:
                        raise early_end.error
                    if early_end.pruned:
                        raise PrunedError("pruned", f"run of {name}")
                if diverged:
                    break
            self.results[name] = _result(name, curve, diverged=diverged)
            return self.results[name]


def _result(name: str, curve: list[EvaluationPoint], *, diverged: bool) -> TrialResult:
    last = curve[-1]
    return TrialResult(
        best_accuracy=last.accuracy, final_accuracy=last.accuracy, final_balanced_accuracy=last.accuracy,
        final_macro_f1=last.accuracy, final_loss=last.loss, final_calibration_error=0.0, steps=last.step,
        images_per_second=None, data_wait_share=None, diverged=diverged, world_size=1, attempts=1, curve=tuple(curve),
        recall=(last.accuracy, last.accuracy), train_loss=(0.1,) * len(curve), train_seconds=(1.0,) * len(curve),
        checkpoint="x", predictions=None, ranks=(), versions={}, run_id=f"run of {name}",
    )  # fmt: skip


def open_search(folder: Path, settings: Settings, doom: Doom | None = None) -> Search:
    """The search of these settings whose history is in a folder."""
    doom = doom or Doom()
    return Search("sim", settings.tune, output="here", evaluations=EPOCHS, journal=str(folder), check=doom.moment)


def simulate(
    folder: Path, settings: Settings, *, doom: Doom | None = None, manifest: Manifest | None = None, **stage: Any
) -> tuple[list[SearchedTrial], SearchRun]:
    """Run a search, or what is left of it; one trial after the other."""
    doom = doom or Doom()
    made: Any = SimulatedStage(
        None, settings, manifest or make(rows=10, groups=(6, 4)), None, "parent", _Lease(), 1,
        "cross_entropy" if settings.tune.metric == "cross_entropy" else "accuracy", doom=doom, **stage,
    )  # fmt: skip
    run = SearchRun(made, open_search(folder, settings, doom))
    run.run()
    return run.search.trials(), run
