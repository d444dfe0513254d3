"""What a rank asks of Spark: cores and GPUs for the training stage alone, and how many ranks the cluster can run now.

Spark's settings (spark.task.cpus, spark.task.resource.gpu.amount) hold for every stage of a session. A rank wants a GPU
and many cores, a task of the ETL one core and no GPU: with settings alone the ETL would leave most cores idle. So the
training stage gets a resource profile of its own. Never imports torch.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from pipeline.cluster.connect import is_connect
from pipeline.cluster.errors import LaunchError, ShortageError, spark_failures, spark_reason
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession


# How long an executor may take to answer the system's way, which needs no Python and no Java of it.
ANSWER_SECONDS = 5.0
# Executors that are asked at once.
ASKED_AT_ONCE = 64


def training_profile(workers: WorkerSettings) -> ResourceProfile | None:
    """What ``mapInArrow(profile=)`` takes for the training stage; None: the session's own spark.task.* settings.

    It has task requirements only, so it runs on the executors that are there; executors of another kind would need
    dynamic allocation, which barrier stages do not allow. Needs a session.
    """
    if workers.task_cpus is None and workers.task_gpus is None:
        return None
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    requests = TaskResourceRequests()
    if workers.task_cpus is not None:
        requests.cpus(workers.task_cpus)
    if workers.task_gpus is not None:
        requests.resource("gpu", workers.task_gpus)
    return ResourceProfileBuilder().require(requests).build


def slots(spark: SparkSession, workers: WorkerSettings) -> int | None:
    """Ranks that can run at once: the number that Spark's own scheduler compares with a barrier stage's tasks.

    None over Spark Connect, where a client cannot ask.

    Raises
    ------
    ValueError
        No executor of this cluster can have what ``workers.task_cpus`` and ``workers.task_gpus`` ask for.
    """
    profile = training_profile(workers)
    if profile is not None:
        _check(spark, workers)
    if is_connect(spark):
        return None
    scala = spark.sparkContext._jsc.sc()
    manager = scala.resourceProfileManager()
    if profile is None:
        return int(scala.maxNumConcurrentTasks(manager.defaultResourceProfile()))
    return int(scala.maxNumConcurrentTasks(_registered(manager, profile, workers)))


def wait_for_slots(spark: SparkSession, workers: WorkerSettings) -> None:
    """Return once the cluster can run all tasks at once. Spark itself would wait ten minutes in silence.

    Raises
    ------
    ShortageError
        It cannot, and ``workers.slots_wait_seconds`` have passed (none in local mode, where slots are fixed).
    """
    if str(spark.conf.get("spark.dynamicAllocation.enabled", "")).lower() == "true":
        raise LaunchError("barrier stages need fixed executors: set spark.dynamicAllocation.enabled=false")
    again = Retrying(
        retry=retry_if_exception_type(ShortageError),
        stop=stop_after_delay(0 if is_local(spark) else workers.slots_wait_seconds),
        wait=wait_fixed(0.5),
        reraise=True,
    )
    again(check_slots, spark, workers)


def check_slots(spark: SparkSession, workers: WorkerSettings) -> None:
    """Raise ShortageError where Spark says that there are fewer slots than workers."""
    number = slots(spark, workers)
    if number is None or number >= workers.count:
        return
    master = str(spark.sparkContext.master)
    asked = [f"{value} {what}" for value, what in ((workers.task_cpus, "cores"), (workers.task_gpus, "GPUs")) if value]
    each = f" of {' and '.join(asked)}" if asked else ""
    more = f"cores (master local[{workers.count}])" if is_local(spark) else "cores, GPUs or executors"
    fewer = f"set workers.count to at most {number}, or " if number else ""
    raise ShortageError(
        f"workers.count is {workers.count}, but {master} has {number} slots{each}: {fewer}give the cluster more {more}",
        number,
    )


def drop_cut_off_executors(spark: SparkSession) -> list[str]:
    """Let Spark give up the executors whose hosts no longer answer, and say which they are, each with host and port.

    Spark itself notices after a minute or two (spark.network.timeout) and would start the next gang on them until then.
    Where none answers at all, it is this driver that cannot reach executors, and they are left alone. Empty over Spark
    Connect, where a client knows no executors.
    """
    if is_connect(spark):
        return []
    try:
        places = _executors(spark)
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            answers = dict(zip(places, pool.map(_answers, places.values()), strict=True))
        cut_off = [name for name, answer in answers.items() if not answer] if any(answers.values()) else []
        for name in cut_off:
            spark.sparkContext._jsc.sc().killExecutor(name)
    except spark_failures():  # some platforms let nobody ask; what ended the training is the error to show
        return []
    return [f"executor {name} at {places[name]} does not answer" for name in cut_off]


def _executors(spark: SparkSession) -> dict[str, str]:
    """Host and port of each executor that Spark takes for alive, by its name."""
    listed = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    summaries = [listed.apply(index) for index in range(listed.size())]
    return {str(each.id()): str(each.hostPort()) for each in summaries if each.id() != "driver"}


def _answers(place: str) -> bool:
    """Whether the host of an executor says anything; that nobody listens at the port is an answer."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except OSError:
        return False
    return True


def is_local(spark: SparkSession) -> bool:
    """Whether slots cannot change: executors and driver are one process."""
    return not is_connect(spark) and _is_one_process(str(spark.sparkContext.master))


def _is_one_process(master: str) -> bool:
    return master.startswith("local") and not master.startswith("local-cluster")


def idle_gpus(spark: SparkSession, workers: WorkerSettings) -> str | None:
    """Advice where executors have GPUs of which ranks would be assigned none, and so would train on the CPU."""
    gpus = _number(spark, "spark.executor.resource.gpu.amount")
    by_task = spark.conf.get("spark.task.resource.gpu.amount", None)
    if workers.device == "cpu" or workers.task_gpus is not None or not gpus or by_task is not None:
        return None
    return (
        f"an executor has {gpus} GPUs, but neither workers.task_gpus nor spark.task.resource.gpu.amount assigns one to "
        "a rank: set workers.task_gpus=1 (or workers.device=cpu)"
    )


def java_versions(spark: SparkSession, workers: WorkerSettings) -> list[str]:
    """What executors run, asked of every partition of a small job, which Spark spreads over them.

    Raises
    ------
    ValueError
        Their major versions differ.
    """
    count = max(8, 4 * workers.count)
    ask = "java_method('java.lang.System', 'getProperty', 'java.version') AS version"
    rows = spark.range(0, count, 1, count).selectExpr(ask).distinct().collect()
    return equal_java(sorted({row.version for row in rows}))


def equal_java(versions: list[str]) -> list[str]:
    """The same list. Raises ValueError where major versions differ."""
    if len({version.partition(".")[0] for version in versions}) > 1:
        raise ValueError(f"executors run Java {' and '.join(versions)}: install one version everywhere")
    return versions


def _registered(manager: Any, profile: ResourceProfile, workers: WorkerSettings) -> Any:
    """Spark's own object for a profile, which its scheduler has to know before it can count."""
    java = profile._java_resource_profile
    # Asked again and again while executors register: one entry in Spark's table is enough.
    known = manager.getEquivalentProfile(java)
    if known.isDefined():
        return known.get()
    try:
        manager.addResourceProfile(java)
    except Exception as error:
        raise ValueError(f"{_asked(workers)}, which Spark refuses: {spark_reason(error)}") from error
    return java


def _check(spark: SparkSession, workers: WorkerSettings) -> None:
    """Raise what Spark would say later, in words of the settings that are wrong."""
    master = str(spark.conf.get("spark.master", ""))
    if _is_one_process(master):
        raise ValueError(
            f"{_asked(workers)}, but master {master} has no resource profiles (standalone, YARN and Kubernetes have): "
            "leave workers.task_cpus and workers.task_gpus out"
        )
    gpus = _number(spark, "spark.executor.resource.gpu.amount") or 0
    if workers.task_gpus is not None and workers.task_gpus > gpus:
        raise ValueError(
            f"workers.task_gpus is {workers.task_gpus}, but an executor has {gpus} GPUs: set workers.task_gpus to at "
            f"most that, or spark.executor.resource.gpu.amount to {workers.task_gpus} (see conf/spark/gpu-cluster.conf)"
        )
    cores = _number(spark, "spark.executor.cores")
    if workers.task_cpus is not None and cores is not None and workers.task_cpus > cores:
        raise ValueError(
            f"workers.task_cpus is {workers.task_cpus}, but an executor has {cores} cores: set workers.task_cpus to at "
            f"most {cores}, or spark.executor.cores to {workers.task_cpus}"
        )


def _asked(workers: WorkerSettings) -> str:
    wishes = {"workers.task_cpus": workers.task_cpus, "workers.task_gpus": workers.task_gpus}
    return " and ".join(f"{name} is {number}" for name, number in wishes.items() if number is not None)


def _number(spark: SparkSession, key: str) -> int | None:
    text = spark.conf.get(key, None)
    return int(text) if text is not None and text.isdigit() else None
