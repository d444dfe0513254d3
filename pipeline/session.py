"""A SparkSession: the one that is there, or one made from the settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import SparkSettings
from pipeline.java import require_java

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGING = Path(__file__).with_name("log4j2.properties").absolute()


def get_session(settings: SparkSettings, app_name: str) -> SparkSession:
    """The active session (a notebook, Databricks), that of spark-submit, or a new one on ``settings.master``.

    Raises
    ------
    JavaError
        A session must be made here, and Java is missing or too old.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    builder = SparkSession.builder.appName(app_name)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit has set master and properties already
        require_java()
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        if settings.master.startswith("local"):
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        for key, value in {**_defaults(settings.master), **settings.conf}.items():
            builder = builder.config(key, value)
        builder = builder.master(settings.master)
    return builder.getOrCreate()


def _defaults(master: str) -> dict[str, str]:
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
    return properties


def spark_reason(error: Exception) -> str:
    """The line that says why, out of a Spark exception: the last one of a Python worker's traceback, else the first
    that speaks of a failure, else the first."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return next(line for line in reversed(lines) if not line[0].isspace())
    failed = [line.strip() for line in lines if "Could not recover" in line or "failed" in line.lower()]
    java = getattr(error, "java_exception", None)  # py4j's own text says only which call it was
    if not failed and java is not None and java.getMessage():
        return str(java.getMessage()).splitlines()[0]
    return (failed or lines or [type(error).__name__])[0]
