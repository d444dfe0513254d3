"""A process that trains or compares when it is told to: `python command_driver.py`, asked with what `command` takes."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from second_driver import answer

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def command(spark: SparkSession, name: str, settings: str, most_seconds: float, seed: int) -> str:
    """`train` or `compare` with settings (JSON) after a random while; empty where that is done, or the error's name and
    text."""
    from pipeline.config.settings import Settings
    from pipeline.driver import train
    from pipeline.driver.lease import BusyError, TakenOverError
    from pipeline.study import compare

    time.sleep(random.Random(seed).uniform(0, most_seconds))
    try:
        {"train": train, "compare": compare}[name](spark, Settings.model_validate_json(settings))
    except (BusyError, TakenOverError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    answer(command, master="local[2]")
