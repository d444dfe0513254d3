"""A SparkSession: the one that is there, or one made from the settings, here or on a Spark Connect server."""

from __future__ import annotations

import atexit
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.cluster import SparkSettings
from pipeline.java import require_java

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGING = Path(__file__).with_name("log4j2.properties").absolute()
# How long a Connect server may take to answer at first, and later, about, to come back. pyspark itself would try for
# ten minutes, at every call.
CONNECT_SECONDS, OUTAGE_SECONDS = 10, 60
_SHIP = "; give executors the code: spark.py_files=[dist/sparknorm.zip], or spark-submit --py-files"


class ConnectError(RuntimeError):
    """There is no Spark Connect session to be had; the message names the address and where it is set."""


def get_session(settings: SparkSettings, app_name: str, *, trains: bool = False) -> SparkSession:
    """The active session (a notebook, Databricks), that of spark-submit, or a new one on ``settings.master``.

    Parameters
    ----------
    trains : a new session on this machine keeps torch ready for its Python workers (`daemon.py`), which takes it
        seconds at its first Python task

    Raises
    ------
    JavaError
        A session must be made here, and Java is missing or too old.
    ConnectError
        The master, or the environment's SPARK_REMOTE, is the address of a Spark Connect server that cannot be used.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit has set master and properties already
        return SparkSession.builder.appName(app_name).getOrCreate()
    remote = os.environ.get("SPARK_REMOTE")
    if settings.master.startswith("sc://"):
        return _connect(settings.master, "spark.master", settings, app_name)
    if remote is not None:
        return _connect(remote, "SPARK_REMOTE", settings, app_name)
    require_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if settings.master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    builder = SparkSession.builder.appName(app_name).master(settings.master)
    for key, value in {**_defaults(settings.master, trains), **settings.conf}.items():
        builder = builder.config(key, value)
    return _with_files(builder.getOrCreate(), settings)


def is_connect(spark: SparkSession) -> bool:
    """Whether the session is one of Spark Connect, which has no SparkContext."""
    connect = sys.modules.get("pyspark.sql.connect.session")  # whoever has such a session has imported it
    return connect is not None and isinstance(spark, connect.SparkSession)


def _connect(address: str, setting: str, settings: SparkSettings, app_name: str) -> SparkSession:
    """A session on the Connect server at the address; the server's own properties are as they are.

    Raises
    ------
    ConnectError
        Packages are missing, the address is none, or no server answers there within `CONNECT_SECONDS`.
    """
    from pyspark.errors import PySparkException

    place = f"{setting} is {address.partition(';')[0]}"  # what follows may be a token
    try:
        _wait_for_server(address)
        return _with_files(_remote_session(address, settings, app_name), settings)
    except ImportError as error:
        raise ConnectError(
            f"{place}, but Spark Connect needs more packages ({error}): pip install 'sparknorm[connect]'"
        ) from error
    except TimeoutError:
        raise ConnectError(
            f"{place}, but no Spark Connect server answers there (waited {CONNECT_SECONDS} s): start one "
            "(start-connect-server.sh), or correct the address"
        ) from None
    except (PySparkException, ValueError) as error:
        raise ConnectError(f"{place}, but no session can be had there: {spark_reason(error)}") from error


def _wait_for_server(address: str) -> None:
    """Return once a gRPC server answers.

    Raises
    ------
    TimeoutError
        None does, for `CONNECT_SECONDS`.
    """
    import grpc
    from pyspark.sql.connect.client import DefaultChannelBuilder

    channel = DefaultChannelBuilder(address).toChannel()
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        raise TimeoutError from None
    finally:
        channel.close()


def _remote_session(address: str, settings: SparkSettings, app_name: str) -> SparkSession:
    from pyspark.sql import SparkSession
    from pyspark.sql.connect.client.retries import DefaultPolicy

    builder = SparkSession.builder.remote(address).appName(app_name)
    for key, value in settings.conf.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    wait_seconds = 2
    patience = DefaultPolicy(max_retries=OUTAGE_SECONDS // wait_seconds, max_backoff=1_000 * wait_seconds)
    session.client.set_retry_policies([patience])
    atexit.register(_leave, session)
    return session


def _leave(session: SparkSession) -> None:
    """Let the server end what still runs and forget the session, which it would keep for an hour."""
    session.client.set_retry_policies([])  # a server that is gone is not waited for
    session.stop()


def _with_files(session: SparkSession, settings: SparkSettings) -> SparkSession:
    """The session, its executors able to import what is in the settings' ``py_files``.

    Raises
    ------
    FileNotFoundError
        There is no such file; it is named.
    """
    for file in settings.py_files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"spark.py_files: {file}: no such file (`make dist` makes dist/sparknorm.zip)")
        session.addArtifacts(file, pyfile=True)
    return session


def _defaults(master: str, trains: bool) -> dict[str, str]:
    properties = {
        "spark.ui.showConsoleProgress": "false",  # the commands draw their own progress
        "spark.barrier.sync.timeout": "300",  # seconds; Spark's own default is a year
        # Bounds Spark's own wait for slots, should they vanish between our check and the launch.
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "5s",
        "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "12",
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={LOGGING.as_uri()}",
    }
    if master.startswith("local"):
        properties |= {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.ui.enabled": "false",
        }
    if trains and master.startswith("local["):
        properties["spark.python.daemon.module"] = "pipeline.daemon"
    return properties


def spark_reason(error: Exception) -> str:
    """The line that says why, out of a Spark exception: the last one of a Python worker's traceback, else the first
    that speaks of a failure, else the first."""
    said = str(error).partition("\nJVM stacktrace:")[0]  # Spark Connect appends it
    if details := re.search(r'status = StatusCode\.\w+\s+details = "(.*)"', said):  # the connection to its server
        return f"Spark Connect: {details[1]}"
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):
        reason = next(line for line in reversed(lines) if not line[0].isspace())
        return reason + (_SHIP if reason == "ModuleNotFoundError: No module named 'pipeline'" else "")
    failed = [line.strip() for line in lines if "Could not recover" in line or "failed" in line.lower()]
    java = getattr(error, "java_exception", None)  # py4j's own text says only which call it was
    if not failed and java is not None and java.getMessage():
        return str(java.getMessage()).splitlines()[0]
    return (failed or lines or [type(error).__name__])[0]
