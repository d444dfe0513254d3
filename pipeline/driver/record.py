"""What a command has begun, kept where it trains, so that the same command goes on where a killed one stopped.

A record is one small JSON file: which process trains, which MLflow run belongs to it, and the result once there is one.
What a record of another version has finished may lack what this one tells: such a result is not read, and trained anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from typing import Any

import psutil
from pydantic import Field

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.config.settings import digest_of
from pipeline.report.comparison import TrialResult
from pipeline.telemetry import heartbeat

log = logging.getLogger(__name__)

FILE = "record.json"


class BusyError(RuntimeError):
    """Another process trains in this folder now."""


class DriverProcess(FrozenModel):
    """The process that trains, or that did.

    host : its host's name
    pid : its number there
    started : when it began, since numbers are used again (see `_started`)
    """

    host: str
    pid: int = Field(ge=0)
    started: str


class RecordContent(FrozenModel):
    """What ``record.json`` holds. A key is absent until the training has come that far.

    driver : the process that trains
    name : of the training or the study
    run_id : of its MLflow run
    model : whether the trained network is in MLflow
    cycles : results at the ends of the schedule's cycles, of a training that stops there
    result : of a training; for a study the path of its result
    """

    driver: DriverProcess | None = None
    name: str | None = None
    run_id: str | None = None
    model: bool = False
    cycles: tuple[TrialResult, ...] = ()
    result: TrialResult | str | None = None


class Record:
    """The record in a folder. Its `content` is empty where the folder has none, or a damaged one.

    Raises
    ------
    StorageError
        Storage fails, so that nobody knows whether there is one.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._path = storage.join(folder, FILE)
        self.content = _read(self._path)

    @property
    def finished(self) -> bool:
        return self.content.result is not None

    def result(self, cycle: int | None = None) -> TrialResult | None:
        """What a training has returned at its end or, where it has come no further, at the end of a cycle; or None."""
        if isinstance(self.content.result, TrialResult):
            return self.content.result
        return self.content.cycles[cycle - 1] if cycle is not None and cycle <= len(self.content.cycles) else None

    def add_result(self, result: TrialResult, cycle: int | None = None) -> None:
        """Write down what a training has returned at its end, or at the end of the cycle that comes next."""
        if cycle is None:
            self.update(result=result)
        else:
            self.update(cycles=(*self.content.cycles, result))

    def claim(self, name: str) -> None:
        """Write down that this process trains it, under this name.

        Raises
        ------
        BusyError
            Another process, here or on another host, is training there now.
        """
        driver = self.content.driver
        if driver and not self.finished and driver != _this_process() and self._is_alive(driver):
            raise BusyError(
                f"{self.folder} is being trained by process {driver.pid} on {driver.host}: "
                "wait for it, end it, or set another `output` or `name`"
            )
        self.update(driver=_this_process(), name=name)

    def update(self, **fields: Any) -> None:
        """Replace fields of the content, and write it."""
        self.content = self.content.model_copy(update=fields)
        storage.publish(self._path, json.dumps(self.content.model_dump(mode="json", exclude_unset=True)).encode())

    def _is_alive(self, driver: DriverProcess) -> bool:
        if driver.host == socket.gethostname():
            return _started(driver.pid) == driver.started
        # A process of another host cannot be asked; its workers show themselves.
        before = self._heartbeats()
        time.sleep(3)
        return self._heartbeats() != before

    def _heartbeats(self) -> list[bytes]:
        folder = storage.join(self.folder, heartbeat.RANKS)
        return [storage.read_bytes(storage.join(folder, name)) for name in storage.names(folder)]


def _read(path: str) -> RecordContent:
    """The content of a record. What comes damaged may lie whole in storage: it is read once more."""
    again = storage.Retries()
    try:
        try:
            return RecordContent.model_validate_json(again(storage.read_bytes, path))
        except ValueError:
            return RecordContent.model_validate_json(again(storage.read_bytes, path))
    except FileNotFoundError:
        return RecordContent()
    except ValueError:
        log.warning("%s is damaged, or another version has written it: what it tells is done anew", path)
        return RecordContent()


def slug(name: str) -> str:
    """A name of anything as the name of a file: what is neither letter, digit nor one of ``_.=-`` becomes a dash."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def unfinished_record(root: str, name: str, identity: dict[str, Any]) -> Record:
    """The record of what was begun below a folder and not finished, or a new one.

    Parameters
    ----------
    root : folder of the records
    name : of the training or study
    identity : JSON values; two trainings are the same if their names and identities are
    """
    return _numbered_records(root, name, identity)[-1]


def finished_record(root: str, name: str, identity: dict[str, Any]) -> Record | None:
    """The newest record of a training that has ended, or None. Parameters are those of `unfinished_record`."""
    *finished, _ = _numbered_records(root, name, identity)
    return finished[-1] if finished else None


def _numbered_records(root: str, name: str, identity: dict[str, Any]) -> list[Record]:
    """All finished trainings of one thing and then the one that is not: the first has no number, then -2, -3, ..."""
    key = digest_of([name, identity]).removeprefix("sha256:")[:12]
    folder = storage.join(root, f"{slug(name)[:80]}-{key}")
    records = [Record(folder)]
    while records[-1].finished:
        records.append(Record(f"{folder}-{len(records) + 1}"))
    return records


def _this_process() -> DriverProcess:
    return DriverProcess(host=socket.gethostname(), pid=os.getpid(), started=_started(os.getpid()))


def _started(pid: int) -> str:
    """When a process began, in hundredths of a second since its machine did; empty where it has ended.

    Counted from the start of the machine, it is the same for every reader, however the clock is set meanwhile.
    """
    try:
        boot, process = psutil.boot_time(), psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return "" if ended else str(round(100 * (process.create_time() - boot)))
    except psutil.NoSuchProcess:
        return ""
