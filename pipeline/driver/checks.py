"""What must hold before a training is launched: `check_trial` makes every check, `doctor` shows each by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.cluster import elastic, resources
from pipeline.cluster.connect import with_files
from pipeline.config import auto
from pipeline.config.import_path import is_import_path
from pipeline.config.settings import Settings
from pipeline.console import console
from pipeline.data import load_manifest
from pipeline.data.manifest import Manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Sessions whose executors were asked for their Java: one small job for all trials of a session.
_JAVA_CHECKED: weakref.WeakSet[SparkSession] = weakref.WeakSet()

# Sessions whose executors have imported networks: import path and digest of each.
_IMPORT_CHECKED: weakref.WeakKeyDictionary[SparkSession, set[tuple[str, str]]] = weakref.WeakKeyDictionary()


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
    resolved = auto.resolve(settings, rows)
    tell([auto.words(settings, resolved, rows)])
    return resolved, manifest


def tell(sentences: Iterable[str]) -> None:
    """Show sentences that a person should read before training."""
    for sentence in sentences:
        console.print(f"note: {sentence}", soft_wrap=True)


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
        Dataset, batch size, lanes, network, norm and weights do not fit each other, executors run several versions of
        Java, or a network of one's own cannot be imported on each of them.
    LaunchError
        There are fewer slots than workers.
    """
    manifest = check_dataset(settings, manifest)
    send_own_network(spark, settings)
    check_network(settings, manifest)
    check_slots(spark, settings)
    if spark not in _JAVA_CHECKED:
        check_java(spark, settings)
        _JAVA_CHECKED.add(spark)
    if is_import_path(settings.model.network):
        check_executors_import(spark, settings)
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
    """Build the network for the dataset's images and classes once, and return its number of parameters.

    One of your own is also tried on a batch. Pretrained weights are loaded, and what is to be frozen is.
    """
    from pipeline.training.network import network_for
    from pipeline.training.pretrained import check_pretrained

    if is_import_path(settings.model.network):
        from pipeline.training.own_network import check_own_network

        count = check_own_network(settings.model, manifest, settings.train, settings.workers).parameters
    else:
        from models.recompute import recompute_in_backward

        network = network_for(settings.model, manifest)
        if settings.train.gradient_checkpointing:
            recompute_in_backward(network[1])
        count = sum(parameter.numel() for parameter in network.parameters())
    check_pretrained(settings.model, settings.train, manifest)
    return count


def network_notes(settings: Settings, manifest: Manifest) -> list[str]:
    """What a person should know of a network of their own, and of weights that it starts from, as sentences."""
    from pipeline.training.pretrained import check_pretrained

    notes = list(check_pretrained(settings.model, settings.train, manifest).notes)
    if not is_import_path(settings.model.network):
        return notes
    from pipeline.training.own_network import check_own_network

    return [*check_own_network(settings.model, manifest, settings.train, settings.workers).notes, *notes]


def check_slots(spark: SparkSession, settings: Settings) -> int:
    """Wait for the slots that the workers need, and return the number of workers that fit."""
    sizes = partial(settings.train.allows, norm_statistics=settings.model.norm_statistics)
    return elastic.world_size(spark, settings.workers, sizes)


def check_java(spark: SparkSession, settings: Settings) -> list[str]:
    """Return the versions of Java that executors run, which must be of one feature release."""
    return resources.java_versions(spark, settings.workers)


def send_own_network(spark: SparkSession, settings: Settings) -> None:
    """Let executors, and the driver, import from ``spark.py_files`` in a session that was not made with these settings.

    That is what notebooks and spark-submit bring, where only a network of one's own needs it.
    """
    if is_import_path(settings.model.network):
        with_files(spark, settings.spark)


def check_executors_import(spark: SparkSession, settings: Settings) -> str:
    """Ask every partition of a small job to import the network, and return the digest of its source.

    Spark spreads the partitions over the executors; each rank compares it once more before it trains.

    Raises
    ------
    ValueError
        An executor cannot import it, or imports other source than the driver.
    """
    from pipeline.training.job import source_identity

    network = settings.model.network
    (digest,) = source_identity(network).values()
    asked = _IMPORT_CHECKED.setdefault(spark, set())
    if (network, digest) not in asked:
        count = max(4, 2 * settings.workers.count)

        def body(batches: Iterator[Any]) -> Iterator[Any]:
            from pipeline.training.own_network import import_problems  # where torch is

            yield from import_problems(batches, network, digest)

        rows = spark.range(0, count, 1, count).mapInArrow(body, "problem string").distinct().collect()
        if problems := sorted(row.problem for row in rows):
            raise ValueError(problems[0])
        asked.add((network, digest))
    return digest
