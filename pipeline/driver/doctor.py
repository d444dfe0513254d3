"""`doctor`: is everything there that a training needs, on the driver and on every executor; and if not, what to do.

Every launch makes the same checks but those of speed (`trial.check_trial` and `barrier` on the driver, `gang` and
`job.facts` on each executor) and ends with the first that fails; here all are made, and all are told.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster import barrier, resources
from pipeline.cluster.session import spark_reason
from pipeline.config.settings import Settings
from pipeline.data.manifest import load as load_manifest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# All checks together take seconds; what takes longer than this hangs.
LIMIT_SECONDS = 120.0
LITTLE_BYTES = 2 << 30


@dataclass(frozen=True)
class Finding:
    """state : "ok", "warning", "failed" or "skipped"; detail says what was seen, and what to do where it is not ok"""

    check: str
    state: str
    detail: str


class _ProblemError(Exception):
    """A check that failed."""


class _DoubtError(Exception):
    """A check whose result may be a problem."""


def examine(spark: SparkSession, settings: Settings) -> list[Finding]:
    """Make every check that can be made; one that needs another that failed is skipped. Raises nothing."""
    findings: list[Finding] = []

    def check(name: str, look: Callable[[], str], *needs: str) -> None:
        missing = [need for need in needs if _state(findings, need) in ("failed", "skipped")]
        if missing:
            findings.append(Finding(name, "skipped", f"needs: {', '.join(missing)}"))
            return
        try:
            findings.append(Finding(name, "ok", look()))
        except _DoubtError as doubt:
            findings.append(Finding(name, "warning", str(doubt)))
        except (_ProblemError, ValueError, RuntimeError, OSError) as error:
            findings.append(Finding(name, "failed", str(error).partition("\nTraceback")[0]))
        except Exception as error:  # noqa: BLE001 - Spark's and MLflow's own kinds
            findings.append(Finding(name, "failed", spark_reason(error)))

    reports: list[dict[str, Any]] = []
    check("Spark settings", lambda: _spark_settings(spark))
    check("slots", lambda: _slots(spark, settings))
    check("Java", lambda: _java(spark, settings))
    check("dataset", lambda: _dataset(settings))
    check("network", lambda: _network(settings), "dataset")
    check("tracking", lambda: _tracking(settings))
    check("workers", lambda: _workers(spark, settings, reports), "Spark settings", "slots")
    check("storage", lambda: _storage(reports), "workers")
    check("same dataset", lambda: _same_dataset(settings, reports), "workers", "dataset")
    check("disk", lambda: _disk(reports), "workers")
    check("GPUs", lambda: _gpus(settings, reports), "workers")
    check("network between workers", lambda: _exchange(reports), "workers")
    return findings


def _state(findings: list[Finding], check: str) -> str:
    return next(finding.state for finding in findings if finding.check == check)


def _spark_settings(spark: SparkSession) -> str:
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise _ProblemError("barrier stages need fixed executors: set spark.dynamicAllocation.enabled=false")
    if spark.conf.get("spark.barrier.sync.timeout", None) is None:
        raise _DoubtError("spark.barrier.sync.timeout is not set, and Spark's own default is a year: set it to 300")
    return f"Spark {spark.version}, fixed executors, spark.barrier.sync.timeout is set"


def _slots(spark: SparkSession, settings: Settings) -> str:
    from pipeline.cluster import elastic

    size = elastic.world_size(spark, settings.workers, settings.train.world_sizes.__contains__)
    slots = resources.slots(spark, settings.workers)
    if slots is None:
        raise _DoubtError(f"over Spark Connect nobody says how many slots there are; {size} workers are tried below")
    return f"{slots} slots for {size} workers"


def _java(spark: SparkSession, settings: Settings) -> str:
    versions = resources.java_versions(spark, settings.workers)
    return f"executors run Java {', '.join(versions)}"


def _dataset(settings: Settings) -> str:
    from pipeline.data.loader import check_data

    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    check_data(manifest, settings.train, settings.reader, settings.workers.count)
    split = manifest.split("train")
    groups = sum(len(shard.row_groups) for shard in split.shards)
    lanes, sizes = settings.train.lanes, ", ".join(map(str, settings.train.world_sizes))
    return f"{split.rows:,} rows in {groups} row groups for {lanes} lanes, which {sizes} workers divide"


def _network(settings: Settings) -> str:
    from models import build_model

    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    model = build_model(settings.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{settings.model.network} with norm {settings.model.norm}: {count:,} parameters"


def _tracking(settings: Settings) -> str:
    from pipeline.tracking.tracker import Tracker, store_name

    Tracker(settings.tracking)
    return f"{store_name()} answers"


def _workers(spark: SparkSession, settings: Settings, reports: list[dict[str, Any]]) -> str:
    """Start the gang as a training would: rendezvous, equal versions, devices; then let each worker look around."""
    from pipeline.cluster import elastic
    from pipeline.driver.probe import Task, probe

    token = uuid.uuid4().hex
    folder = storage.join(storage.absolute(settings.output), f"doctor-{token[:8]}")
    size = elastic.world_size(spark, settings.workers, settings.train.world_sizes.__contains__)
    workers = settings.workers.model_copy(update={"count": size})
    task = Task(folder, token, storage.absolute(settings.dataset.path), settings.dataset.version)
    storage.publish(storage.join(folder, "driver"), token.encode())
    try:
        reports += barrier.run(spark, probe, (task,), workers=workers, limit_seconds=LIMIT_SECONDS)
    finally:
        storage.remove(folder)
    hosts = sorted({report["host"] for report in reports})
    return f"{size} on {', '.join(hosts)}, Python {reports[0]['python']}, equal packages"


def _storage(reports: list[dict[str, Any]]) -> str:
    problems = [f"rank {r['rank']} on {r['host']}: {text}" for r in reports for text in r["problems"]]
    if problems:
        raise _ProblemError("; ".join(problems))
    return "every worker sees what the driver and the others write, and can replace a file"


def _same_dataset(settings: Settings, reports: list[dict[str, Any]]) -> str:
    ours = load_manifest(settings.dataset.path, settings.dataset.version).digest
    for report in reports:
        if report["digest"] != ours:
            raise _ProblemError(
                f"rank {report['rank']} on {report['host']} sees another dataset at {settings.dataset.path}: "
                "set dataset.path to a place that all share"
            )
    return f"every worker sees {ours[:19]}"


def _disk(reports: list[dict[str, Any]]) -> str:
    free = [(b, r, what) for r in reports for what, b in r["free_bytes"].items() if b is not None]
    least, report, what = min(free, key=lambda entry: entry[0])
    text = f"{least / 2**30:.1f} GiB free on the {what} disk of {report['host']}"
    if least < storage.LEAST_FREE_BYTES:
        raise _ProblemError(f"{text}: make room, or set `output` to another place")
    if least < LITTLE_BYTES:
        raise _DoubtError(f"{text}: checkpoints and Spark's own files may not fit")
    return f"at least {text}"


def _gpus(settings: Settings, reports: list[dict[str, Any]]) -> str:
    devices = ", ".join(f"rank {r['rank']}: {r['device']}" + (f" ({r['gpu']})" if r["gpu"] else "") for r in reports)
    if settings.workers.device == "auto" and not any(report["gpu"] for report in reports):
        return "Spark assigned none: training is on CPU"
    return devices


def _exchange(reports: list[dict[str, Any]]) -> str:
    slowest = max(report["exchange_seconds"] for report in reports)
    if len(reports) == 1:
        return "one worker alone"
    return f"4 MiB are summed over {len(reports)} workers in {1000 * slowest:.1f} ms"


def healthy(findings: list[Finding]) -> bool:
    return all(finding.state in ("ok", "warning") for finding in findings)
