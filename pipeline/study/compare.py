"""A study: arms x seeds -> runs -> evidence and a report.

Each arm gets its own best values of the tuned settings (the learning rate), chosen on the validation split with a seed
of its own. Then each arm is trained with each seed and judged on the test split. Arms differ in the settings varied and
those tuned alone: one seed gives all of them the same order of rows and the same initial weights where they share them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.console import console
from pipeline.data import load_manifest
from pipeline.driver import slots
from pipeline.driver.checks import check_trial
from pipeline.driver.record import Record, unfinished_record
from pipeline.driver.trial import run_trial
from pipeline.report import statistics
from pipeline.report.figures import study
from pipeline.report.names import Values, arm_name, short_name
from pipeline.report.page import render
from pipeline.study.arms import Arm, arms_of, candidates_of
from pipeline.tracking import Tracker
from pipeline.tracking.run import TrackedRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Result = dict[str, Any]
FILES = ("comparison.json", "report.html")
FIGURES = "report"
_CURVES = ("curve", "train_loss", "train_seconds", "checkpoint", "ranks", "gradient_norms")


@dataclass(frozen=True)
class Trial:
    """One training of a study: ``search`` chooses tuned values for an arm, ``arm`` is what is compared."""

    kind: str
    arm: Arm
    tuned: Values
    settings: Settings

    @property
    def name(self) -> str:
        if self.kind == "search":
            return f"{self.settings.name} search {self.arm.name} {arm_name(self.tuned)}"
        return f"{self.settings.name} {self.arm.name} seed={self.settings.train.seed}"

    @property
    def tags(self) -> dict[str, Any]:
        """What the columns of MLflow's table and its charts group by."""
        values = {short_name(name): value for name, value in {**self.arm.values, **self.tuned}.items()}
        return {"kind": self.kind, "arm": self.arm.name, "seed": self.settings.train.seed, **values}


def compare(spark: SparkSession, settings: Settings) -> dict[str, Any]:
    """Run the study, write ``comparison.json``, ``report.html`` and ``report/`` into the output folder, log all to
    MLflow.

    The same command after a driver that was killed goes on with the trials it was at; finished ones are not repeated.

    Returns
    -------
    dict
        The content of ``comparison.json``.
    """
    arms, candidates = arms_of(settings), candidates_of(settings)
    search = [_search(settings, arm, tuned) for arm in arms for tuned in candidates] if len(candidates) > 1 else []
    _check(spark, settings, arms, search)
    at_once = slots.trials_at_once(spark, [arm.settings.workers for arm in arms], settings.compare.side_by_side)
    tracker = Tracker(settings.tracking)
    record = _begin(settings)
    for stale in (*FILES, FIGURES):  # a study that fails must not look like the one before it
        storage.remove(storage.join(settings.output, stale))
    run_id = record.content.run_id
    varied = {**settings.compare.grid, "train.seed": settings.compare.seeds}
    with tracker.run(settings.name, settings=settings, varied=varied, run_id=run_id, kind="comparison") as parent:
        record.update(run_id=parent.run_id)
        manifest = load_manifest(settings.dataset.path, settings.dataset.version)
        parent.log_dataset(manifest, settings.dataset.path, context="comparison")
        _say_begin(arms, search, settings, at_once)
        train = partial(_train, spark, tracker, parent.run_id, at_once)
        searched = [_without_curves(result) for result in train(search)]
        trials = [
            _trial(settings, arm, seed, best_of(searched, arm, candidates))
            for seed in settings.compare.seeds
            for arm in arms
        ]
        comparison = summarize(settings, train(trials), searched)
        comparison["side_by_side"] = at_once
        comparison["mlflow"] = {"parent_run_id": parent.run_id, "experiment": settings.tracking.experiment}
        _leave(settings, parent, comparison)
    record.update(result=storage.join(settings.output, FILES[0]))
    return comparison


def _begin(settings: Settings) -> Record:
    """What was begun of this very study and not finished, or a new record; claimed for this process."""
    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    parts = settings.model_dump(mode="json", include={"model", "train", "reader", "compare"})
    parts["compare"].pop("side_by_side")
    studies = storage.join(storage.absolute(settings.output), "studies")
    record = unfinished_record(studies, settings.name, {**parts, "dataset": manifest.digest})
    record.claim(settings.name)
    return record


def _check(spark: SparkSession, settings: Settings, arms: Sequence[Arm], search: Sequence[Trial]) -> None:
    """Every arm can be trained, and nothing is chosen on the split that judges it."""
    for arm in arms:
        check_trial(spark, arm.settings)
    options = settings.compare
    if search:
        if options.search_on == settings.train.evaluate_on:
            raise ValueError(
                f"compare.search_on and train.evaluate_on are both {options.search_on!r}: a learning rate chosen "
                "on the split that judges it makes the comparison unfair; use `validation`"
            )
        check_trial(spark, search[0].settings)


def _trial(settings: Settings, arm: Arm, seed: int, tuned: Values) -> Trial:
    return Trial("arm", arm, tuned, settings.with_values({**arm.values, **tuned, "train.seed": seed}))


def _search(settings: Settings, arm: Arm, tuned: Values) -> Trial:
    """A short trial, judged on another split. At most half of it is warm-up, so that it does try the rate it is for."""
    options = settings.compare
    short = {
        "train.warmup_epochs": min(settings.train.warmup_epochs, options.search_epochs / 2),
        "train.seed": options.search_seed,
        "train.epochs": options.search_epochs,
        "train.evaluate_on": options.search_on,
        "train.evaluations_per_epoch": 1,
    }
    return Trial("search", arm, tuned, settings.with_values({**arm.values, **tuned, **short}))


def _train(spark: SparkSession, tracker: Tracker, parent: str, at_once: int, trials: Sequence[Trial]) -> list[Result]:
    """The results of trials, each with what it was a trial of."""

    def one(trial: Trial, slot: slots.TrainingSlot) -> Result:
        result = run_trial(
            spark, trial.settings, tracker, name=trial.name, parent=parent, log_model=trial.kind == "arm",
            slot=slot, **trial.tags,
        )  # fmt: skip
        _say(trial.name, result)
        train = trial.settings.train
        return {
            "arm": trial.arm.name,
            "values": trial.arm.values,
            "tuned": trial.tuned,
            "learning_rate": train.learning_rate,
            "global_batch": train.global_batch,
            "seed": train.seed,
            **result,
        }

    return slots.run_all(spark, [partial(one, trial) for trial in trials], at_once)


def best_of(search: Sequence[Result], arm: Arm, candidates: Sequence[Values]) -> Values:
    """The tuned values with the highest validation accuracy; those that diverged are taken only if all did."""
    trials = [trial for trial in search if trial["arm"] == arm.name]
    if not trials:
        return candidates[0]
    return max(trials, key=lambda trial: (not trial["diverged"], trial["best_accuracy"]))["tuned"]


def summarize(settings: Settings, runs: list[Result], search: list[Result]) -> dict[str, Any]:
    """What ``comparison.json`` holds: every run, and for each arm what its runs show (see `evidence`)."""
    options, baseline = settings.compare, runs[0]["arm"]
    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    runs = statistics.with_targets(runs, baseline, options.target_accuracy)
    of = {name: [run for run in runs if run["arm"] == name] for name in dict.fromkeys(run["arm"] for run in runs)}
    arms = [
        statistics.summary_of(
            of_arm, of[baseline], [t for t in search if t["arm"] == name], chance=1 / len(manifest.classes)
        )
        for name, of_arm in of.items()
    ]
    tuned = [name for name in options.grid if name in options.tune]
    looked = any(run.get("gradient_norms") for run in runs)
    return {
        "name": settings.name,
        "baseline": baseline,
        "varied": [name for name in options.grid if name not in options.tune],
        "tuned": tuned,
        "grid": {name: list(values) for name, values in options.grid.items()},
        "evaluated_on": settings.train.evaluate_on,
        "target_accuracy": options.target_accuracy,
        "dataset": {"name": manifest.name, "digest": manifest.digest, "classes": len(manifest.classes),
                    "rows": {name: split.rows for name, split in manifest.splits.items()}},
        "settings": settings.model_dump(mode="json"),
        "runs": runs,
        "arms": arms,
        "search": search,
        "warnings": statistics.warnings_of(arms, options.grid, tuned),
        "not_measured": statistics.not_measured(options.grid, len(options.seeds), gradient_norms=looked),
    }  # fmt: skip


def _leave(settings: Settings, parent: TrackedRun, comparison: dict[str, Any]) -> None:
    """Files into the output folder, and the same files and the arms' figures into MLflow."""
    pages = (json.dumps(comparison, indent=1, allow_nan=False), render(comparison))
    for file, text in zip(FILES, pages, strict=True):
        storage.publish(storage.join(settings.output, file), text.encode())
        parent.log_text(file, text)
    drawn: dict[str, bytes] = {}
    for drawing in study.figures_of(comparison):
        drawn |= {f"{drawing.name}.png": drawing.png(), f"{drawing.name}.csv": drawing.csv().encode()}
    for file, content in drawn.items():
        storage.publish(storage.join(settings.output, FIGURES, file), content)
    parent.log_files(FIGURES, drawn)
    parent.log_summary(metrics_of(comparison))


def metrics_of(comparison: dict[str, Any]) -> dict[str, float]:
    """The arms' numbers by name in MLflow, ``ARM/KEY``; MLflow allows few letters in the name of a metric."""
    found: dict[str, float] = {}
    for arm in comparison["arms"]:
        difference = {f"difference_{key}": value for key, value in arm.get("difference", {}).items()}
        for key, value in {**arm, **difference}.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[re.sub(r"[^\w\-. /]", "", f"{arm['arm']}/{key}")] = value
    return found


def _say_begin(arms: Sequence[Arm], search: Sequence[Trial], settings: Settings, at_once: int) -> None:
    number = len(arms) * len(settings.compare.seeds)
    searched = f"{len(search)} short trials to choose {', '.join(settings.compare.tune)}, then " if search else ""
    console.print(
        f"{settings.name}: {len(arms)} arms x {len(settings.compare.seeds)} seeds: {searched}{number} trials, "
        f"{at_once} at once",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def _say(name: str, result: Result) -> None:
    state = "diverged" if result["diverged"] else f"accuracy {result['best_accuracy']:.2%}"
    speed = f", {result['images_per_second']:,.0f} images/s" if result["images_per_second"] else ""
    console.print(f"{name}: {state} after {result['steps']} steps{speed}", highlight=False, markup=False)


def _without_curves(result: Result) -> Result:
    return {key: value for key, value in result.items() if key not in _CURVES}
