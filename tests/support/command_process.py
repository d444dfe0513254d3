"""A command of sparknorm in a process of its own, and what it has come to, as a test sees it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlflow
import psutil
import yaml
from small_training import Running
from standalone_cluster import REPOSITORY

from pipeline import __main__ as commands


@contextmanager
def in_a_process(name, settings, folder, *, within=()):
    """A command in a process of its own; when the block is left, it and all below it has ended.

    within : a command and its arguments that run it
    """
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    quick = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # as in standalone_cluster.py
    with Path(folder, "errors").open("w") as errors:
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "pipeline", name, "-c", written(settings, folder)],
            env={**kept, "PYTHONPATH": str(REPOSITORY), "JDK_JAVA_OPTIONS": quick},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        yield process
    finally:
        for member in family(process.pid):
            member.kill()
        process.wait(30)


def again(name, settings, folder):
    """The same command, here: the session is pytest's."""
    commands.app([name, "-c", written(settings, folder)], standalone_mode=False)


def written(settings, folder):
    path = Path(folder, "settings.yaml")
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return str(path)


def family(pid):
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_for(what, condition, process, folder):
    """The first true value of ``condition``."""
    deadline = time.monotonic() + 240
    while not (found := condition()):
        assert process.poll() is None, Path(folder, "errors").read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
    return found


def is_under_way(folder):
    return any(beat.step >= 60 for beat in Running(folder).beats().values())


def steps_in_mlflow(uri, run_id):
    return [metric.step for metric in mlflow.MlflowClient(uri).get_metric_history(run_id, "train/loss")]
