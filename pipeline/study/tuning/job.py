"""A search: space -> trials -> the best few with new seeds -> values, with what is known of them.

Nothing is chosen on the split that judges: trials and their confirmation are evaluated on ``tune.search_on``, and the
winner's figure on ``train.evaluate_on`` is computed once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config import Settings, SettingsError
from pipeline.config.cluster import WorkerSettings
from pipeline.config.effective import effective_yaml
from pipeline.config.identity import identity_of
from pipeline.console import console
from pipeline.data import Manifest
from pipeline.driver import dataset_checks, slots
from pipeline.driver.checks import check_dataset, check_trial, network_notes, open_dataset, tell
from pipeline.driver.record import Record, finished_record, unfinished_record
from pipeline.report.learned import objective_for
from pipeline.report.tune_page import figures_of, render
from pipeline.report.tuning import Tuning
from pipeline.storage.writable import prepare_output
from pipeline.study.tuning.best import confirm
from pipeline.study.tuning.space import check_space, combinations, grid_of, trial_settings, values_of, winner_settings
from pipeline.study.tuning.summary import metrics_of, summarize
from pipeline.study.tuning.trials import SearchRun, Stage, reached_limit
from pipeline.tracking import Tracker
from pipeline.tracking.run import TrackedRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.driver.lease import Lease
    from pipeline.study.tuning.sampling import Search

# What a search leaves in its output folder, and with its MLflow run: files, and a folder of figures.
RESULT, BEST, PAGE, FIGURES = "tune.json", "best.yaml", "tune.html", "tune"
# Settings of a search that may be other ones when it goes on.
_LIMITS = {"trials", "seconds", "images", "side_by_side", "max_failures", "confirm", "confirm_seeds", "storage"}


def tune(spark: SparkSession, settings: Settings) -> Tuning:
    """Search for the values of ``tune.space`` that are best on the validation split, and train the best few again.

    It leaves ``tune.json``, ``best.yaml`` (settings with the values taken, for `train` and `compare`), ``tune.html``
    and ``tune/`` in the output folder and in MLflow. The same command after a driver that was killed goes on: trials
    that had ended are not repeated, and those that were training go on from their checkpoints.

    Parameters
    ----------
    settings : of the study; ``tune.space`` says what may vary

    Raises
    ------
    ValueError
        Something about the space, the dataset, the storage or the cluster does not fit, and nothing was launched; or
        more trials than ``tune.max_failures`` had values that cannot be trained.
    BusyError
        Another process is at the same search.
    TakenOverError
        This process gave no sign of life for so long that another one has taken the search over.
    WorkerError
        More trials failed than ``tune.max_failures``, or one of those that confirm the best.
    """
    _require_optuna(settings.tune.sampler)
    prepare_output(settings.output)  # what was there stays until nobody else is known to be at it
    settings, manifest = open_dataset(settings)
    notes = _check(spark, settings, manifest)
    at_once = slots.trials_at_once(spark, _workers_of(settings), settings.tune.side_by_side)
    tracker = Tracker(settings.tracking)
    record = _find_record(settings, manifest)
    with record.claim(settings.name) as lease:
        search = _open_search(settings, record, lease)
        for stale in (RESULT, BEST, PAGE, FIGURES):  # a search that fails must not look like the one before it
            storage.remove(storage.join(settings.output, stale))
        varied = {name: [parameter.words] for name, parameter in settings.tune.space.items()}
        with tracker.run(
            settings.name, settings=settings, varied=varied, mark=record.content.run_mark, run_id=record.content.run_id,
            owner=lease, kind="search",
        ) as parent:  # fmt: skip
            record.update(run_id=parent.run_id, result=None)
            parent.log_dataset(manifest, settings.dataset.path, context="search")
            metric = objective_for(settings.tune.metric, manifest.split(settings.tune.search_on).label_counts)
            stage = Stage(spark, settings, manifest, tracker, parent.run_id, lease, at_once, metric)
            tuning = _run(stage, search, notes)
            lease.check()  # before files that carry no number
            _publish(settings, parent, tuning)
        record.update(result=storage.join(settings.output, RESULT))
    return tuning


def _run(stage: Stage, search: Search, notes: Sequence[str]) -> Tuning:
    _say_begin(stage, search)
    run = SearchRun(stage, search)
    run.run()
    trials = search.trials()
    if not any(trial.state == "complete" for trial in trials):
        states = ", ".join(sorted({trial.state for trial in trials}))
        raise RuntimeError(
            f"none of {len(trials)} trials of the search came to its end ({states}): there is nothing to choose from. "
            "Give the same command with more tune.trials, lower rates, or tune.pruner none"
        )
    confirmed, test = confirm(stage, trials)
    return summarize(stage, search, run, confirmed, test, notes)


def _require_optuna(sampler: str = "tpe") -> None:
    if sampler == "cmaes" and find_spec("cmaes") is None:
        raise ValueError("tune.sampler cmaes needs the package cmaes: pip install 'cmaes>=0.12', or choose tpe")
    try:
        import pipeline.study.tuning.sampling  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "optuna":
            raise
        raise ValueError("tune needs the package optuna: pip install 'sparknorm[tune]'") from None


def _check(spark: SparkSession, settings: Settings, manifest: Manifest) -> list[str]:
    """Every combination that can be foreseen can be trained and measured; returns what a person should know."""
    listed = [name for name in settings.listed if name not in settings.tune.space]
    if listed:
        raise SettingsError(
            f"{listed[0]} lists {list(settings.compare.grid[listed[0]])} in its own place, which is for `compare`: "
            f"move it into tune.space, or choose one value with -o {listed[0]}=..."
        )
    check_space(settings, manifest)
    notes = dataset_checks.check_classes(manifest, settings.tune.search_on, compared=True)
    values = {name: values_of(name, each)[:1] for name, each in settings.tune.space.items()}
    first_values = next(combinations(settings.tune.space, values))
    if settings.tune.confirm:
        _check_judge(winner_settings(settings, first_values), manifest)
    first = trial_settings(settings, first_values)
    check_trial(spark, first, manifest)
    notes += network_notes(first, manifest)
    tell(notes)
    return notes


def _check_judge(settings: Settings, manifest: Manifest) -> None:
    """The split on which the winner is evaluated is there: it is asked once search and confirmation are over.

    Parameters
    ----------
    settings : of that training; with another split, they have been checked

    Raises
    ------
    SettingsError
        The dataset has no images of that split.
    """
    try:
        check_dataset(settings, manifest)
    except ValueError as error:
        raise SettingsError(
            f"train.evaluate_on {settings.train.evaluate_on!r}, on which the winner is evaluated at the end, cannot be "
            f"used: {error}; set it to another split than tune.search_on, or tune.confirm to 0"
        ) from None


def _workers_of(settings: Settings) -> list[WorkerSettings]:
    """What the trials ask for, for each number of workers that may be tried."""
    workers, parameter = settings.workers, settings.tune.space.get("workers.count")
    if parameter is None:
        return [workers]
    return [workers.model_copy(update={"count": count}) for count in values_of("workers.count", parameter)]


def _find_record(settings: Settings, manifest: Manifest) -> Record:
    """What was begun of this very search and not finished; one that was, where its limits were raised since; or a new
    record."""
    from pipeline.training.job import source_identity, weights_identity

    parts = {
        "model": identity_of("model", settings.model, exclude={"weights", "weights_sha256"}),
        "train": identity_of("train", settings.train),
        "reader": identity_of("reader", settings.reader),
        "tune": identity_of("tune", settings.tune, exclude=_LIMITS),
        **source_identity(settings.model.network, *_listed(settings, "model.network")),
        **weights_identity(settings.model, *_listed(settings, "model.weights")),
    }
    where = storage.join(storage.absolute(settings.output), "studies"), settings.name
    unfinished, finished = (find(*where, {**parts, "dataset": manifest.digest}) for find in
                            (unfinished_record, finished_record))  # fmt: skip
    assert unfinished is not None
    is_new = unfinished.content.driver is None
    return finished if is_new and finished is not None and _has_room(settings, finished) else unfinished


def _listed(settings: Settings, name: str) -> list[str]:
    """The texts among the values of a setting that a search may try."""
    parameter = settings.tune.space.get(name)
    return [value for value in (parameter and parameter.choices) or () if isinstance(value, str)]


def _has_room(settings: Settings, record: Record) -> bool:
    """Whether a search that has ended may begin another trial by the limits of now."""
    search = _open_search(settings, record)
    trials, options = search.trials(), settings.tune
    is_tried = options.sampler == "grid" and len(trials) >= len(grid_of(options.space))
    return not is_tried and reached_limit(options, trials, search.seconds) is None


def _open_search(settings: Settings, record: Record, lease: Lease | None = None) -> Search:
    from pipeline.study.tuning.sampling import Search

    train, epochs = settings.train, settings.train.epochs
    most = settings.tune.space.get("train.epochs")
    longest = max(map(int, values_of("train.epochs", most))) if most else epochs  # type: ignore[arg-type]
    assert isinstance(longest, int)
    return Search(
        record.folder.rpartition("/")[2],
        settings.tune,
        output=storage.absolute(settings.output),
        evaluations=longest * train.evaluations_per_epoch,
        journal=storage.join(record.folder, "journal"),
        **({} if lease is None else {"check": lease.check}),
    )


def _publish(settings: Settings, parent: TrackedRun, tuning: Tuning) -> None:
    """Write the files, and the same files and the numbers to MLflow."""
    output = settings.output
    best = settings.with_values(tuning.values)
    best = best.model_copy(update={"tune": best.tune.model_copy(update={"storage": None})})  # it may hold a password
    storage.publish(storage.join(output, BEST), effective_yaml(best).encode())
    storage.publish_json(storage.join(output, RESULT), tuning, allow_nan=False)
    storage.publish(storage.join(output, PAGE), render(tuning).encode())
    for file in (RESULT, BEST, PAGE):
        parent.log_text(file, storage.read_bytes(storage.join(output, file)).decode())
    figures: dict[str, bytes] = {}
    for drawing in figures_of(tuning):
        figures |= {f"{drawing.name}.png": drawing.png(), f"{drawing.name}.csv": drawing.csv().encode()}
    for file, content in figures.items():
        storage.publish(storage.join(output, FIGURES, file), content)
    if figures:
        parent.log_files(FIGURES, figures)
    parent.log_summary(metrics_of(tuning))


def _say_begin(stage: Stage, search: Search) -> None:
    options, known = stage.settings.tune, search.trials()
    limits = {"trials": options.trials, "s": options.seconds, "images": options.images}
    until = " or ".join(f"{limit:,g} {what}" for what, limit in limits.items() if limit is not None) or "the grid ends"
    goes_on = f"going on after {len(known)} trials, " if known else ""
    console.print(
        f"{stage.settings.name}: {goes_on}{options.sampler} over {', '.join(options.space)}, pruner {options.pruner}, "
        f"until {until}, {stage.at_once} at once",
        soft_wrap=True,
    )  # fmt: skip
