"""A SparkSession: the one that is active, or one made from the settings, here or on a Spark Connect server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.connect import connect_session, with_files
from pipeline.config.cluster import SparkSettings
from pipeline.java import require_java, without_incubator_warning

if TYPE_CHECKING:
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

LOGGING = Path(__file__).with_name("log4j2.properties").absolute()


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
    FileNotFoundError
        A file of ``settings.py_files`` is missing.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit has set master and properties already
        return SparkSession.builder.appName(app_name).getOrCreate()
    remote = os.environ.get("SPARK_REMOTE")
    if settings.master.startswith("sc://"):
        return connect_session(settings.master, "spark.master", settings, app_name)
    if remote is not None:
        return connect_session(remote, "SPARK_REMOTE", settings, app_name)
    return with_files(_classic_session(settings, app_name, trains), settings)


def _classic_session(settings: SparkSettings, app_name: str, trains: bool) -> SparkSession:
    from pyspark import SparkConf
    from pyspark.sql import SparkSession

    require_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if settings.master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    properties = {**_defaults(settings.master, trains), **settings.conf}
    _start_context(SparkConf().setAppName(app_name).setMaster(settings.master).setAll(list(properties.items())))
    builder = SparkSession.builder.appName(app_name).master(settings.master)
    for key, value in properties.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def _start_context(conf: SparkConf) -> None:
    """Start the JVM and its SparkContext, unless this process has a JVM already.

    `SparkSession.builder` would do the same, and let the JVM write a warning about a module that Spark's launcher
    always asks for.
    """
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    if SparkContext._gateway is None:
        with without_incubator_warning() as stderr:
            gateway = launch_gateway(conf, popen_kwargs={"stderr": stderr})
        SparkContext(conf=conf, gateway=gateway)


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
