"""What a command has begun, kept where it trains, so that the same command goes on where a killed one stopped.

A record is a small JSON file for each driver that was at work, of which the newest counts (see `lease`): which process
trains, which MLflow run belongs to it, and the result once there is one. What a record of another version has finished
may lack what this one tells: such a result is not read, and trained anew.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from pipeline import storage
from pipeline.cluster.stop import Stop
from pipeline.config.frozen import FrozenModel
from pipeline.config.secrets import masked
from pipeline.config.settings import digest_of
from pipeline.driver.lease import (
    LEASE_SECONDS,
    BusyError,
    DriverProcess,
    Lease,
    is_free,
    newest_number,
    record_path,
    this_process,
)
from pipeline.report.comparison import TrialResult

# Where a file is replaced by a delete and a rename (HDFS), one that was listed may be missing for a moment.
_READS, _MISSING_SECONDS = 10, 0.2
# Of a name in the name of a folder, which may have 255 bytes. Earlier versions took so many letters of any length.
_NAME_BYTES, _NAME_LETTERS, _LONGEST_NAME = 150, 80, 255

log = logging.getLogger(__name__)


class RecordContent(FrozenModel):
    """What a record holds. A key is absent until the training has come that far.

    driver : the process that trains
    name : of the training or the study
    run_mark : tag of its MLflow run, written down before the run is opened: by it the run is found while no id is known
    run_id : of its MLflow run
    model : whether the trained network is in MLflow
    cycles : results at the ends of the schedule's cycles, of a training that stops there
    result : of a training; for a study the path of its result. The predictions of a training are named without folder
    """

    driver: DriverProcess | None = None
    name: str | None = None
    run_mark: str | None = None
    run_id: str | None = None
    model: bool = False
    cycles: tuple[TrialResult, ...] = ()
    result: TrialResult | str | None = None


class Record:
    """The record in a folder. Its `content` is empty where the folder has none, or a damaged one.

    Raises
    ------
    UnreachableError
        Storage fails, so that nobody knows whether there is one.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._lease: Lease | None = None
        self._number, self.content = _read_newest(folder)

    @property
    def finished(self) -> bool:
        return self.content.result is not None

    def result(self, cycle: int | None = None) -> TrialResult | None:
        """What a training has returned at its end or, where it has come no further, at the end of a cycle; or None."""
        if isinstance(self.content.result, TrialResult):
            return self._with_files_here(self.content.result)
        if cycle is None or cycle > len(self.content.cycles):
            return None
        return self._with_files_here(self.content.cycles[cycle - 1])

    def add_result(self, result: TrialResult, cycle: int | None = None) -> None:
        """Write down what a training has returned at its end, or at the end of the cycle that comes next."""
        if result.predictions is not None:
            result = result.model_copy(update={"predictions": _file_name(result.predictions)})
        if cycle is None:
            self.update(result=result)
        else:
            self.update(cycles=(*self.content.cycles, result))

    def _with_files_here(self, result: TrialResult) -> TrialResult:
        """The result with the whole path of its predictions; earlier versions wrote that, which may hold a password."""
        if result.predictions is None:
            return result
        return result.model_copy(update={"predictions": storage.join(self.folder, _file_name(result.predictions))})

    def claim(
        self,
        name: str,
        *,
        stop: Stop | None = None,
        process: DriverProcess | None = None,
        seconds: float | None = None,
    ) -> Lease:
        """Write down that this process trains it, under this name. The lease is to be entered by ``with``.

        Parameters
        ----------
        stop : set when another process takes it over, as one on another host may that saw no sign of life
        process : the one that claims, if it is not this one
        seconds : after which a lease that is not renewed has ended; None is `LEASE_SECONDS`

        Raises
        ------
        BusyError
            Another process, here or on another host, is training there now, or has just ended its training.
        """
        me, seconds = process or this_process(), seconds or LEASE_SECONDS
        if not self.finished:
            self._require_free(me, seconds)
        claimed = self.content.model_copy(update={"driver": me, "name": name, "run_mark": self._run_mark()})
        if not storage.create(record_path(self.folder, self._number + 1), _to_json(claimed)):
            self._number, self.content = _read_newest(self.folder)
            raise self._busy()
        self.content, self._number = claimed, self._number + 1
        self._lease = Lease(self.folder, self._number, seconds=seconds, stop=stop)
        return self._lease

    def _require_free(self, me: DriverProcess, seconds: float) -> None:
        """Raise BusyError unless the driver that this record knows of is gone, and take up what it wrote last."""
        known = self._number
        is_gone = known == 0 or is_free(self.folder, known, self.content.driver, me, seconds)
        self._number, self.content = _read_newest(self.folder)
        if self.finished:
            who = self.content.driver or "unknown"
            raise BusyError(f"{self.folder} has just been finished by process {who}: give the command again")
        if not is_gone or self._number != known:
            raise self._busy()

    def join(self, lease: Lease, name: str) -> None:
        """Write down that this process trains it as a part of what it has the lease of: one lease holds for a whole
        study.

        Raises
        ------
        BusyError
            Another process, which has not this lease, trains it.
        TakenOverError
            The lease is lost.
        """
        lease.check()
        if self._number > lease.number:
            raise self._busy()
        self._lease, self._number = lease, lease.number
        self.update(driver=this_process(), name=name, run_mark=self._run_mark())

    def _run_mark(self) -> str:
        return self.content.run_mark or uuid.uuid4().hex

    def update(self, **fields: Any) -> None:
        """Replace fields of the content, and write it, its secrets masked.

        Raises
        ------
        TakenOverError
            Another process has taken it over.
        """
        if self._lease is not None:
            self._lease.check()
        self.content = self.content.model_copy(update=fields)
        self._number = max(self._number, 1)
        storage.publish(record_path(self.folder, self._number), _to_json(self.content))
        if self.finished and self._lease is not None and self._lease.folder == self.folder:
            self._lease.is_wanted = False

    def _busy(self) -> BusyError:
        return BusyError(
            f"{self.folder} is being trained by process {self.content.driver or 'unknown'}: "
            "wait for it, end it, or set another `output` or `name`"
        )


def _read_newest(folder: str) -> tuple[int, RecordContent]:
    """The number of the newest driver in a folder, 0 where there was none, and what it has written.

    What comes damaged may lie whole in storage: it is read once more.
    """
    number, data = _newest_bytes(folder)
    if not number:
        return 0, RecordContent()
    try:
        return number, RecordContent.model_validate_json(data)
    except ValueError:
        number, data = _newest_bytes(folder)
    try:
        return number, RecordContent.model_validate_json(data)
    except ValueError:
        path = record_path(folder, number)
        log.warning("%s is damaged, or another version has written it: what it tells is done anew", path)
        return number, RecordContent()


def _newest_bytes(folder: str) -> tuple[int, bytes]:
    for _ in range(_READS):
        number = newest_number(folder)
        try:
            return number, storage.read_bytes(record_path(folder, number)) if number else b""
        except FileNotFoundError:
            time.sleep(_MISSING_SECONDS)
    raise FileNotFoundError(f"{record_path(folder, number)} is listed, and cannot be read")


def _to_json(content: RecordContent) -> bytes:
    return json.dumps(masked(content.model_dump(mode="json", exclude_unset=True))).encode()


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _first_folder(root: str, name: str, key: str) -> str:
    """The folder of the first record; that of an earlier version, where there is one."""
    folder, earlier = (storage.join(root, f"{start}-{key}") for start in (first_bytes(name, _NAME_BYTES), name))
    could_be = folder != earlier and len(_file_name(earlier).encode()) <= _LONGEST_NAME
    return earlier if could_be and storage.exists(earlier) else folder


def first_bytes(text: str, count: int) -> str:
    """The beginning of a text that has at most so many bytes in UTF-8, whole letters alone."""
    return text.encode()[:count].decode(errors="ignore")


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
    folder = _first_folder(root, slug(name)[:_NAME_LETTERS], digest_of([name, identity]).removeprefix("sha256:")[:12])
    records = [Record(folder)]
    while records[-1].finished:
        records.append(Record(f"{folder}-{len(records) + 1}"))
    return records
