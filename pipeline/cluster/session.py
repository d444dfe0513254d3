"""A SparkSession: the one that is active, or one made from the settings, here or on a Spark Connect server."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.cluster.connect import connect_session, with_files
from pipeline.cluster.errors import spark_failures, spark_reason
from pipeline.config.cluster import SparkSettings
from pipeline.config.secrets import SPARK_REDACTION, is_secret, mask
from pipeline.java import require_java, without_incubator_warning

if TYPE_CHECKING:
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

LOGGING = Path(__file__).with_name("log4j2.properties").absolute()
_START = "Spark does not start with spark.master {} and spark.conf as they are"
# Lines that Java writes beside the one that says why it ends.
_NO_REASON = ("Error: Could not create the Java", "Error: A fatal exception", "Error occurred during init", "Picked up",
              "NOTE: Picked up", "WARNING: ")  # fmt: skip
# What decides how Java itself starts: once it runs, another value has no effect.
_OF_JAVA = ("spark.driver.memory", "spark.driver.extraJavaOptions", "spark.driver.extraClassPath",
            "spark.driver.extraLibraryPath", "spark.jars.packages")  # fmt: skip
# The properties that the Java of this process was given here when it was started. It is the same one for every later
# session of this process, which would have them too.
_given_to_java: dict[str, str] = {}
# Where the Java of this process binds: the variable is read by Java alone, and kept from what this process starts.
_LOCAL_IP = "SPARK_LOCAL_IP"


class SessionError(RuntimeError):
    """Spark could not be started; the message names the settings that decide."""


def get_session(settings: SparkSettings, app_name: str, *, trains: bool = False) -> SparkSession:
    """The active session (a notebook, Databricks), that of spark-submit, or a new one on ``settings.master``.

    Parameters
    ----------
    app_name
        The application's name in Spark's own pages.
    trains
        A new session on this machine keeps torch ready for its Python workers (`daemon.py`), which takes it seconds at
        its first Python task.

    Raises
    ------
    JavaError
        A session must be made here, and Java is missing or too old.
    ConnectError
        The master, or the environment's SPARK_REMOTE, is the address of a Spark Connect server that cannot be used.
    SessionError
        Spark does not start with ``settings.master`` and ``settings.conf``, or its master cannot be reached.
    FileNotFoundError
        A file of ``settings.py_files`` is missing.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    _quiet_query_log()
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit has set master and properties already
        return SparkSession.builder.appName(app_name).getOrCreate()
    remote = os.environ.get("SPARK_REMOTE")
    if settings.master.startswith("sc://"):
        return connect_session(settings.master, "spark.master", settings, app_name)
    if remote is not None:
        return connect_session(remote, "SPARK_REMOTE", settings, app_name)
    return with_files(_classic_session(settings, app_name, trains), settings)


def _quiet_query_log() -> None:
    """Leave out pyspark's own account of a failed query, a line of JSON with Java's stack: the error is raised too."""
    with suppress(ImportError):  # Spark before 4.0 has none
        from pyspark.logger import PySparkLogger

        for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
            PySparkLogger.getLogger(name).setLevel(logging.CRITICAL)


def _classic_session(settings: SparkSettings, app_name: str, trains: bool) -> SparkSession:
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    require_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    _leave_earlier_session(settings)
    properties = {**_defaults(settings.master, trains), **_driver_host(settings), **settings.conf}
    builder = SparkSession.builder.appName(app_name).master(settings.master)
    for key, value in properties.items():
        builder = builder.config(key, value)
    try:
        _start_context(SparkConf().setAppName(app_name).setMaster(settings.master).setAll(list(properties.items())))
        return builder.getOrCreate()
    except spark_failures() as error:
        reason = spark_reason(error)
        if "stopped SparkContext" in reason:  # Spark gave up after a minute, and says why in its own log alone
            reason = "no master answers there, or it refuses the application"
        raise SessionError(f"{_START.format(mask(settings.master))}: {reason}") from error


def _start_context(conf: SparkConf) -> None:
    """Start the JVM and its SparkContext, unless this process has a JVM already.

    `SparkSession.builder` would do the same, and let the JVM write a warning about a module that Spark's launcher
    always asks for; and it would show the secrets among the properties to whoever lists the machine's processes.
    """
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway

    if SparkContext._gateway is not None:
        return
    shown = {key: value for key, value in conf.getAll() if not is_secret(key)}
    try:
        with without_incubator_warning(mask) as errors, _local_address(conf.get("spark.master") or ""):
            # Java writes its own first errors to standard output, which is for a command's result alone.
            options = {"stdout": errors, "stderr": errors}
            gateway = launch_gateway(SparkConf().setAll(list(shown.items())), popen_kwargs=options)
    except PySparkRuntimeError as error:
        lines = errors.held_lines()
        log.debug("Java wrote: %s", "\n".join(lines))
        raise SessionError(f"{_START.format(mask(conf.get('spark.master') or ''))}: {_java_reason(lines)}") from error
    _given_to_java.update(shown)
    SparkContext(conf=conf, gateway=gateway)


@contextmanager
def _local_address(master: str) -> Iterator[None]:
    """Have a Java that is started in the block bind to this machine alone, where the master is a local one."""
    if not master.startswith("local") or _LOCAL_IP in os.environ:
        yield
        return
    os.environ[_LOCAL_IP] = "127.0.0.1"
    try:
        yield
    finally:
        del os.environ[_LOCAL_IP]


def _leave_earlier_session(settings: SparkSettings) -> None:
    """Have a Java that was started here for an earlier session forget the properties of that.

    Raises
    ------
    SessionError
        It cannot do what these settings ask for.
    """
    from pyspark import SparkContext

    if SparkContext._jvm is None or SparkContext._active_spark_context is not None:
        return
    for key in _OF_JAVA:
        if key in settings.conf and _given_to_java and settings.conf[key] != _given_to_java.get(key):
            raise SessionError(
                f"{key} decides how Java starts, and this process has started it for an earlier session without that "
                "value: restart Python"
            )
    java: Any = SparkContext._jvm
    for key in _given_to_java:
        java.java.lang.System.clearProperty(key)
    with suppress(*spark_failures()):  # those of spark-defaults.conf that the earlier session had other values of
        java.org.apache.spark.util.Utils.loadDefaultSparkProperties(java.org.apache.spark.SparkConf(False), None)


def _driver_host(settings: SparkSettings) -> dict[str, str]:
    """The property with the address of this machine that a cluster reaches, where Java would give out the loopback
    address: it was started here for a local master, and its environment stays as it was.

    Raises
    ------
    SessionError
        The master's address does not tell which one it is.
    """
    from pyspark import SparkContext

    java: Any = SparkContext._jvm
    is_bound = java is not None and _LOCAL_IP not in os.environ and java.java.lang.System.getenv(_LOCAL_IP) is not None
    if not is_bound or settings.master.startswith("local") or "spark.driver.host" in settings.conf:
        return {}
    try:
        return {"spark.driver.host": _address_towards(settings.master)}
    except (OSError, ValueError) as error:
        raise SessionError(
            f"{mask(settings.master)} cannot follow a local master in one process, since Java would give executors the "
            "loopback address of the driver: restart Python, or set spark.conf.spark.driver.host"
        ) from error


def _address_towards(master: str) -> str:
    """The address of this machine from which a standalone master (``spark://HOST:PORT``) is reached.

    Raises
    ------
    ValueError
        It is the address of no such master.
    OSError
        Its host is not known, or there is no way to it.
    """
    if not master.startswith("spark://"):
        raise ValueError(f"{mask(master)} names no host")
    first = urlsplit(master.partition(",")[0])
    for family, kind, _, _, address in socket.getaddrinfo(first.hostname, first.port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:  # nothing is sent: the system chooses an address
            probe.connect(address)
            return str(probe.getsockname()[0])
    raise OSError(f"{first.hostname} has no address")


def _java_reason(lines: Sequence[str]) -> str:
    """The line of what Java wrote before it ended that says why."""
    told = [line for line in lines if line.strip() and not line[0].isspace() and not line.startswith(_NO_REASON)]
    return told[0].removeprefix('Exception in thread "main" ') if told else "Java ended without a word"


def _defaults(master: str, trains: bool) -> dict[str, str]:
    properties = {
        "spark.ui.showConsoleProgress": "false",  # the commands draw their own progress
        "spark.barrier.sync.timeout": "300",  # seconds; Spark's own default is a year
        # Bounds Spark's own wait for slots, should they vanish between our check and the launch.
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "5s",
        "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "12",
        "spark.redaction.regex": SPARK_REDACTION,
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={LOGGING.as_uri()}",
    }
    if master.startswith("local"):
        properties |= {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.ui.enabled": "false",
        }
    if trains:
        # A Python worker whose task was cancelled is ended so soon; Spark's own 2 s hold up the next trial of a search.
        properties["spark.python.task.killTimeout"] = "200ms"
    if trains and master.startswith("local["):
        properties["spark.python.daemon.module"] = "pipeline.daemon"
    return properties
