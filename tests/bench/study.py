"""A study of eight trials: side by side against one after the other, and what all but training costs.

Real `compare` of Fashion-MNIST on Spark's local[2], each trial one worker with one thread, one arm and eight seeds.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from results import Result, compare, leave

from pipeline.config.settings import Settings
from pipeline.telemetry.events import EventReader

TRIALS = 8
PASSES = int(os.environ.get("BENCH_PASSES", "3"))
# Of a trial that shall take about a minute.
LONG_EPOCHS = int(os.environ.get("BENCH_EPOCHS", "3"))
BESIDE, AFTER = "8 small trials side by side", "8 small trials one after the other"
LOST, WHOLE = "8 trials of a minute: time in which a core did not train", "8 trials of a minute: time of both cores"


def run(spark: Any, dataset: str, work: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = work / "study"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that did not get to its end
    seconds: dict[str, list[float]] = {BESIDE: [], AFTER: []}
    for number in range(PASSES):
        for name, at_once in ((BESIDE, None), (AFTER, 1)):
            # A folder for each: MLflow keeps a store open that was deleted.
            place = folder / f"{number}-{at_once}"
            seconds[name].append(study(spark, dataset, place, epochs=1, batch=1024, at_once=at_once)[0])
    wall, trained = study(spark, dataset, folder / "long", epochs=LONG_EPOCHS, batch=128, at_once=None)
    shutil.rmtree(folder, ignore_errors=True)
    results = [Result(name, "s", passes) for name, passes in seconds.items()]
    results += [Result(LOST, "core-s", [2 * wall - trained]), Result(WHOLE, "core-s", [2 * wall])]
    results += [compare(results, BESIDE, AFTER), compare(results, LOST, WHOLE)]
    leave("study", results, "studies on local[2], 1 worker with 1 thread a trial")


def study(
    spark: Any, dataset: str, folder: Path, *, epochs: int, batch: int, at_once: int | None
) -> tuple[float, float]:
    """Seconds of the whole `compare`, report and all, and of its trials' training and evaluation in sum."""
    from pipeline.study import compare as job

    settings = Settings.model_validate(
        {
            "name": "bench",
            "output": str(folder.absolute()),
            "dataset": {"path": str(Path(dataset).absolute())},
            "train": {"epochs": epochs, "rank_batch_size": batch, "evaluations_per_epoch": 1},
            "workers": {"count": 1},
            "compare": {"seeds": list(range(TRIALS)), "side_by_side": at_once},
            "tracking": {"uri": f"sqlite:///{folder.absolute()}/mlflow.db", "artifacts": f"{folder}/artifacts"},
        }
    )
    started = time.perf_counter()
    job(spark, settings)
    wall = time.perf_counter() - started
    return wall, sum(map(_trained, folder.glob("trials/*/events")))


def _trained(events: Path) -> float:
    """Seconds from the start that a trial's worker tells to its last evaluation."""
    told = EventReader(str(events)).new()
    return told[-1]["time"] - next(event["time"] for event in told if event["kind"] == "start")
