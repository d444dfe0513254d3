"""The trials of a search in the slots there are: asked for when one is free, pruned while they train, then told."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.cluster.errors import PrunedError, WorkerError
from pipeline.config import Settings
from pipeline.config.tune import TuneSettings
from pipeline.console import console
from pipeline.data import Manifest
from pipeline.driver import slots
from pipeline.driver.checks import check_dataset, check_network
from pipeline.driver.early_end import EarlyEnd
from pipeline.driver.lease import Lease
from pipeline.driver.trial import run_trial
from pipeline.report.comparison import Objective, TrialResult
from pipeline.report.learned import score_at, score_of
from pipeline.report.names import Values, arm_name, tag_name
from pipeline.report.score_text import ScoreText
from pipeline.report.tuning import EndedBy
from pipeline.study.tuning.space import trial_settings
from pipeline.tracking import Tracker

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.study.tuning.sampling import Search, SearchedTrial
    from pipeline.telemetry import Event

# What the columns of MLflow's table and its charts group by.
Tags = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """What all trainings of a search share.

    parent : id of the MLflow run that they are parts of
    at_once : how many train at a time
    """

    spark: SparkSession
    settings: Settings
    manifest: Manifest
    tracker: Tracker
    parent: str
    lease: Lease
    at_once: int
    metric: Objective

    def check(self, settings: Settings) -> None:
        """Check that a trial's settings go with the dataset, and that its network can be built.

        Raises
        ------
        ValueError
            They cannot be trained, as a value in the middle of a range may turn out.
        """
        check_dataset(settings, self.manifest)
        check_network(settings, self.manifest)

    def train(
        self,
        name: str,
        settings: Settings,
        slot: slots.TrainingSlot,
        *,
        early_end: EarlyEnd | None = None,
        log_model: bool = False,
        tags: Tags,
    ) -> TrialResult:
        """Train once, in an MLflow run of its own below the search's."""
        return run_trial(
            self.spark, settings, self.tracker, name=name, parent=self.parent, log_model=log_model, slot=slot,
            manifest=self.manifest, lease=self.lease, early_end=early_end, **tags,
        )  # fmt: skip


class HeldSlot(slots.TrainingSlot):
    """A slot that its trial was asked for in: entering it does not wait, and it is given back once."""

    def __init__(self, slot: slots.TrainingSlot):
        self.stop = slot.stop
        self._slot, self._held = slot.__enter__(), True

    def __enter__(self) -> HeldSlot:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._held = False
            self._slot.__exit__()


@dataclass
class SearchRun:
    """Runs a search until one of its limits is reached.

    Attributes
    ----------
    ended_by : the limit; None while it runs
    """

    stage: Stage
    search: Search
    ended_by: EndedBy | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _left: list[int] = field(default_factory=list)  # trials that an earlier driver had begun
    _began_at: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Train what an earlier driver had begun, and then what the sampler suggests.

        Raises
        ------
        WorkerError, ValueError
            More trials failed than ``tune.max_failures``: on their workers, or since their values cannot be trained.
        """
        self._earlier_seconds = self.search.seconds
        self._left = [trial.number for trial in self.search.trials() if trial.state == "running"]
        at_once, stop = self.stage.at_once, self.stage.lease.stop
        # Twice as many, so that the next one trains while one logs its result.
        loops = [self._loop] * (1 if at_once == 1 else 2 * at_once)
        slots.run_all(self.stage.spark, loops, at_once, stop)

    @property
    def seconds(self) -> float:
        """For which the search has run, over all drivers."""
        return self._earlier_seconds + time.monotonic() - self._began_at

    def _loop(self, slot: slots.TrainingSlot) -> None:
        """Train one trial after the other. Each is asked for once it can begin, with all that is known by then."""
        while True:
            held = HeldSlot(slot)
            try:
                trial = self._next()
                if trial is None:
                    return
                self._train(trial, held)
            finally:
                held.__exit__()

    def _next(self) -> SearchedTrial | None:
        with self._lock:
            if self._left:
                return self.search.take_up(self._left.pop(0))
            self.ended_by = self.ended_by or self._limit()
            if self.ended_by is not None:
                return None
            trial = self.search.ask()
            if trial is None:
                self.ended_by = "grid"
            return trial

    def _limit(self) -> EndedBy | None:
        return reached_limit(self.stage.settings.tune, self.search.trials(), self.seconds)

    def _train(self, trial: SearchedTrial, slot: HeldSlot) -> None:
        if (twin := self._twin(trial)) is not None:
            facts = {"run_id": twin.facts.get("run_id"), "diverged": bool(twin.facts.get("diverged"))}
            for evaluation, value in twin.points.items():
                self.search.report(trial.number, evaluation, value)
            self.search.tell(trial.number, twin.state, twin.value, same_as=twin.number, images=0, **facts)
            return
        began_at = time.monotonic()
        outcome = OneTrial(self.stage, self.search, trial).train(slot)
        with self._lock:
            if outcome.error is not None and self._failures() >= self.stage.settings.tune.max_failures:
                raise outcome.error  # the trial stays as it is, and the same command tries it again
            self.search.tell(
                trial.number,
                outcome.state,
                outcome.value,
                seconds=time.monotonic() - began_at,
                search_seconds=self.seconds,
                **outcome.facts,
            )
        _say(f"{self.stage.settings.name} trial {trial.number} ({_short(trial.values)}): {outcome.words}")

    def _twin(self, trial: SearchedTrial) -> SearchedTrial | None:
        """An earlier trial of the same values that has ended, and was trained: with the same seed it shows the same."""
        ended = [each for each in self.search.trials() if each.state in ("complete", "pruned")]
        key = _key(trial.values)
        return next((each for each in ended if "same_as" not in each.facts and _key(each.values) == key), None)

    def _failures(self) -> int:
        return sum(each.state == "failed" for each in self.search.trials())


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; ``facts`` are noted with it, ``error`` is what it failed with."""

    state: Any
    words: str
    value: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class OneTrial:
    """One trial while it trains: every evaluation is reported once, and decides whether the trial goes on."""

    def __init__(self, stage: Stage, search: Search, trial: SearchedTrial):
        self._stage, self._search, self._trial = stage, search, trial
        self._reported = 0  # number of the newest evaluation

    def train(self, slot: HeldSlot) -> Outcome:
        """Train it to its end, or until it is pruned. Its own errors are part of the outcome."""
        number, values = self._trial.number, self._trial.values
        try:
            self._settings = settings = trial_settings(self._stage.settings, values)
            self._stage.check(settings)  # apart from its training, whose errors may be no matter of its values
        except ValueError as error:
            reason = str(error)
            return Outcome("failed", f"failed: {reason}", facts={"images": 0, "reason": reason}, error=error)
        early_end = EarlyEnd(self._decide, slot.stop)
        if self._search.should_prune(number) and max(self._trial.points) < self._evaluations:
            early_end.prune()  # an earlier driver ended between what was reported and what follows from it
            self._reported = max(self._trial.points)
        tags: Tags = {**{tag_name(name): value for name, value in values.items()}, "kind": "tune", "trial": number}
        try:
            name = f"{self._stage.settings.name} trial {number}"
            result = self._stage.train(name, settings, slot, early_end=early_end, tags=tags)
        except PrunedError as error:
            return self._pruned(error.run_id)
        except WorkerError as error:
            facts = {"images": self._images, "reason": str(error).partition("\n")[0]}
            return Outcome("failed", f"failed: {facts['reason']}", facts=facts, error=error)
        return self._ended(result)

    @property
    def _evaluations(self) -> int:
        """Of this trial, if it is not pruned."""
        train = self._settings.train
        assert isinstance(train.epochs, int)
        return train.epochs * train.evaluations_per_epoch

    @property
    def _images(self) -> int:
        """Training images up to the newest evaluation."""
        from pipeline.data.loader import steps_per_epoch

        made, parts = self._settings, self._settings.train.evaluations_per_epoch
        steps = steps_per_epoch(self._stage.manifest, made.train, made.reader, made.workers.count)
        epochs, part = divmod(self._reported, parts)
        return (epochs * steps + steps * part // parts) * made.train.global_batch

    def _decide(self, event: Event) -> bool:
        """Report an evaluation, and return whether the trial ends by it. After the last one there is nothing to end."""
        metric = self._stage.metric
        if event.get("loss") is None or event.get("split") != self._settings.train.evaluate_on:
            return False
        return self._report(event["epoch"], event["loss" if metric == "cross_entropy" else metric])

    def _report(self, epoch: float, score: float) -> bool:
        evaluation = round(epoch * self._settings.train.evaluations_per_epoch)
        if evaluation <= self._reported:  # told again after a restart
            return False
        self._reported = evaluation
        prunes = self._search.report(self._trial.number, evaluation, score)
        return prunes and evaluation < self._evaluations

    def _pruned(self, run_id: str) -> Outcome:
        facts = {"images": self._images, "run_id": run_id}
        return Outcome("pruned", f"pruned at evaluation {self._reported} of {self._evaluations}", facts=facts)

    def _ended(self, result: TrialResult) -> Outcome:
        """A result that was there already is told as it would have been while it came."""
        for point in result.curve:
            if point.loss is not None and self._report(point.epoch, score_at(point, self._stage.metric)):
                return self._pruned(result.run_id)
        facts = {"images": result.steps * self._settings.train.global_batch, "run_id": result.run_id}
        score, unit = score_of(result, self._stage.metric), ScoreText(self._stage.metric)
        if result.diverged or not math.isfinite(score):
            return Outcome("pruned", f"diverged after {result.steps} steps", facts={**facts, "diverged": True})
        return Outcome("complete", f"{unit.name} {unit.text(score)}", score, facts)


def reached_limit(options: TuneSettings, trials: Sequence[SearchedTrial], seconds: float) -> EndedBy | None:
    """The limit that keeps a search from beginning another trial; None where none does.

    Parameters
    ----------
    trials : all so far
    seconds : for which the search has run
    """
    if options.trials is not None and len(trials) >= options.trials:
        return "trials"
    if options.seconds is not None and seconds >= options.seconds:
        return "seconds"
    if options.images is not None and sum(trial.facts.get("images", 0) for trial in trials) >= options.images:
        return "images"
    return None


def _short(values: Values) -> str:
    """Values for a line on the console, numbers with few digits."""
    return arm_name({name: float(f"{each:.4g}") if isinstance(each, float) else each for name, each in values.items()})


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
