"""What can go wrong with a stage, as exceptions; and the reason, in one line, that Spark's own errors hide."""

from __future__ import annotations

import re
import sys

_SHIP_ADVICE = "; give executors the code: spark.py_files=[dist/sparknorm.zip], or spark-submit --py-files"


class LaunchError(RuntimeError):
    """The barrier stage could not be started."""


class ShortageError(LaunchError):
    """The cluster has fewer slots than workers were asked for. ``slots`` is their number."""

    def __init__(self, text: str, slots: int):
        super().__init__(text)
        self.slots = slots


class StoppedError(LaunchError):
    """The caller asked for the end of the stage."""


class KilledError(StoppedError):
    """The whole command was ended from outside, by Ctrl-C or SIGTERM: an end, and no failure."""


class PrunedError(StoppedError):
    """The caller asked for the end of a training that has shown enough: an end, and no failure.

    ``run_id`` is its MLflow run.
    """

    def __init__(self, text: str, run_id: str):
        super().__init__(text)
        self.run_id = run_id


class GangLostError(LaunchError):
    """The gang ran and its workers were lost; another launch may go on from what was saved.

    ``waited`` is true if there are too few slots, and ``workers.slots_wait_seconds`` have gone by since then.
    """

    def __init__(self, text: str, *, waited: bool = False):
        super().__init__(text)
        self.waited = waited


class WorkerError(RuntimeError):
    """The function raised on a worker. The message names rank, host and phase, and carries the worker's traceback.

    ``final`` is true if another launch would raise it again.
    """

    def __init__(self, text: str, *, final: bool = False):
        super().__init__(text)
        self.final = final


class StallError(WorkerError):
    """A rank made no progress. The message names it, says where it is, and carries its stack."""

    def __init__(self, text: str):
        super().__init__(text, final=True)


def spark_failures() -> tuple[type[Exception], ...]:
    """The exception classes that Spark raises; some errors of the JVM arrive as Py4J's."""
    from pyspark.errors import PySparkException

    try:
        from py4j.protocol import Py4JError
    except ImportError:  # a client of Spark Connect needs no JVM
        return (PySparkException,)
    return PySparkException, Py4JError


def spark_error(error: BaseException) -> str | None:
    """An error of Spark's in one line for the person at the command line; None for an error of any other kind."""
    pyspark = sys.modules.get("pyspark")
    if pyspark is None:
        return None
    context = getattr(pyspark, "SparkContext", None)  # a client of Spark Connect may have none
    process = getattr(getattr(context, "_gateway", None), "proc", None)
    if isinstance(error, (ConnectionError, *spark_failures())) and process is not None and process.poll() is not None:
        return (
            f"the driver's Java process has ended (exit code {process.poll()}), and Spark with it: it may have been "
            "killed for its memory; spark.driver.memory says how much it takes"
        )
    return f"Spark: {spark_reason(error)}" if isinstance(error, spark_failures()) else None


def first_line(error: Exception) -> str:
    """The first line of a Spark error, without its plan and stack trace."""
    java = getattr(error, "java_exception", None)
    text = str(java.getMessage() if java is not None else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def spark_reason(error: BaseException) -> str:
    """The line of a Spark exception that gives the reason.

    It is the last line of a Python worker's traceback, else the first that speaks of a failure, else the first.
    """
    message = str(error).partition("\nJVM stacktrace:")[0]  # Spark Connect appends it
    if details := re.search(r'status = StatusCode\.\w+\s+details = "(.*)"', message):  # the connection to its server
        return f"Spark Connect: {details[1]}"
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):
        reason = next(line for line in reversed(lines) if not line[0].isspace())
        return reason + (_SHIP_ADVICE if reason == "ModuleNotFoundError: No module named 'pipeline'" else "")
    failed = [line.strip() for line in lines if "Could not recover" in line or "failed" in line.lower()]
    java = getattr(error, "java_exception", None)  # py4j's own text says only which call it was
    if not failed and java is not None and java.getMessage():
        return str(java.getMessage()).splitlines()[0]
    return (failed or lines or [type(error).__name__])[0]
