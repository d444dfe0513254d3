"""`doctor`: has this cluster everything that a training needs, on the driver and on every executor; if not, what to do.

Every launch makes the same checks but those of speed (`checks.check_trial` and `cluster.barrier` on the driver,
`cluster.task` and `training.job.facts` on each executor) and ends with the first that fails; here all are made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pipeline import storage
from pipeline.cluster import barrier, resources
from pipeline.cluster.errors import spark_reason
from pipeline.config.cluster import WorkerSettings
from pipeline.config.frozen import FrozenModel
from pipeline.config.import_path import is_import_path
from pipeline.config.secrets import mask
from pipeline.config.settings import Settings
from pipeline.data.manifest import Manifest
from pipeline.driver import checks
from pipeline.driver.gpu_checks import judge_gpus
from pipeline.storage.writable import prepare_output

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.training.probe import WorkerReport

FILE = "doctor.json"
# All checks of workers together take seconds; what takes longer than this hangs. Workers that wait for each other give
# up before that, and one that does not get on is named before that, so that there is a reason to show.
LIMIT_SECONDS, STALL_SECONDS, WAIT_SECONDS = 120.0, 90.0, 60.0
# Workers that Spark has ended live so long, and may write for the last time.
_LAST_SECONDS = 3.0
# With less free disk than this a training may run, and may fail.
LITTLE_BYTES = 2 << 30


State = Literal["ok", "warning", "failed", "skipped"]
Check = Callable[["_Examination"], str]


class Finding(FrozenModel):
    """One check and its outcome.

    detail : what was seen, and what to do where the state is not "ok"
    """

    check: str
    state: State
    detail: str


class DoctorResult(FrozenModel):
    """What ``doctor.json`` holds.

    healthy : whether no check failed or was skipped
    findings : in the order of the checks
    """

    healthy: bool
    findings: tuple[Finding, ...]


class CheckFailedError(Exception):
    """A check failed; its message says what to do."""


class DoubtfulError(Exception):
    """What a check saw may become a problem."""


def doctor(spark: SparkSession, settings: Settings) -> DoctorResult:
    """Make every check that can be made, and write the outcome as ``doctor.json`` into the output folder.

    A check that needs another one that failed is skipped. What fails is part of the result, not an exception; but
    where the output folder cannot be written, a NotWritableError says so.
    """
    prepare_output(settings.output, FILE)
    examination = _Examination(spark, settings)
    for name, check, needed in _CHECKS:
        examination.make(name, check, needed)
    findings = tuple(examination.findings.values())
    result = DoctorResult(healthy=all(each.state in ("ok", "warning") for each in findings), findings=findings)
    storage.publish_json(storage.join(settings.output, FILE), result)
    return result


@dataclass
class _Examination:
    """What is examined, and what is known so far.

    findings : by the name of the check
    reports : of the workers, once they have run
    """

    spark: SparkSession
    settings: Settings
    findings: dict[str, Finding] = field(default_factory=dict)
    reports: Sequence[WorkerReport] = ()
    _manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The dataset's, for checks that need the check "dataset"."""
        assert self._manifest is not None
        return self._manifest

    def make(self, name: str, check: Check, needed: Sequence[str]) -> None:
        missing = [need for need in needed if self.findings[need].state in ("failed", "skipped")]
        state: State
        if missing:
            state, detail = "skipped", f"needs: {', '.join(missing)}"
        else:
            state, detail = self._outcome(check)
        self.findings[name] = Finding(check=name, state=state, detail=mask(detail))

    def _outcome(self, check: Check) -> tuple[State, str]:
        try:
            return "ok", check(self)
        except DoubtfulError as doubt:
            return "warning", str(doubt)
        except (CheckFailedError, ValueError, RuntimeError, OSError) as error:
            return "failed", str(error).partition("\nTraceback")[0]
        except Exception as error:  # noqa: BLE001 - Spark's and MLflow's own kinds
            return "failed", spark_reason(error)

    def spark_settings(self) -> str:
        conf = self.spark.conf
        if str(conf.get("spark.dynamicAllocation.enabled", "")).lower() == "true":
            raise CheckFailedError("barrier stages need fixed executors: set spark.dynamicAllocation.enabled=false")
        if conf.get("spark.barrier.sync.timeout", None) is None:
            raise DoubtfulError(
                "spark.barrier.sync.timeout is not set, and Spark's own default is a year: set it to 300"
            )
        return f"Spark {self.spark.version}, fixed executors, spark.barrier.sync.timeout is set"

    def slots(self) -> str:
        size = checks.check_slots(self.spark, self.settings)
        slots = resources.slots(self.spark, self.settings.workers)
        if slots is None:
            raise DoubtfulError(
                f"over Spark Connect nobody says how many slots there are; {size} workers are tried below"
            )
        return f"{slots} slots for {size} workers"

    def java(self) -> str:
        return f"executors run Java {', '.join(checks.check_java(self.spark, self.settings))}"

    def dataset(self) -> str:
        self.settings, self._manifest = checks.open_dataset(self.settings)
        checks.check_dataset(self.settings, self._manifest)
        split = self._manifest.split("train")
        groups = sum(len(shard.row_groups) for shard in split.shards)
        lanes, sizes = self.settings.train.lanes, ", ".join(map(str, self.settings.train.world_sizes))
        return f"{split.rows:,} rows in {groups} row groups for {lanes} lanes, which {sizes} workers divide"

    def network(self) -> str:
        model = self.settings.model
        checks.send_own_network(self.spark, self.settings)
        count = checks.check_network(self.settings, self.manifest)
        if is_import_path(model.network):
            checks.check_executors_import(self.spark, self.settings)
        return f"{model.network} with norm {model.norm}: {count:,} parameters"

    def tracking(self) -> str:
        from pipeline.tracking import Tracker
        from pipeline.tracking.client import store_name

        Tracker(self.settings.tracking)
        return f"{store_name()} answers"

    def workers(self) -> str:
        """Start workers as a training would (rendezvous, equal versions, devices), and let each report on its host."""
        from pipeline.training.probe import ProbeTask, probe

        settings, token = self.settings, uuid.uuid4().hex
        folder = storage.join(storage.absolute(settings.output), f"doctor-{token[:8]}")
        size, lowered = checks.check_slots(self.spark, settings), settings.workers.stall_seconds > STALL_SECONDS
        task = ProbeTask(folder, token, storage.absolute(settings.dataset.path), settings.dataset.version)
        storage.publish(storage.join(folder, "driver"), token.encode())
        try:
            self.reports = barrier.run(
                self.spark, probe, (task,), workers=_impatient(settings.workers, size),
                folder=folder, is_shared=False, limit_seconds=LIMIT_SECONDS,
                stall_name="the limit of doctor" if lowered else "workers.stall_seconds",
            )  # fmt: skip
        except BaseException:
            time.sleep(_LAST_SECONDS)
            with suppress(Exception), storage.retry_for(_LAST_SECONDS):  # the error of the workers is the one to show
                storage.remove(folder)
            raise
        storage.remove(folder)
        hosts = sorted({report.host for report in self.reports})
        return f"{size} on {', '.join(hosts)}, Python {self.reports[0].python}, equal packages"

    def shared_storage(self) -> str:
        problems = [f"rank {each.rank} on {each.host}: {text}" for each in self.reports for text in each.problems]
        if problems:
            raise CheckFailedError("; ".join(problems))
        return "every worker sees what the driver and the others write, and can replace a file"

    def same_dataset(self) -> str:
        for report in self.reports:
            if report.digest != self.manifest.digest:
                raise CheckFailedError(
                    f"rank {report.rank} on {report.host} sees another dataset at {self.settings.dataset.path}: "
                    "set dataset.path to a place that all share"
                )
        return f"every worker sees {self.manifest.digest[:19]}"

    def jpeg(self) -> str:
        if self.manifest.image.encoding != "jpeg":
            return f"not needed: images are stored as {self.manifest.image.encoding}"
        return check_jpeg(self.reports)

    def disk(self) -> str:
        return check_disk(self.reports)

    def gpus(self) -> str:
        if self.settings.workers.device == "auto" and not any(report.gpu for report in self.reports):
            return "Spark assigned none: training is on CPU"
        return check_gpus(self.reports, bf16=self.settings.train.bf16)

    def exchange(self) -> str:
        if len(self.reports) == 1:
            return "one worker alone"
        slowest = max(report.exchange_seconds for report in self.reports)
        ways = dict.fromkeys(f"{report.host} by {report.endpoint}" for report in self.reports if report.endpoint)
        return f"4 MiB are summed over {len(self.reports)} workers in {1000 * slowest:.1f} ms: {', '.join(ways)}"


def _impatient(workers: WorkerSettings, count: int) -> WorkerSettings:
    """So many workers, which say what keeps them before the time for all checks is over."""
    return workers.model_copy(
        update={
            "count": count,
            "collective_timeout_seconds": min(workers.collective_timeout_seconds, WAIT_SECONDS),
            "stall_seconds": min(workers.stall_seconds, STALL_SECONDS),
        }
    )


def check_disk(reports: Sequence[WorkerReport]) -> str:
    """Describe the fullest of the disks that the workers reported.

    Raises
    ------
    CheckFailedError
        It has no room for a checkpoint.
    DoubtfulError
        It has little room.
    """
    free = [(each.local_free_bytes, "local", each.host) for each in reports]
    free += [(each.output_free_bytes, "output", each.host) for each in reports if each.output_free_bytes is not None]
    least, disk, host = min(free)
    text = f"{least / 2**30:.1f} GiB free on the {disk} disk of {host}"
    if least < storage.LEAST_FREE_BYTES:
        raise CheckFailedError(f"{text}: make room, or set `output` to another place")
    if least < LITTLE_BYTES:
        raise DoubtfulError(f"{text}: checkpoints and Spark's own files may not fit")
    return f"at least {text}"


def check_jpeg(reports: Sequence[WorkerReport]) -> str:
    """Describe what decodes JPEG images on the workers.

    Raises
    ------
    DoubtfulError
        Some decode all of them with Pillow: the same pixels, more slowly.
    """
    without = {each.host: each.without_simplejpeg for each in reports if each.without_simplejpeg is not None}
    if without:
        raise DoubtfulError(
            "; ".join(f"on {host}, {reason}" for host, reason in without.items())
            + ": Pillow decodes the same pixels there, more slowly; install simplejpeg for the executors' Python"
        )
    return "baseline files are decoded by simplejpeg, others by Pillow"


def check_gpus(reports: Sequence[WorkerReport], *, bf16: bool) -> str:
    """Describe the devices of the workers.

    Raises
    ------
    CheckFailedError
        A training cannot run on them.
    DoubtfulError
        It may fail or be slow there.
    """
    devices = ", ".join(f"rank {each.rank}: {each.device}" + (f" ({each.gpu})" if each.gpu else "") for each in reports)
    ranks = {each.rank: (each.host, each.gpu_facts) for each in reports if each.gpu_facts is not None}
    if not ranks:
        return devices
    verdict = judge_gpus(ranks, bf16=bf16)
    if verdict.failures:
        raise CheckFailedError("; ".join([*verdict.failures, *verdict.doubts]))
    if verdict.doubts:
        raise DoubtfulError("; ".join(verdict.doubts))
    return f"{devices}; {verdict.summary}"


# Name, check, and the names of the checks that it needs.
_CHECKS: tuple[tuple[str, Check, tuple[str, ...]], ...] = (
    ("Spark settings", _Examination.spark_settings, ()),
    ("slots", _Examination.slots, ()),
    ("Java", _Examination.java, ()),
    ("dataset", _Examination.dataset, ()),
    ("network", _Examination.network, ("dataset",)),
    ("tracking", _Examination.tracking, ()),
    ("workers", _Examination.workers, ("Spark settings", "slots")),
    ("storage", _Examination.shared_storage, ("workers",)),
    ("same dataset", _Examination.same_dataset, ("workers", "dataset")),
    ("JPEG decoding", _Examination.jpeg, ("workers", "dataset")),
    ("disk", _Examination.disk, ("workers",)),
    ("GPUs", _Examination.gpus, ("workers",)),
    ("network between workers", _Examination.exchange, ("workers",)),
)
