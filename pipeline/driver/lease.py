"""One driver at a time in a folder: its sign of life, and the number that all it writes carries.

A driver takes the folder of a record by creating the file of the next number (``record.json``, ``record-0002.json``,
...): of several that try at once, one does. It writes under its own number alone, and the highest number counts. So a
driver that was believed dead may come back at any moment, also between a look and a write: what it then writes is not
read. While a driver lives, a thread renews its lease, a small file of the same number (`storage.lease`): a driver
elsewhere has lost it when that file has not changed for `LEASE_SECONDS`. On the same machine a process can be asked
for, and nobody waits.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import Field

from pipeline import storage
from pipeline.cluster.stop import Stop
from pipeline.config.frozen import FrozenModel
from pipeline.storage import lease

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
# A lease is renewed so often within its time, and looked at so often by who waits for its end.
_RENEWALS, _LOOKS = 3, 15
_RECORD_NAME = re.compile(r"record(?:-(\d{4,}))?\.json")

# The leases that this process holds, by the paths of their files.
_held: set[str] = set()


class BusyError(RuntimeError):
    """Another process trains in this folder now."""


class TakenOverError(RuntimeError):
    """This process was believed dead, and another one goes on with what it did."""


class DriverProcess(FrozenModel):
    """The process that trains, or that did.

    host : its host's name
    pid : its number there
    started : when it began, since numbers are used again (see `_started`)
    machine : where its number means something (see `_machine`); empty where that is not known
    since : when it took the folder, in UTC by its own clock, for people to read
    """

    host: str
    pid: int = Field(ge=0)
    started: str
    machine: str = ""
    since: str = ""

    def __str__(self) -> str:
        return f"{self.pid} on {self.host}"


class _Renewal(FrozenModel):
    """What the file of a lease holds: how often it was renewed, and whether its driver has given it back."""

    renewals: int
    released: bool = False


def record_path(folder: str, number: int) -> str:
    """The file in which the driver that took the folder with this number writes; 1 is the first."""
    return storage.join(folder, _numbered("record", number))


def newest_number(folder: str) -> int:
    """The number of the driver that took the folder last; 0 where none has."""
    return max(lease.numbers(folder, _RECORD_NAME), default=0)


def this_process() -> DriverProcess:
    pid = os.getpid()
    since = datetime.now(UTC).isoformat(timespec="milliseconds")
    return DriverProcess(host=socket.gethostname(), pid=pid, started=_started(pid), machine=_machine(), since=since)


def has_ended(process: DriverProcess, me: DriverProcess) -> bool | None:
    """Whether a process has ended; None where that cannot be asked, since it runs on another machine than ``me``."""
    return _started(process.pid) != process.started if _same_machine(process, me) else None


def is_free(folder: str, number: int, driver: DriverProcess | None, me: DriverProcess, seconds: float) -> bool:
    """Whether the driver that took a folder with this number has ended, or its lease has.

    Parameters
    ----------
    driver : as its record names it; None where that is damaged
    me : the process that asks
    seconds : after which a lease that is not renewed has ended; for a driver of another machine the call takes so long
    """
    path = _lease_path(folder, number)
    if _is_released(renewal := _read(path)) or (driver is None and not renewal):
        return True
    if driver is not None and (ended := has_ended(driver, me)) is not None:
        is_me = (driver.pid, driver.started) == (me.pid, me.started)
        return path not in _held if is_me else ended
    who = driver or "unknown"
    log.warning("%s was begun by process %s: waiting up to %g s for a sign of its life", folder, who, seconds)
    now = lease.wait_for_change(lambda: _read(path), renewal, seconds=seconds, looks=_LOOKS)
    return now == renewal or _is_released(now)


class Lease(lease.Lease):
    """The right to write in a folder, renewed by a thread while its ``with`` block runs, and given back at its end.

    Parameters
    ----------
    folder : that this process has taken
    number : that it has taken it with; all it writes carries it
    seconds : after which others may take it, if it is not renewed
    stop : set when another process has taken the folder

    Attributes
    ----------
    is_wanted : whether anybody may ask for the folder when this ends; nobody does where its work is finished

    Raises
    ------
    TakenOverError
        At the end of the block, whatever error ended it: another process has taken the folder meanwhile.
    """

    def __init__(self, folder: str, number: int, *, seconds: float, stop: Stop | None = None):
        path = _lease_path(folder, number)
        super().__init__(folder, number, path, seconds=seconds, renewals=_RENEWALS)
        self.stop, self.is_wanted = stop or Stop(), True
        self._lost = ""  # by whom and when, once it is
        _held.add(path)

    def __enter__(self) -> Lease:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.end(release=self.is_wanted)
        _held.discard(self._path)
        if self._lost and (error is None or isinstance(error, Exception)):
            raise TakenOverError(self._lost) from error

    def check(self) -> None:
        """Raise TakenOverError, which says by whom and when, where another process has taken the folder."""
        if not self._look():
            raise TakenOverError(self._lost)

    def _is_newest(self) -> bool:
        if not self._lost and (newest := newest_number(self.folder)) > self.number:
            driver = _driver_of(record_path(self.folder, newest))
            who = f"{driver} at {driver.since}" if driver else "unknown"
            self._lost = (
                f"{self.folder} was taken over by process {who}, since this process had given no sign of life for "
                f"{self._seconds:g} s. It goes on there, and nothing of what this process does counts any more"
            )
            self.stop.set()
        return not self._lost

    def _text(self, renewals: int, *, released: bool = False) -> bytes:
        renewal = _Renewal(renewals=renewals, released=True) if released else _Renewal(renewals=renewals)
        return json.dumps(renewal.model_dump(exclude_unset=True)).encode()


def _numbered(kind: str, number: int) -> str:
    return f"{kind}.json" if number == 1 else f"{kind}-{number:04d}.json"


def _lease_path(folder: str, number: int) -> str:
    return storage.join(folder, _numbered("lease", number))


def _read(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return b""


def _is_released(renewal: bytes) -> bool:
    try:
        return _Renewal.model_validate_json(renewal).released
    except ValueError:
        return False


def _driver_of(path: str) -> DriverProcess | None:
    """The driver that a record names, where it can be read."""
    try:
        return DriverProcess.model_validate(json.loads(storage.read_bytes(path))["driver"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _same_machine(one: DriverProcess, other: DriverProcess) -> bool:
    """Whether the number of one process means something where the other runs; earlier versions name the host alone."""
    return one.machine == other.machine if one.machine else one.host == other.host


def _machine() -> str:
    """The running kernel and, of its namespaces of processes, ours: two containers may have one host name, and a host
    may get another. Empty where there is no Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


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
