"""`train`: one training of the settings as they stand, for the command line, notebooks and programs alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.storage.writable import prepare_output

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.data import Manifest
    from pipeline.report.comparison import TrialResult

FILE = "train.json"


def train(spark: SparkSession, settings: Settings) -> TrialResult:
    """Train one network on the workers of a barrier stage, log it as one MLflow run, and write ``train.json``.

    The same call after a driver that was killed goes on where that was, in the same MLflow run.

    Parameters
    ----------
    spark : the session whose executors train
    settings : of one training; ``train.json`` goes into ``settings.output``

    Raises
    ------
    SettingsError
        A setting lists several values.
    ValueError
        Dataset, network, norm and settings do not fit each other, MLflow cannot be reached, or a place that settings
        name cannot be written.
    LaunchError
        There are fewer slots than workers.
    WorkerError
        The training failed on a worker, and again from its newest checkpoint.
    BusyError
        Another process is at the same training.
    TakenOverError
        This process gave no sign of life for so long that another one has taken the training over.
    """
    from pipeline.driver import checks, dataset_checks
    from pipeline.driver.trial import run_trial
    from pipeline.tracking import Tracker

    settings.require_single_run()
    prepare_output(settings.output, FILE)
    settings, manifest = checks.open_dataset(settings)
    checks.check_trial(spark, settings, manifest)
    checks.tell(checks.network_notes(settings, manifest))
    checks.tell(dataset_checks.check_classes(manifest, settings.train.evaluate_on, compared=False))
    tracker = Tracker(settings.tracking)
    name = training_name(settings)
    result = run_trial(spark, settings, tracker, name=name, manifest=manifest, norm=settings.model.norm)
    storage.publish_json(storage.join(settings.output, FILE), result)
    checks.tell(_did_not_learn(result, manifest, settings.train.evaluate_on))
    return result


def _did_not_learn(result: TrialResult, manifest: Manifest, split: str) -> list[str]:
    """What to say of a training whose network is no better than the same answer to every image."""
    from pipeline.report.learned import constant_score, learned, metric_for, score_of

    counts = manifest.splits[split].label_counts
    metric = metric_for("auto", counts)
    if result.diverged or learned(result.recall, metric, counts):
        return []
    return [
        f"the network did not learn: its {metric.replace('_', ' ')} of {score_of(result, metric):.2%} on the {split} "
        f"split is not above {constant_score(metric, counts):.2%}, which the same answer to every image has, beyond "
        "chance; try another train.learning_rate, or more train.epochs"
    ]


def training_name(settings: Settings) -> str:
    """The name of the one training that `train` does with these settings, by which `export` finds it."""
    return f"{settings.name} {settings.model.norm} seed={settings.train.seed}"
