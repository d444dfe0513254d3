"""One job at a time writes to a dataset: its claim, and the sign of life that keeps it.

A job claims a dataset by creating the file of the next number, ``claim-0001.json``, ``claim-0002.json``, ...: of
several that try at once, one does. The highest number counts, and none is used twice: the last claim stays, marked as
released. While a job lives, its file is written again every few seconds (`storage.lease`). A job that died leaves a
claim that does not change any more: who has seen that for `LEASE_SECONDS` takes the next number. A job that was
believed dead and comes back looks for a higher number before it publishes or deletes anything, and should it look a
moment too early, of two jobs that publish a version still only one does (`versions.publish`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.data.manifest import DatasetError
from pipeline.storage.lease import Lease, numbers, wait_for_change
from pipeline.storage.writable import check_writable

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
# A claim is renewed so often within its time, and looked at so often by who waits for a sign of life.
_RENEWALS, _LOOKS = 6, 30
# How often a job tries to be the next one, before it says that others always are.
_TURNS = 20
# How often, and after how long, a missing file is looked for again: where it is replaced by being deleted and written
# anew, as on HDFS, it is not there for a moment.
_READS, _MISSING_SECONDS = 5, 0.1
_NAME = re.compile(r"claim-(\d{4,})\.json")


class ClaimContent(FrozenModel):
    """What the file of a claim holds.

    token : unlike that of any other claim
    host, pid : of the process that drives the job
    application : Spark's id of it
    since : when it began, in UTC, by the clock of its host
    renewals : how often the claim was renewed
    released : whether the job has ended and said so
    """

    token: str
    host: str
    pid: int
    application: str
    since: str
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} (Spark application {self.application})"


class Claim(Lease):
    """The right of this process to write to a dataset, which others may have taken over (see `claimed`)."""

    def __init__(self, dataset: str, number: int, content: ClaimContent):
        path = _path(dataset, number)
        super().__init__(dataset, number, path, seconds=LEASE_SECONDS, renewals=_RENEWALS)
        self._content = content
        self.begin()

    def check(self) -> None:
        """Raise DatasetError where another job has taken the dataset over."""
        if not self._is_newest():
            raise DatasetError(
                f"{self.folder} was taken over by {_read(self.folder, _newest(self.folder)) or 'another job'}, "
                f"since this job had shown no sign of life for {LEASE_SECONDS:g} s: nothing of it was published; "
                "run it again when the other has ended"
            )

    def release(self) -> None:
        """Let others write, and delete the claims of jobs that died before."""
        self.end()
        if self._is_newest():
            for number in _numbers(self.folder):
                if number < self.number:
                    storage.remove(_path(self.folder, number))

    def _is_newest(self) -> bool:
        """Also where two were told that they had created the file, as HDFS may: it has the token of one of them."""
        content = _read(self.folder, self.number)
        mine = content is not None and content.token == self._content.token
        return mine and _newest(self.folder) <= self.number  # this file itself may not be there for a moment

    def _text(self, renewals: int, *, released: bool = False) -> bytes:
        return _text(self._content.model_copy(update={"released": True} if released else {"renewals": renewals}))


@contextmanager
def claimed(dataset: str, application: str, *, setting: str = "dataset.path") -> Iterator[Claim]:
    """Have a dataset, or another folder that jobs write to, for this job alone while the context lasts.

    Parameters
    ----------
    dataset : absolute path or URL
    application : Spark's id of the job, for the messages of others
    setting : that names the folder, for messages

    Raises
    ------
    NotWritableError
        The folder cannot be written.
    DatasetError
        Another job is writing to it, or others came first again and again; the message says which. Where a job has
        died, it takes `LEASE_SECONDS` to see.
    """
    check_writable(setting, dataset)
    claim = _take(dataset, application, setting)
    try:
        yield claim
    finally:
        with suppress(Exception):  # storage that fails does not hide what ended the job; the claim ends by itself
            claim.release()


def _take(dataset: str, application: str, setting: str) -> Claim:
    content = ClaimContent(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        application=application,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    for _ in range(_TURNS):  # one turn more for each job that got the dataset first and has ended since
        number = _newest(dataset)
        if number:
            _wait_for_end(dataset, number, setting)
        if storage.create(_path(dataset, number + 1), _text(content)):
            return Claim(dataset, number + 1, content)
        time.sleep(LEASE_SECONDS / _LOOKS)
    raise DatasetError(
        f"{dataset} was claimed by other jobs {_TURNS} times while this one waited for it, the last time by "
        f"{_read(dataset, _newest(dataset)) or 'another job'}: run this again when they have ended"
    )


def _wait_for_end(dataset: str, number: int, setting: str) -> None:
    """Return when a claim is released or has not changed for `LEASE_SECONDS`, or raise DatasetError: it is renewed."""
    first = _read(dataset, number)
    if first and first.released:
        return
    now = wait_for_change(lambda: _read(dataset, number), first, seconds=LEASE_SECONDS, looks=_LOOKS)
    if now == first:
        log.warning("%s was claimed by %s, which shows no sign of life: taken over", dataset, now or "another job")
    elif now and not now.released:
        raise DatasetError(
            f"{dataset} is being written by {now}: run this again when that has ended, or choose another {setting}"
        )
    # Otherwise it was released, or deleted by a job that took the next number.


def _newest(dataset: str) -> int:
    """The highest number of a claim; 0 where there is none."""
    return max(_numbers(dataset), default=0)


def _numbers(dataset: str) -> list[int]:
    return numbers(dataset, _NAME)


def _path(dataset: str, number: int) -> str:
    return storage.join(dataset, f"claim-{number:04d}.json")


def _text(content: ClaimContent) -> bytes:
    return json.dumps(content.model_dump(mode="json")).encode()


def _read(dataset: str, number: int) -> ClaimContent | None:
    """What a claim says; None where it is gone, or not whole yet."""
    for read in range(_READS):
        try:
            return ClaimContent.model_validate_json(storage.read_bytes(_path(dataset, number)))
        except FileNotFoundError:
            if read + 1 < _READS:
                time.sleep(_MISSING_SECONDS)
        except ValueError:
            break
    return None
