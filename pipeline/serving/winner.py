"""Which training is registered: the best arm's of a comparison, or the newest of `train`."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from pipeline import storage
from pipeline.cluster.connect import import_from
from pipeline.config.secrets import mask
from pipeline.config.settings import Settings
from pipeline.data import Manifest
from pipeline.driver import checks
from pipeline.driver.trial import trial_in, trials_folder
from pipeline.report.comparison import ArmSummary, ComparedRun, Comparison, TrialResult
from pipeline.report.registration import TrainingOrigin
from pipeline.report.verdict import best_arm
from pipeline.serving.result import ExportError
from pipeline.serving.trained import Trained, find_trained, load_trained

RESULT, PAGE = "comparison.json", "report.html"


class Candidate(NamedTuple):
    """A training that is to be registered.

    settings : those that it was trained with
    """

    trained: Trained
    settings: Settings
    origin: TrainingOrigin


def find_candidate(settings: Settings) -> Candidate:
    """The training that ``registry.take`` names, in the output folder of these settings.

    Raises
    ------
    ExportError
        There is none, all of it diverged or did not learn, it is of another dataset, or its checkpoint is gone.
    NetworkError, VersionsError, CheckpointError
        See `find_trained`.
    """
    path = storage.join(settings.output, RESULT)
    take = settings.registry.take
    if take == "comparison" or (take == "auto" and storage.exists(path)):
        return _of_comparison(settings, path)
    settings.require_single_run()
    either = "run `sparknorm compare`, whose winner is registered, or `sparknorm train`"
    trained = find_trained(settings, remedy=either if take == "auto" else "run `sparknorm train`")
    why = "The newest training of `train` with these settings."
    return Candidate(trained, settings, _origin(trained, "train", why))


def _of_comparison(settings: Settings, path: str) -> Candidate:
    comparison = _read(path)
    import_from(settings.spark)  # there is no session that would do it
    settings, manifest = checks.open_dataset(settings)
    if manifest.digest != comparison.dataset.digest:
        raise ExportError(
            f"{path} compares trainings on {comparison.dataset.name} with digest {comparison.dataset.digest[:23]}…, "
            f"and {settings.dataset.path} has {manifest.digest[:23]}…: set dataset.path and dataset.version to the "
            "dataset of the comparison"
        )
    arm = best_arm(comparison)
    if arm is None:
        raise ExportError(f"every run in {path} diverged or did not learn: there is nothing to register")
    run = _run_of(comparison, arm, settings.registry.run)
    own = _settings_of(settings, comparison, run)
    trained = _load(own, manifest, run)
    parent, report = comparison.mlflow.parent_run_id, mask(storage.join(storage.absolute(settings.output), PAGE))
    origin = _origin(trained, "comparison", _why(comparison, arm, run, settings.registry.run))
    return Candidate(
        trained,
        own,
        origin.model_copy(update={"arm": arm.arm, "comparison_run": parent, "comparison_report": report}),
    )


def _read(path: str) -> Comparison:
    try:
        return Comparison.model_validate_json(storage.read_bytes(path))
    except FileNotFoundError:
        raise ExportError(
            f"there is no {path}: run `sparknorm compare` with these settings first, or set registry.take to train"
        ) from None
    except ValidationError as error:
        raise ExportError(
            f"{path} is damaged, or another version has written it ({error.error_count()} fields do not fit): compare "
            "again, or set registry.take to train"
        ) from error


def _run_of(comparison: Comparison, arm: ArmSummary, choice: str) -> ComparedRun:
    """The run of the arm with the seed that was asked for, of those that neither diverged nor failed to learn."""
    runs = [run for run in comparison.runs if run.arm == arm.arm and run.is_healthy]
    if choice == "first":
        return runs[0]
    ordered = sorted(runs, key=lambda run: run.score)
    return ordered[-1] if choice == "best" else ordered[(len(ordered) - 1) // 2]


def _why(comparison: Comparison, arm: ArmSummary, run: ComparedRun, choice: str) -> str:
    metric = comparison.metric.replace("_", " ")
    which = {"median": "the one in the middle", "best": "the highest", "first": "the first"}[choice]
    grade = f"; against the baseline: {arm.grade}" if arm.grade and arm.arm != comparison.baseline else ""
    return (
        f"The best arm of comparison {comparison.name} by mean {metric} on {comparison.evaluated_on}, {arm.words} "
        f"({100 * arm.score_mean:.2f}% over {arm.healthy} of {arm.n} seeds{grade}); of its seeds {which}, "
        f"seed {run.seed} with {100 * run.score:.2f}%."
    )


def _settings_of(settings: Settings, comparison: Comparison, run: ComparedRun) -> Settings:
    """Those that the run was trained with: the study's, which its file has, with the arm's values."""
    study = {name: comparison.settings[name] for name in ("model", "train", "reader")}
    tree = settings.model_dump() | study
    tree["compare"] = {**tree["compare"], "grid": {}}
    return Settings.model_validate(tree).with_values({**run.values, **run.tuned, "train.seed": run.seed})


def _load(settings: Settings, manifest: Manifest, run: ComparedRun) -> Trained:
    folder = run.checkpoint.split("/")[-3:][0]  # below the folder of trials, wherever that was moved to
    trial = trial_in(settings, manifest, storage.join(trials_folder(settings), folder))
    name = f"{settings.name} {run.arm} seed={run.seed}"
    result = TrialResult.model_validate({key: getattr(run, key) for key in TrialResult.model_fields})
    return load_trained(settings, manifest, trial, name, result)


def _origin(trained: Trained, kind: str, why: str) -> TrainingOrigin:
    return TrainingOrigin.model_validate(
        {
            "training": f"{trained.result.run_id} step {trained.result.steps}",
            "name": trained.name,
            "run_id": trained.result.run_id,
            "kind": kind,
            "why": why,
            "seed": trained.job.train.seed,
            "network": trained.job.model.network,
            "norm": trained.job.model.norm,
            "dataset": trained.manifest.name,
            "dataset_digest": trained.manifest.digest,
        }
    )
