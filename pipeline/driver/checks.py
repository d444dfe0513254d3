"""What must hold before a training is launched: `check_trial` makes every check, `doctor` shows each by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.cluster import elastic, resources
from pipeline.config import auto
from pipeline.config.settings import Settings
from pipeline.console import console
from pipeline.data import load_manifest
from pipeline.data.manifest import Manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Sessions whose executors were asked for their Java: one small job for all trials of a session.
_JAVA_CHECKED: weakref.WeakSet[SparkSession] = weakref.WeakSet()


def open_dataset(settings: Settings) -> tuple[Settings, Manifest]:
    """Load the dataset's manifest, and put numbers in the place of ``auto``, which it decides.

    Every command that trains, or asks what was trained, begins with this. It is the only place where ``auto`` ends.

    Raises
    ------
    ValueError
        There is no dataset, or a number that is found does not go with the other settings.
    """
    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    if not auto.is_undecided(settings):
        return settings, manifest
    rows = manifest.split("train").rows
    settings = auto.resolve(settings, rows)
    tell([auto.words(settings, rows)])
    return settings, manifest


def tell(sentences: Iterable[str]) -> None:
    """Show sentences that a person should read before training."""
    for sentence in sentences:
        console.print(f"note: {sentence}", highlight=False, soft_wrap=True, markup=False)


def check_trial(spark: SparkSession, settings: Settings, manifest: Manifest | None = None) -> Manifest:
    """Find everything that can be wrong before an MLflow run is opened or a worker launched.

    Parameters
    ----------
    manifest : of the dataset, where it is loaded already

    Returns
    -------
    Manifest
        Of the dataset, for all that comes after.

    Raises
    ------
    ValueError
        Dataset, batch size, lanes, network and norm do not fit each other, or executors run several versions of Java.
    LaunchError
        There are fewer slots than workers.
    """
    manifest = check_dataset(settings, manifest)
    check_network(settings, manifest)
    check_slots(spark, settings)
    if spark not in _JAVA_CHECKED:
        check_java(spark, settings)
        _JAVA_CHECKED.add(spark)
    return manifest


def check_dataset(settings: Settings, manifest: Manifest | None = None) -> Manifest:
    """Load the dataset's manifest, unless it is given, and check that it can be trained on with these settings."""
    from pipeline.data.loader import check_data
    from pipeline.training.class_weights import weights_of

    manifest = manifest or load_manifest(settings.dataset.path, settings.dataset.version)
    check_data(manifest, settings.train, settings.reader, settings.workers.count)
    weights_of(settings.train, manifest)
    return manifest


def check_network(settings: Settings, manifest: Manifest) -> int:
    """Build the network for the dataset's images and classes once, and return its number of parameters."""
    from pipeline.training.network import network_for

    network = network_for(settings.model, manifest)
    return sum(parameter.numel() for parameter in network.parameters())


def check_slots(spark: SparkSession, settings: Settings) -> int:
    """Wait for the slots that the workers need, and return the number of workers that fit."""
    return elastic.world_size(spark, settings.workers, settings.train.world_sizes.__contains__)


def check_java(spark: SparkSession, settings: Settings) -> list[str]:
    """Return the versions of Java that executors run, which must be of one feature release."""
    return resources.java_versions(spark, settings.workers)
