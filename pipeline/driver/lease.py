"""One driver at a time in a folder: its sign of life, and the number that all it writes carries.

A driver takes the folder of a record by creating the file of the next number (``record.json``, ``record-0002.json``,
...): of several that try at once, one does. It writes under its own number alone, and the highest number counts. So a
driver that was believed dead may come back at any moment, also between a look and a write: what it then writes is not
read. While a driver lives, a thread renews its lease, a small file of the same number. No clocks of two hosts are
compared: a driver elsewhere has lost its lease when that file has not changed for `LEASE_SECONDS` by the clock of the
process that looks. On the same machine a process can be asked for, and nobody waits.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import Field

from pipeline import storage
from pipeline.config.frozen import FrozenModel

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
# A lease is renewed so often within its time, and looked at so often by who waits for its end.
_RENEWALS, _LOOKS = 3, 15
# How long the end of a command waits for a renewal that is under way.
_LAST_RENEWAL_SECONDS = 5.0

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
    found = (re.fullmatch(r"record(?:-(\d{4,}))?\.json", name) for name in storage.names(folder))
    return max((int(match[1] or 1) for match in found if match), default=0)


def this_process() -> DriverProcess:
    pid = os.getpid()
    since = datetime.now(UTC).isoformat(timespec="milliseconds")
    return DriverProcess(host=socket.gethostname(), pid=pid, started=_started(pid), machine=_machine(), since=since)


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
    if driver is not None and _same_machine(driver, me):
        if (driver.pid, driver.started) == (me.pid, me.started):
            return path not in _held
        return _started(driver.pid) != driver.started
    who = driver or "unknown"
    log.warning("%s was begun by process %s: waiting up to %g s for a sign of its life", folder, who, seconds)
    looked_at = time.monotonic()
    while time.monotonic() - looked_at < seconds:
        time.sleep(seconds / _LOOKS)
        if (now := _read(path)) != renewal:
            return _is_released(now)
    return True


class Lease:
    """The right to write in a folder, renewed by a thread while its ``with`` block runs, and given back at its end.

    Parameters
    ----------
    folder : that this process has taken
    number : that it has taken it with; all it writes carries it
    seconds : after which others may take it, if it is not renewed
    stop : set when another process has taken the folder

    Raises
    ------
    TakenOverError
        At the end of the block, whatever error ended it: another process has taken the folder meanwhile.
    """

    def __init__(self, folder: str, number: int, *, seconds: float, stop: threading.Event | None = None):
        self.folder, self.number = folder, number
        self.stop = stop or threading.Event()
        self._path, self._seconds = _lease_path(folder, number), seconds
        self._lost = ""  # by whom and when, once it is
        self._seen_at = self._renewed_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="sparknorm-lease", daemon=True)
        _held.add(self._path)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        self._thread.join(_LAST_RENEWAL_SECONDS)
        _held.discard(self._path)
        with suppress(Exception):  # storage that fails does not hide what ended the block
            if self._newest_is_mine():
                self._write(_Renewal(renewals=-1, released=True))
        if self._lost and (error is None or isinstance(error, Exception)):
            raise TakenOverError(self._lost) from error

    def check(self) -> None:
        """Raise TakenOverError, which says by whom and when, where another process has taken the folder."""
        if not self._newest_is_mine():
            raise TakenOverError(self._lost)

    def holds(self, *, lately: bool = False) -> bool:
        """Whether nobody else has taken the folder; with ``lately`` whether that was seen within half the lease's time.

        Where storage does not answer, a lease that was renewed within its time is held: nobody may have taken it. After
        that time the error of the storage is raised, since nobody knows.
        """
        if lately and not self._lost and time.monotonic() - self._seen_at < self._seconds / 2:
            return True
        try:
            return self._newest_is_mine()
        except Exception:  # drivers of storage raise kinds of their own
            if time.monotonic() - self._renewed_at < self._seconds:
                return True
            raise

    def _newest_is_mine(self) -> bool:
        looked_at = time.monotonic()
        if not self._lost and (newest := newest_number(self.folder)) > self.number:
            driver = _driver_of(record_path(self.folder, newest))
            who = f"{driver} at {driver.since}" if driver else "unknown"
            self._lost = (
                f"{self.folder} was taken over by process {who}, since this process had given no sign of life for "
                f"{self._seconds:g} s. It goes on there, and nothing of what this process does counts any more"
            )
            self.stop.set()
        self._seen_at = looked_at
        return not self._lost

    def _keep(self) -> None:
        renewals, warned = 0, False
        while not self._lost:
            try:
                began_at = time.monotonic()
                self._write(_Renewal(renewals=renewals))
                self._renewed_at = began_at
                renewals, warned = renewals + 1, False
            except Exception as error:  # noqa: BLE001 - drivers of storage raise kinds of their own; the next may succeed
                if not warned:
                    log.warning("the lease of %s could not be renewed: %s", self.folder, error)
                warned = True
            if self._ended.wait(self._seconds / _RENEWALS):
                return
            with suppress(Exception):  # looked again next time
                self._newest_is_mine()

    def _write(self, renewal: _Renewal) -> None:
        storage.publish(self._path, json.dumps(renewal.model_dump(exclude_unset=True)).encode(), durable=False)


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
