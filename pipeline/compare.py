"""Arms x seeds -> runs -> statistics.

Each arm (a norm) gets its own best learning rate of one grid, chosen on the validation split with a seed of its own.
Then each arm is trained with each seed and judged on the test split. Arms differ in the norm and that learning rate
alone: one seed gives all of them the same order of rows and the same initial weights where they share them.
"""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config import Settings
from pipeline.manifest import load as load_manifest
from pipeline.progress import console
from pipeline.record import Record, find_record
from pipeline.report import render
from pipeline.tracking import Tracker
from pipeline.trial import check_trial, run_trial

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Result = dict[str, Any]
FILES = ("comparison.json", "report.html")


def compare(spark: SparkSession, settings: Settings) -> dict[str, Any]:
    """Run the comparison, write ``comparison.json`` and ``report.html`` into the output folder, log all to MLflow.

    The same command after a driver that was killed goes on with the trial it was at; finished trials are not repeated.

    Returns
    -------
    dict
        The content of ``comparison.json``.
    """
    options = settings.compare
    _check(spark, settings)
    tracker = Tracker(settings.tracking)
    record = _begin(settings)
    for stale in FILES:  # a study that fails must not look like the one before it
        storage.remove(storage.join(settings.output, stale))
    run_id = record.data.get("run_id")
    with tracker.run(settings.name, settings=settings, run_id=run_id, kind="comparison") as parent:
        record.update(run_id=parent.run_id)
        search = [
            _search(spark, settings, tracker, parent.run_id, norm, rate)
            for norm in options.norms
            for rate in options.learning_rates
            if len(options.learning_rates) > 1
        ]
        rates = {norm: _best_rate(search, norm, settings) for norm in settings.compare.norms}
        arms = [
            _train_arm(spark, settings, tracker, parent.run_id, norm, seed, rates[norm])
            for seed in settings.compare.seeds
            for norm in settings.compare.norms
        ]
        comparison = summarize(settings, arms, search)
        comparison["mlflow"] = {"parent_run_id": parent.run_id, "experiment": settings.tracking.experiment}
        for file, text in zip(
            FILES, (json.dumps(comparison, indent=1, allow_nan=False), render(comparison)), strict=True
        ):
            storage.publish(storage.join(settings.output, file), text.encode())
            parent.log_text(file, text)
        for arm in comparison["summary"]:
            parent.log_summary(
                {f"{arm['norm']}/{key}": value for key, value in arm.items() if isinstance(value, (int, float))}
            )
    record.update(result=storage.join(settings.output, FILES[0]))
    return comparison


def _begin(settings: Settings) -> Record:
    """What was begun of this very study and not finished, or a new record; claimed for this process."""
    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    parts = settings.model_dump(mode="json", include={"model", "train", "reader", "compare"})
    studies = storage.join(storage.absolute(settings.output), "studies")
    record = find_record(studies, settings.name, {**parts, "dataset": manifest.digest})
    record.claim(name=settings.name)
    return record


def _check(spark: SparkSession, settings: Settings) -> None:
    """Every arm can be trained, and the learning rate is not chosen on the split that judges it."""
    options = settings.compare
    for norm in options.norms:
        check_trial(spark, _arm(settings, norm, options.seeds[0], options.learning_rates[0]))
    if len(options.learning_rates) > 1:
        if options.search_on == settings.train.evaluate_on:
            raise ValueError(
                f"compare.search_on and train.evaluate_on are both {options.search_on!r}: a learning rate chosen "
                "on the split that judges it makes the comparison unfair; use `validation`"
            )
        check_trial(spark, _short(settings, options.norms[0], options.learning_rates[0]))


def _arm(settings: Settings, norm: str, seed: int, learning_rate: float) -> Settings:
    """The settings of one trial: the study's, with these three replaced."""
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"norm": norm}),
            "train": settings.train.model_copy(update={"seed": seed, "learning_rate": learning_rate}),
        }
    )


def _short(settings: Settings, norm: str, learning_rate: float) -> Settings:
    """The settings of one trial of the grid search."""
    options = settings.compare
    trial = _arm(settings, norm, options.search_seed, learning_rate)
    short = {"epochs": options.search_epochs, "evaluate_on": options.search_on, "evaluations_per_epoch": 1}
    return trial.model_copy(update={"train": trial.train.model_copy(update=short)})


def _search(
    spark: SparkSession, settings: Settings, tracker: Tracker, parent: str, norm: str, learning_rate: float
) -> Result:
    name = f"{settings.name} search {norm} lr={learning_rate:g}"
    trial = _short(settings, norm, learning_rate)
    result = run_trial(
        spark, trial, tracker, name=name, parent=parent, log_model=False,
        kind="search", norm=norm, seed=trial.train.seed, lr=learning_rate,
    )  # fmt: skip
    _say(name, result)
    return {"norm": norm, "learning_rate": learning_rate, **_without_curves(result)}


def _train_arm(
    spark: SparkSession,
    settings: Settings,
    tracker: Tracker,
    parent: str,
    norm: str,
    seed: int,
    learning_rate: float,
) -> Result:
    name = f"{settings.name} {norm} seed={seed}"
    result = run_trial(
        spark, _arm(settings, norm, seed, learning_rate), tracker, name=name, parent=parent,
        kind="arm", norm=norm, seed=seed, lr=learning_rate,
    )  # fmt: skip
    _say(name, result)
    return {"norm": norm, "seed": seed, "learning_rate": learning_rate, **result}


def _say(name: str, result: Result) -> None:
    state = "diverged" if result["diverged"] else f"accuracy {result['best_accuracy']:.2%}"
    speed = f", {result['images_per_second']:,.0f} images/s" if result["images_per_second"] else ""
    console.print(f"{name}: {state} after {result['steps']} steps{speed}", highlight=False)


def _without_curves(result: Result) -> Result:
    return {key: value for key, value in result.items() if key not in ("curve", "train_loss", "checkpoint")}


def _best_rate(search: list[Result], norm: str, settings: Settings) -> float:
    """The learning rate with the highest validation accuracy; one that diverged is taken only if all did."""
    trials = [trial for trial in search if trial["norm"] == norm]
    if not trials:
        return settings.compare.learning_rates[0]
    return max(trials, key=lambda trial: (not trial["diverged"], trial["best_accuracy"]))["learning_rate"]


def summarize(settings: Settings, arms: list[Result], search: list[Result]) -> dict[str, Any]:
    """What ``comparison.json`` holds: a result for each arm and seed, and mean, deviation and n for each arm.

    ``steps_to_baseline_best`` is the first evaluated step at which a trial is at least as accurate as the baseline's
    trial of the same seed ever was; None where it never is.
    """
    baseline = settings.compare.norms[0]
    best = {arm["seed"]: arm["best_accuracy"] for arm in arms if arm["norm"] == baseline}
    results = [{**arm, "steps_to_baseline_best": _steps_to(arm["curve"], best[arm["seed"]])} for arm in arms]
    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    return {
        "name": settings.name,
        "baseline": baseline,
        "evaluated_on": settings.train.evaluate_on,
        "dataset": {"name": manifest.name, "digest": manifest.digest, "classes": len(manifest.classes),
                    "rows": {name: split.rows for name, split in manifest.splits.items()}},
        "settings": settings.model_dump(mode="json"),
        "arms": results,
        "summary": [_summary([r for r in results if r["norm"] == norm]) for norm in settings.compare.norms],
        "search": search,
    }  # fmt: skip


def _steps_to(curve: list[dict[str, Any]], accuracy: float) -> int | None:
    return next((point["step"] for point in curve if point["accuracy"] >= accuracy), None)


def _summary(results: list[Result]) -> Result:
    reached = [r["steps_to_baseline_best"] for r in results if r["steps_to_baseline_best"] is not None]
    speeds = [r["images_per_second"] for r in results if r["images_per_second"]]
    return {
        "norm": results[0]["norm"],
        "learning_rate": results[0]["learning_rate"],
        "n": len(results),
        "diverged": sum(r["diverged"] for r in results),
        **_mean_and_std("best_accuracy", [r["best_accuracy"] for r in results]),
        **_mean_and_std("final_accuracy", [r["final_accuracy"] for r in results]),
        "reached_baseline_best": len(reached),
        **_mean_and_std("steps_to_baseline_best", reached),
        **_mean_and_std("images_per_second", speeds),
    }


def _mean_and_std(name: str, values: list[float]) -> Result:
    """Mean and sample standard deviation; None where there are too few values for one."""
    return {
        f"{name}_mean": statistics.fmean(values) if values else None,
        f"{name}_std": statistics.stdev(values) if len(values) > 1 else None,
    }
