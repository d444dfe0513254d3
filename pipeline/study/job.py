"""A study: arms x seeds -> runs -> a comparison and its report.

Each arm gets its own values of the tuned settings (the learning rate), chosen on the validation split with a seed of
its own (see `search`). Then each arm is trained with each seed and judged on the test split. Arms differ in the
settings varied and those tuned alone: one seed gives all of them the same order of rows and the same initial weights
where they share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config import Settings, SettingsError
from pipeline.config.identity import identity_of
from pipeline.console import console
from pipeline.data import Manifest
from pipeline.driver import dataset_checks, slots
from pipeline.driver.checks import check_trial, network_notes, open_dataset, tell
from pipeline.driver.lease import Lease
from pipeline.driver.record import Record, unfinished_record
from pipeline.driver.trial import run_trial
from pipeline.report.comparison import Comparison, StudyRun, TrialResult
from pipeline.report.figures.study import figures_of
from pipeline.report.names import Values
from pipeline.report.page import render
from pipeline.storage.writable import prepare_output
from pipeline.study.arms import Arm, arms_of, candidates_of, with_final_network
from pipeline.study.rung_plan import LEAST_STEPS
from pipeline.study.same_arms import check_same_arms
from pipeline.study.search import ArmSearch, run_search
from pipeline.study.seeds import run_seeds
from pipeline.study.summary import judge_of, metrics_of, summarize
from pipeline.study.trainable import check_trainable, values_in_words
from pipeline.study.trials import Trial
from pipeline.tracking import Tracker
from pipeline.tracking.run import TrackedRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What a study leaves in its output folder, and with its MLflow run: files, and a folder of figures.
RESULT, PAGE, FIGURES = "comparison.json", "report.html", "report"


def compare(spark: SparkSession, settings: Settings) -> Comparison:
    """Run a study and publish its comparison: ``comparison.json``, ``report.html`` and ``report/`` in the output folder
    and in MLflow.

    The same command after a driver that was killed goes on with the trials it was at; finished ones are not repeated.

    Parameters
    ----------
    settings : of the study; ``compare.grid`` says what varies

    Raises
    ------
    ValueError
        Something about the settings, the dataset or the cluster does not fit; nothing was launched.
    BusyError
        Another process is at the same study.
    TakenOverError
        This process gave no sign of life for so long that another one has taken the study over.
    """
    prepare_output(settings.output)  # what was there stays until nobody else is known to be at it
    settings, manifest = open_dataset(settings)
    settings = with_final_network(settings, judge_of(settings, manifest, searched=False).metric)
    arms, values = arms_of(settings), candidates_of(settings)
    searches, notes = _check(spark, settings, manifest, arms, values)
    at_once = slots.trials_at_once(spark, [arm.settings.workers for arm in arms], settings.compare.side_by_side)
    tracker = Tracker(settings.tracking)
    record = _find_record(settings, manifest)
    with record.claim(settings.name) as lease:
        for stale in (RESULT, PAGE, FIGURES):  # a study that fails must not look like the one before it
            storage.remove(storage.join(settings.output, stale))
        varied = {**settings.compare.grid, "train.seed": settings.compare.all_seeds}
        with tracker.run(
            settings.name, settings=settings, varied=varied, mark=record.content.run_mark, run_id=record.content.run_id,
            owner=lease, kind="comparison",
        ) as parent:  # fmt: skip
            record.update(run_id=parent.run_id)
            parent.log_dataset(manifest, settings.dataset.path, context="comparison")
            _say_begin(arms, searches, settings, at_once)
            train = partial(_train, spark, tracker, manifest, parent.run_id, at_once, lease)
            run_search(searches, train)
            tuned = {arm.name: values[0] for arm in arms} | {search.arm.name: search.tuned for search in searches}
            runs = run_seeds(settings, manifest, arms, tuned, train)
            comparison = summarize(
                settings, manifest, runs, searches, notes=notes, side_by_side=at_once, parent_run_id=parent.run_id
            )
            lease.check()  # before files that carry no number
            _publish(settings.output, parent, comparison)
        record.update(result=storage.join(settings.output, RESULT))
    return comparison


def _check(
    spark: SparkSession, settings: Settings, manifest: Manifest, arms: Sequence[Arm], values: Sequence[Values]
) -> tuple[list[ArmSearch], list[str]]:
    """Every arm can be trained and measured, and nothing is chosen on the split that judges it.

    Returns
    -------
    searches
        One for each arm; none where there is nothing to choose.
    notes
        What a person should know of the dataset, as sentences, which were shown.
    """
    options = settings.compare
    if len(values) > 1 and options.search_on == settings.train.evaluate_on:
        raise ValueError(
            f"compare.search_on and train.evaluate_on are both {options.search_on!r}: a learning rate chosen "
            "on the split that judges it makes the comparison unfair: set one of them to another split"
        )
    chooses = len(values) > 1 or options.checkpoint != "last"
    notes = dataset_checks.check_comparison(settings, manifest, chooses=chooses)
    for arm in arms:
        check_trial(spark, arm.settings, manifest)
        notes += [note for note in network_notes(arm.settings, manifest) if note not in notes]
    _check_tuned(settings, manifest, arms, values)
    notes += check_same_arms(arms, manifest)
    searches = [ArmSearch(settings, arm, values, manifest) for arm in arms] if len(values) > 1 else []
    for search in searches[:1]:
        check_trial(spark, search.candidates[0].settings, manifest)
    tell([*notes, *dataset_checks.one_seed(settings)])
    return searches, notes


def _check_tuned(settings: Settings, manifest: Manifest, arms: Sequence[Arm], values: Sequence[Values]) -> None:
    """Check that every arm can be trained with every value that it may choose.

    Raises
    ------
    SettingsError
        One cannot; the message names arm and value.
    """
    networks: set[str] = set()
    for arm in arms:
        for tuned in filter(None, values):
            made = settings.with_values({**arm.values, **tuned})
            try:
                check_trainable(made, manifest, networks)
            except ValueError as error:
                raise SettingsError(
                    f"compare.grid: {values_in_words(tuned)} of the arm {arm.name!r} cannot be trained: {error}"
                ) from None


def _find_record(settings: Settings, manifest: Manifest) -> Record:
    """What was begun of this very study and not finished, or a new record."""
    from pipeline.training.job import source_identity, weights_identity

    parts = {
        "model": identity_of("model", settings.model, exclude={"weights", "weights_sha256"}),
        "train": identity_of("train", settings.train),
        "reader": identity_of("reader", settings.reader),
        "compare": identity_of("compare", settings.compare, exclude={"side_by_side"}),
        **source_identity(settings.model.network, *map(str, settings.compare.grid.get("model.network", ()))),
        **weights_identity(settings.model, *settings.compare.grid.get("model.weights", ())),
    }
    studies = storage.join(storage.absolute(settings.output), "studies")
    return unfinished_record(studies, settings.name, {**parts, "dataset": manifest.digest})


def _train(
    spark: SparkSession,
    tracker: Tracker,
    manifest: Manifest,
    parent: str,
    at_once: int,
    lease: Lease,
    trials: Sequence[Trial],
) -> list[StudyRun]:
    """Train them all, in MLflow runs below the parent's."""
    train_one = partial(_train_one, spark, tracker, manifest, parent, lease)
    return slots.run_all(spark, [partial(train_one, trial) for trial in trials], at_once, lease.stop)


def _train_one(
    spark: SparkSession,
    tracker: Tracker,
    manifest: Manifest,
    parent: str,
    lease: Lease,
    trial: Trial,
    slot: slots.TrainingSlot,
) -> StudyRun:
    result = run_trial(
        spark, trial.settings, tracker, name=trial.name, parent=parent, log_model=trial.kind == "arm",
        slot=slot, manifest=manifest, cycle=trial.cycle, lease=lease, **trial.tags,
    )  # fmt: skip
    _say_end(trial.name, result)
    train = trial.settings.train
    return StudyRun(
        arm=trial.arm.name,
        values=trial.arm.values,
        tuned=trial.tuned,
        learning_rate=train.learning_rate,
        global_batch=train.global_batch,
        seed=train.seed,
        **result.model_dump(exclude_unset=True),
    )


def _publish(output: str, parent: TrackedRun, comparison: Comparison) -> None:
    """Write the files, and the same files and the arms' numbers to MLflow."""
    storage.publish_json(storage.join(output, RESULT), comparison, allow_nan=False)
    storage.publish(storage.join(output, PAGE), render(comparison).encode())
    for file in (RESULT, PAGE):
        parent.log_text(file, storage.read_bytes(storage.join(output, file)).decode())
    figures: dict[str, bytes] = {}
    for drawing in figures_of(comparison):
        figures |= {f"{drawing.name}.png": drawing.png(), f"{drawing.name}.csv": drawing.csv().encode()}
    for file, content in figures.items():
        storage.publish(storage.join(output, FIGURES, file), content)
    parent.log_files(FIGURES, figures)
    parent.log_summary(metrics_of(comparison.arms))


def _say_begin(arms: Sequence[Arm], searches: Sequence[ArmSearch], settings: Settings, at_once: int) -> None:
    options = settings.compare
    least, most = (len(arms) * len(seeds) for seeds in (options.first_seeds, options.all_seeds))
    number, seeds = f"{least}", f"{len(options.first_seeds)}"
    if options.seeds == "auto":
        number, seeds = f"{number} to {most}", f"{seeds} to {len(options.all_seeds)}"
    tried, chosen = sum(len(search.next_trials()) for search in searches), ", ".join(settings.compare.tune)
    searched = f"{tried} short trials or more to choose {chosen}, then " if tried else ""
    if skipped := [search.arm.name for search in searches if search.choice is not None]:
        tell([
            f"{', '.join(skipped)}: no short trials choose {chosen}, since compare.search_budget, "
            f"{options.search_budget:g} of seeds x epochs, leaves each fewer than {LEAST_STEPS} steps; the middle "
            "value is taken. Train for more epochs, or raise the budget"
        ])  # fmt: skip
    console.print(
        f"{settings.name}: {len(arms)} arms x {seeds} seeds: {searched}{number} trials, {at_once} at once",
        soft_wrap=True,
    )  # fmt: skip


def _say_end(name: str, result: TrialResult) -> None:
    state = "diverged" if result.diverged else f"accuracy {result.final_accuracy:.2%}"
    speed = f", {result.images_per_second:,.0f} images/s" if result.images_per_second else ""
    console.print(f"{name}: {state} after {result.steps} steps{speed}")
