"""Real faults done to real trainings on one local cluster of Spark; what happened is left as JSON.

A program of its own (`python tests/fault_driver.py MASTER DATASET FOLDER [FAULT ...]`), since Spark allows one session
in a process and pytest's has one. `test_faults.py` runs it once and judges what it leaves: ``FOLDER/FAULT.json``,
written as soon as it is known.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import rank_faults
from small_training import (
    LOCAL_CLUSTER,
    TWO,
    Outcome,
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
from pipeline.config.training import CheckpointSettings
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.relay import Relay
from pipeline.training.job import Job

STALL_SECONDS = 12


@dataclass
class Bench:
    """Where faults are tried: the session, an ingested dataset, and the end of the undisturbed training."""

    spark: Any
    dataset: str
    folder: Path
    undisturbed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def job(self, name: str, **settings: Any) -> Job:
        return make_job(self.dataset, self.folder / name, **settings)

    def report(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """What the test of a fault wants to know."""
        report = {**outcome.values(), "folder": job.folder,
                  "starts": [[event["attempt"], event["restored_from"]] for event in events(job, "start")],
                  "warnings": [event["text"] for event in events(job, "warning")]}  # fmt: skip
        if outcome.result is not None and self.undisturbed:
            report["steps_not_told"] = steps_not_told(job, outcome.result.steps)
            report["equal"] = equal(final_state(job), self.undisturbed)
        if "killed_at" in outcome.did:
            report["restart_seconds"] = seconds_lost(job, outcome.did["killed_at"])
        return report

    def try_it(self, name: str, **how: Any) -> dict[str, Any]:
        job = self.job(name)
        return self.report(job, launch(self.spark, job, **how))


def in_the_middle(run: Running, rank: int) -> int:
    """The process of a rank that has done most of its steps, of which some are saved."""
    run.saved(26)
    return run.at_step(55, rank).pid


def worker_killed(bench: Bench) -> dict[str, Any]:
    """SIGKILL of the Python process of rank 1."""
    return bench.try_it("worker_killed", meanwhile=lambda run: run.kill(in_the_middle(run, rank=1)))


def first_worker_killed(bench: Bench) -> dict[str, Any]:
    """SIGKILL of the Python process of rank 0, which has the rendezvous and writes events and checkpoints."""
    return bench.try_it("first_worker_killed", meanwhile=lambda run: run.kill(in_the_middle(run, rank=0)))


def executor_killed(bench: Bench) -> dict[str, Any]:
    """SIGKILL of an executor's JVM."""
    return bench.try_it("executor_killed", meanwhile=lambda run: run.kill(jvm_of(in_the_middle(run, rank=1)).pid))


def model_raises(bench: Bench) -> dict[str, Any]:
    return bench.try_it("model_raises", hook=rank_faults.model_raises(rank=1, step=40))


def model_raises_once(bench: Bench) -> dict[str, Any]:
    return bench.try_it("model_raises_once", hook=rank_faults.model_raises(rank=1, step=40, once=True))


def shard_damaged(bench: Bench) -> dict[str, Any]:
    """One byte in the middle of a shard is another."""
    dataset = bench.folder / "damaged"
    shutil.copytree(bench.dataset, dataset)
    shard = sorted(dataset.glob("**/train/*.parquet"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    job = make_job(str(dataset), bench.folder / "shard_damaged")
    return {"shard": shard.name, **bench.report(job, launch(bench.spark, job))}


def diverged(bench: Bench, on_divergence: str) -> dict[str, Any]:
    job = bench.job(
        f"diverged-{on_divergence}", learning_rate=1e30, warmup_epochs=0, on_divergence=on_divergence, epochs=2
    )
    outcome = launch(bench.spark, job)
    text = [event["text"] for event in events(job, "diverged")]
    return {**outcome.values(), "diverged": text, "attempts": len(events(job, "start"))}


def divergence_marked(bench: Bench) -> dict[str, Any]:
    return diverged(bench, "mark")


def divergence_fails(bench: Bench) -> dict[str, Any]:
    return diverged(bench, "fail")


def hang(bench: Bench, how: str) -> dict[str, Any]:
    """Rank 1 does not get on at step 40; what is left of its process afterwards."""
    workers = TWO.model_copy(update={"stall_seconds": STALL_SECONDS})

    def notice(run: Running) -> dict[str, Any]:
        return {"pid": run.at_step(1, rank=1).pid}

    report = bench.try_it(f"hang-{how}", workers=workers, hook=rank_faults.hang(how, rank=1, step=40), meanwhile=notice)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(report["did"]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    report["process_is_gone"] = not psutil.pid_exists(report["did"]["pid"])
    return report


def hang_in_python(bench: Bench) -> dict[str, Any]:
    return hang(bench, "sleep")


def hang_in_native_code(bench: Bench) -> dict[str, Any]:
    return hang(bench, "native")


def hang_stopped(bench: Bench) -> dict[str, Any]:
    return hang(bench, "stopped")


def too_few_slots(bench: Bench) -> dict[str, Any]:
    return bench.try_it("too_few_slots", workers=TWO.model_copy(update={"count": 4, "slots_wait_seconds": 3}))


def disk_full_for_a_while(bench: Bench) -> dict[str, Any]:
    hook = rank_faults.disk_full(steps=range(6, 60), file_bytes=8192)
    report = bench.try_it("disk_full_for_a_while", hook=hook)
    job = bench.job("disk_full_for_a_while")
    return {**report, "saved": [event["step"] for event in events(job, "checkpoint")]}


def disk_full_at_the_end(bench: Bench) -> dict[str, Any]:
    hook = rank_faults.disk_full(steps=[bench.undisturbed["step"]], file_bytes=8192)
    return bench.try_it("disk_full_at_the_end", hook=hook)


def checkpoints_torn(bench: Bench) -> dict[str, Any]:
    """The newest checkpoint is cut short and the seal of the one before is wrong when a stopped training goes on."""
    job = replace(bench.job("checkpoints_torn"), checkpoint=CheckpointSettings(every_steps=3, keep=4))
    launch(bench.spark, job, hook=rank_faults.model_raises(rank=1, step=100))
    *_, third, second, newest = sorted(Path(job.folder, "checkpoints").glob("*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    seal = json.loads(second.with_suffix(".json").read_text())
    second.with_suffix(".json").write_text(json.dumps({**seal, "sha256": "0" * 64}))
    report = bench.report(job, launch(bench.spark, job, hook=rank_faults.log_of_restoring))
    names = {"newest": newest.stem, "second": second.stem, "third": third.stem}
    return {**report, **names, "log": Path(job.folder, "log").read_text()}


class Recorder:
    """Stands for the MLflow run: keeps the events that it is given."""

    outage_seconds = 30.0

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def log_events(self, given: list[dict[str, Any]]) -> None:
        self.events += given


def event_files_torn(bench: Bench) -> dict[str, Any]:
    """Files of garbage, a torn copy of events and an empty file come among the events while a training runs."""

    def litter(run: Running) -> dict[str, Any]:
        first = run.wait_until("there were events", lambda: sorted((run.folder / "events").glob("*.jsonl")))[0]
        name, data = first.name.partition(".")[0], first.read_bytes()
        torn = {"garbage": bytes(range(256)) * 40, "torn": data[: len(data) - 20], "empty": b"", "list": b"[1, 2]\n"}
        for kind, content in torn.items():
            (run.folder / "events" / f"{name}-{kind}.jsonl").write_bytes(content)
        return {"files": len(torn)}

    job, recorder = bench.job("event_files_torn"), Recorder()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("pipeline").addHandler(handler)
    with TrainingBar("torn", 32) as bar, Relay(f"{job.folder}/events", recorder, bar):  # type: ignore[arg-type]
        outcome = launch(bench.spark, job, meanwhile=litter)
    logging.getLogger("pipeline").removeHandler(handler)
    steps = [event["step"] for event in recorder.events if event["kind"] == "step"]
    return {**bench.report(job, outcome), "steps": sorted(set(steps)), "log": log.getvalue()}


def port_taken(bench: Bench) -> dict[str, Any]:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        return {"port": port, **bench.try_it("port_taken", workers=TWO.model_copy(update={"port": port}))}


def port_set(bench: Bench) -> dict[str, Any]:
    """Somebody holds the port for a while, as the gang before a restart does; then a worker is killed."""
    other = socket.socket()
    other.bind(("", 0))
    other.listen()

    def release_and_kill(run: Running) -> dict[str, Any]:
        time.sleep(4)
        other.close()
        return run.kill(in_the_middle(run, rank=1))

    workers = TWO.model_copy(update={"port": other.getsockname()[1]})
    return bench.try_it("port_set", workers=workers, meanwhile=release_and_kill)


FAULTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    fault.__name__: fault
    for fault in (
        worker_killed, first_worker_killed, executor_killed, model_raises, model_raises_once, shard_damaged,
        divergence_marked, divergence_fails, hang_in_python, hang_in_native_code, hang_stopped, too_few_slots,
        disk_full_for_a_while, disk_full_at_the_end, checkpoints_torn, event_files_torn, port_taken, port_set,
    )
}  # fmt: skip


def main(master: str, dataset: str, folder: str, *names: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    session = get_session(LOCAL_CLUSTER.model_copy(update={"master": master}), "faults")
    bench = Bench(session, dataset, Path(folder))
    job = bench.job("undisturbed")
    report = bench.report(job, launch(bench.spark, job))
    write(folder, "undisturbed", report)
    if report["result"] is None:
        sys.exit(report["error"])
    bench.undisturbed = final_state(job)
    for name in names or FAULTS:
        try:
            report = FAULTS[name](bench)
        except Exception as error:  # noqa: BLE001 - the faults after it are tried too
            report = {"broken": f"{type(error).__name__}: {error}"}
        write(folder, name, report)
    bench.spark.stop()


def write(folder: str, name: str, report: dict[str, Any]) -> None:
    Path(folder, f"{name}.json").write_text(json.dumps(report, indent=1))
    print(f"{name}: {report.get('seconds', 0):.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
