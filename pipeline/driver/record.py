"""What a command has begun, kept where it trains, so that the same command goes on where a killed one stopped.

A record is one small JSON file: whose it is, which MLflow run belongs to it, and the result once there is one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config.settings import digest_of
from pipeline.telemetry import heartbeat

FILE = "record.json"


class BusyError(RuntimeError):
    """Another process is at it."""


class Record:
    """The record in a folder; `Record(folder).data` is empty where there is none or it is damaged."""

    def __init__(self, folder: str):
        self.folder = folder
        self._path = storage.join(folder, FILE)
        try:
            self.data: dict[str, Any] = json.loads(storage.read_bytes(self._path))
        except (FileNotFoundError, ValueError):
            self.data = {}

    @property
    def finished(self) -> bool:
        return "result" in self.data

    def claim(self, **fields: Any) -> None:
        """Make it this process's, with these fields added.

        Raises
        ------
        BusyError
            Another process, here or on another host, is training there now.
        """
        driver = self.data.get("driver")
        if driver and not self.finished and driver != _this_process() and self._is_alive(driver):
            raise BusyError(
                f"{self.folder} is being trained by process {driver['pid']} on {driver['host']}: "
                "wait for it, end it, or set another `output` or `name`"
            )
        self.update(driver=_this_process(), **fields)

    def update(self, **fields: Any) -> None:
        self.data |= fields
        storage.publish(self._path, json.dumps(self.data).encode())

    def _is_alive(self, driver: dict[str, Any]) -> bool:
        if driver["host"] == socket.gethostname():
            return _started(driver["pid"]) == driver["started"]
        # A process of another host cannot be asked; its workers show themselves.
        before = self._beats()
        time.sleep(3)
        return self._beats() != before

    def _beats(self) -> list[bytes]:
        folder = storage.join(self.folder, heartbeat.RANKS)
        return [storage.read_bytes(storage.join(folder, name)) for name in storage.names(folder)]


def find_record(root: str, name: str, what: Any, *, finished_too: bool = False) -> Record:
    """The record of something begun below a folder and not finished, or an empty one.

    Parameters
    ----------
    what : JSON-able; two things are the same if their names and this are
    finished_too : also take one that was finished
    """
    key = digest_of([name, what]).removeprefix("sha256:")[:12]
    slug = re.sub(r"[^\w.=-]+", "-", name).strip("-")[:80]
    number = 1
    while True:
        record = Record(storage.join(root, f"{slug}-{key}" + (f"-{number}" if number > 1 else "")))
        if finished_too or not record.finished:
            return record
        number += 1


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """When a process began, in the system's own terms, since its number is used again; empty where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "unknown" if not Path("/proc").exists() and _runs(pid) else ""
    return "" if fields[0] == "Z" else fields[19]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
