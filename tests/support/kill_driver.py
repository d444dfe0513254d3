"""Kill workers of trainings at random moments, on one local cluster of Spark, and see how the trainings end.

A program of its own (`python tests/kill_driver.py MASTER DATASET FOLDER KILLS EPOCHS EXECUTOR_SHARE`), since Spark
allows one session in a process and pytest's has one. It leaves one JSON line for each training in
``FOLDER/kills.jsonl``, as soon as it is known.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import psutil
from small_training import (
    LOCAL_CLUSTER,
    Running,
    equal,
    events,
    final_state,
    jvm_of,
    launch,
    make_job,
    seconds_lost,
    steps_not_told,
)

from pipeline.cluster.session import get_session

# Of all trainings; the rest have one.
TWO_KILLS_SHARE = 0.3


class Killer:
    """Kills at moments drawn from the time that an undisturbed training takes: before its first step, and to its end.

    Parameters
    ----------
    seed : of this training's moments and victims
    undisturbed_seconds : from launch to result
    executor_share : of all kills; the rest are of Python workers
    """

    def __init__(self, seed: int, undisturbed_seconds: float, executor_share: float):
        self._random = random.Random(seed)
        self._seconds, self._executor_share = undisturbed_seconds, executor_share
        self.kills: list[dict[str, Any]] = []

    def __call__(self, run: Running) -> dict[str, Any]:
        for _ in range(2 if self._random.random() < TWO_KILLS_SHARE else 1):
            delay, rank = self._random.uniform(0, self._seconds), self._random.randrange(2)
            jvm = self._random.random() < self._executor_share
            if run.ended.wait(delay):
                break
            found = self._find(run, rank)
            if found is None:
                break
            worker, where = found
            pid = jvm_of(worker).pid if jvm else worker
            self.kills.append({**run.kill(pid), "victim": "executor" if jvm else "worker", "rank": rank, **where})
        return {}

    def _find(self, run: Running, rank: int) -> tuple[int, dict[str, Any]] | None:
        """The process of a rank and where it is; before ranks show themselves, any Python worker there is."""
        while not run.ended.wait(0.01):
            beat = run.beats().get(rank)
            if beat is not None and _runs(beat.pid):
                return beat.pid, {"phase": beat.phase, "step": beat.step}
            workers = python_workers()
            if beat is None and workers:
                return self._random.choice(workers), {"phase": "no sign of life", "step": None}
        return None


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def python_workers() -> list[int]:
    """The Python workers of this session: processes that Spark's daemons have forked."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if all("pipeline.daemon" in " ".join(each.cmdline()) for each in (process, process.parent())):
                found.append(process.pid)
        except (psutil.Error, AttributeError):  # it ended meanwhile, or its parent did
            continue
    return found


def main(master: str, dataset: str, folder: str, kills: str, epochs: str, executor_share: str) -> None:
    """Trainings until there were that many kills."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    spark = get_session(LOCAL_CLUSTER.model_copy(update={"master": master}), "kills")
    for number in range(2):  # the second has warm executors: its time is what kills are spread over
        job = make_job(dataset, root / f"undisturbed-{number}", epochs=int(epochs))
        outcome = launch(spark, job)
        assert outcome.result is not None, outcome.error
    expected, seconds = final_state(job), outcome.seconds
    number = done = 0
    while done < int(kills) and number < 2 * int(kills) + 5:
        job = make_job(dataset, root / f"run-{number}", epochs=int(epochs))
        killer = Killer(number, seconds, float(executor_share))
        outcome = launch(spark, job, meanwhile=killer)
        done += len(killer.kills)
        line = {
            "run": number, "error": outcome.error, "failed": outcome.did.get("failed"), "seconds": outcome.seconds,
            "undisturbed_seconds": seconds, "equal": outcome.result is not None and equal(final_state(job), expected),
            "steps_not_told": steps_not_told(job, outcome.result.steps) if outcome.result else None,
            "starts": [[event["attempt"], event["restored_from"]] for event in events(job, "start")],
            "kills": [{**kill, "lost_seconds": seconds_lost(job, kill["killed_at"])} for kill in killer.kills],
        }  # fmt: skip
        with (root / "kills.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not killer.kills:
            seconds = min(seconds, outcome.seconds)
        number += 1
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
