"""A training of seconds on a session of one's own, what can be done to it while it runs, and what it left."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.cluster import elastic
from pipeline.config.augment import AugmentSettings
from pipeline.config.cluster import SparkSettings
from pipeline.config.cluster import WorkerSettings as Workers
from pipeline.config.model import ModelSettings
from pipeline.config.settings import Settings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.telemetry import heartbeat
from pipeline.telemetry.events import EventReader
from pipeline.training import checkpoint, fit
from pipeline.training.hooks import Hook
from pipeline.training.job import Job, check_host, facts, identity
from pipeline.training.result import TrainResult

# Bound on every wait for a training to get somewhere; generous, since machines may be busy.
PATIENCE_SECONDS = 120

# Python workers and JVMs of a local cluster, in little memory and with few partitions.
LOCAL_CLUSTER = SparkSettings(
    master="local-cluster[2,1,1024]",
    conf={
        "spark.sql.shuffle.partitions": "2",
        "spark.driver.memory": "512m",
        "spark.python.daemon.module": "pipeline.daemon",
    },
)
TWO = Workers(count=2, device="cpu", heartbeat_seconds=0.2, collective_timeout_seconds=90, slots_wait_seconds=60)


def make_job(dataset: str, folder: Path | str, *, every_steps: int = 3, **train_settings: Any) -> Job:
    """Batch norm, whose running statistics differ between the ranks, and augmentation, which draws random numbers.

    Checkpoints come every few steps, so that a restart goes on in the middle of an epoch.
    """
    settings = {"epochs": 8, "batch_size": 32, "lanes": 4, "evaluation_batch_size": 64,
                "augment": AugmentSettings(flip=True, shift=1)}  # fmt: skip
    return Job(
        dataset,
        str(folder),
        ModelSettings(depth=3, width=4, norm="batch"),
        TrainSettings(**{**settings, **train_settings}),
        checkpoint=CheckpointSettings(every_steps=every_steps),
    )


@dataclass
class Outcome:
    """What became of one training.

    error : text of the exception that it ended with
    seconds : from launch to end
    did : what the disturbance did, with times (time.time())
    """

    result: TrainResult | None = None
    error_type: str = ""
    error: str = ""
    seconds: float = 0.0
    did: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**asdict(self), "result": self.result and self.result.model_dump(mode="json")}


class Running:
    """A training that runs in another thread or process, as a disturbance sees it. No wait outlasts the training.

    folder : of the job
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.ended = threading.Event()

    def wait_until(self, what: str, condition: Callable[[], Any]) -> Any:
        """The first true value of ``condition``."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            if self.ended.wait(0.02):
                raise TimeoutError(f"the training ended before {what}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {PATIENCE_SECONDS} s")
        return found

    def beats(self) -> dict[int, heartbeat.Beat]:
        """The heartbeats of the newest attempt that has not ended, by rank."""
        attempt = heartbeat.read_attempt(str(self.folder))
        beats = {}
        for rank in range(len(list((self.folder / heartbeat.RANKS).glob("rank-*.json")))):
            with contextlib.suppress(FileNotFoundError, ValueError):
                beat = heartbeat.read_beat(str(self.folder), rank)
                if attempt is not None and beat.attempt == attempt.id and not beat.ended:
                    beats[rank] = beat
        return beats

    def at_step(self, step: int, rank: int = 0) -> heartbeat.Beat:
        """The heartbeat of a rank that has done this many steps."""
        return self.wait_until(
            f"rank {rank} was at step {step}",
            lambda: next((b for r, b in self.beats().items() if r == rank and b.step >= step), None),
        )

    def saved(self, step: int) -> int:
        """The step of the newest checkpoint, once there is one of this step or a later one.

        A training that is at a step may have saved none for long: a state that is due waits until the one before is
        written.
        """
        folder = str(self.folder / "checkpoints")
        return self.wait_until(
            f"a checkpoint of step {step}", lambda: (newest := checkpoint.newest_step(folder)) >= step and newest
        )

    def kill(self, pid: int) -> dict[str, Any]:
        """SIGKILL a process of this training; returns when, and the step of the newest checkpoint just before."""
        newest = checkpoint.newest_step(str(self.folder / "checkpoints"))
        psutil.Process(pid).kill()
        return {"killed_at": time.time(), "killed_pid": pid, "newest_checkpoint": newest}


def jvm_of(pid: int) -> psutil.Process:
    """The executor's JVM above a Python worker."""
    return next(parent for parent in psutil.Process(pid).parents() if parent.name() == "java")


def launch(
    spark: Any,
    job: Job,
    workers: Workers = TWO,
    *,
    hook: Hook | None = None,
    meanwhile: Callable[[Running], dict[str, Any]] | None = None,
) -> Outcome:
    """Train as the driver does.

    Parameters
    ----------
    hook : what every rank calls at the moments of its training
    meanwhile : runs in a thread beside the training; what it returns is what it did
    """
    outcome, running, started = Outcome(), Running(job.folder), time.monotonic()

    def disturb() -> None:
        try:
            outcome.did |= meanwhile(running)
        except BaseException:  # noqa: BLE001 - shown where the outcome is judged
            outcome.did["failed"] = traceback.format_exc()

    thread = threading.Thread(target=disturb if meanwhile else lambda: None, daemon=True)
    thread.start()
    try:
        outcome.result = elastic.run(
            spark,
            fit,
            (replace(job, hook=hook),),
            workers=workers,
            sizes=partial(job.train.allows, norm_statistics=job.model.norm_statistics),
            saved_step=lambda: checkpoint.newest_step(f"{job.folder}/checkpoints"),
            facts=facts,
            check=check_host,
            folder=job.folder,
        )[0]
    except Exception as error:  # noqa: BLE001 - the outcome
        outcome.error_type, outcome.error = type(error).__name__, str(error)
    finally:
        outcome.seconds = time.monotonic() - started
        running.ended.set()
        thread.join(30)
    return outcome


def make_settings(
    job: Job,
    output: Path | str,
    tracking_uri: str,
    experiment: str,
    *,
    master: str = LOCAL_CLUSTER.master,
    **more: Any,
) -> Settings:
    """The settings of a command that trains what the job trains. ``more`` are sections that replace those here."""
    tree = {
        "name": "small",
        "output": str(output),
        "dataset": {"path": job.dataset},
        "model": job.model.model_dump(),
        "train": job.train.model_dump(),
        "checkpoint": job.checkpoint.model_dump(),
        "workers": TWO.model_dump(),
        "tracking": {"uri": tracking_uri, "artifacts": f"{output}/artifacts", "experiment": experiment,
                     "system_metrics": False},
        "spark": {**LOCAL_CLUSTER.model_dump(), "master": master},
    }  # fmt: skip
    return Settings.model_validate({**tree, **more})


def trial_folder(output: Path | str) -> Path | None:
    """The newest trial below the output folder of a command."""
    folders = sorted(Path(output, "trials").glob("*/"), key=lambda folder: folder.stat().st_mtime)
    return folders[-1] if folders else None


def events(job: Job, kind: str) -> list[dict[str, Any]]:
    """The events of one kind that a training left, in the order of attempts."""
    return [event for event in EventReader(f"{job.folder}/events").new() if event["kind"] == kind]


def steps_not_told(job: Job, steps: int) -> list[int]:
    """Steps of a training that ended of which no event tells."""
    return sorted(set(range(1, steps + 1)) - {event["step"] for event in events(job, "step")})


def seconds_lost(job: Job, killed_at: float) -> float | None:
    """From a kill to the first new step: one that the gang started next does and no gang before it did."""
    starts = [event["time"] for event in events(job, "start") if event["time"] > killed_at]
    if not starts:
        return None
    steps = events(job, "step")
    done = max((event["step"] for event in steps if event["time"] < starts[0]), default=0)
    return min((e["time"] - killed_at for e in steps if e["time"] > starts[0] and e["step"] > done), default=None)


def final_state(job: Job) -> dict[str, Any]:
    """The newest checkpoint: what it says of weights, optimizer and each rank."""
    state = checkpoint.load_newest(f"{job.folder}/checkpoints", identity=identity(job), device=torch.device("cpu"))
    assert state is not None, f"{job.folder} has no checkpoint"
    return {"step": state["progress"]["step"], **{name: state[name] for name in ("model", "optimizer", "ranks")}}


def equal(one: Any, other: Any) -> bool:
    """Whether nested states are the same, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
