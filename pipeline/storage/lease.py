"""The right of one process to write in a folder, and the sign of life that keeps it.

Whoever wants a folder creates the file of the next number there (`storage.create`): of several that try at once, one
does, and the highest number counts. While a process lives, a thread of it writes a small file again and again. No
clocks of two hosts are compared: a lease has ended for who has seen, by its own clock, that this file has not changed
for the seconds that it lasts. A process that was believed dead and comes back looks for a higher number, and finds it.
What the files are called and what they hold is up to who uses this (`ingest.claim`, `driver.lease`).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pipeline import storage

log = logging.getLogger(__name__)
T = TypeVar("T")

# How long the end of a process waits for a renewal that is under way.
_LAST_RENEWAL_SECONDS = 5.0


class Lease(ABC):
    """The right to write in a folder, renewed by a thread from `begin` to `end`.

    Parameters
    ----------
    folder : absolute path or URL
    number : that this process has taken it with
    path : of the file that is written again and again
    seconds : after which others may take the folder, if the lease is not renewed
    renewals : how often it is renewed within that time; that the folder was taken is the first sign of life
    """

    def __init__(self, folder: str, number: int, path: str, *, seconds: float, renewals: int):
        self.folder, self.number = folder, number
        self._path, self._seconds, self._pause = path, seconds, seconds / renewals
        self._renewals, self._warned = 1, False
        self._seen_at = self._renewed_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="sparknorm-lease", daemon=True)

    @abstractmethod
    def _text(self, renewals: int, *, released: bool = False) -> bytes:
        """What the file says after so many renewals, or at the end."""

    @abstractmethod
    def _is_newest(self) -> bool:
        """Ask storage whether nobody has taken the folder since; what storage raises is passed on."""

    def begin(self) -> None:
        """Renew the lease from now on."""
        self._thread.start()

    def end(self, *, release: bool = True) -> None:
        """Renew it no more and, with ``release``, let others have the folder at once. Storage that fails is no error:
        the lease ends by itself.
        """
        self._ended.set()
        self._thread.join(_LAST_RENEWAL_SECONDS)
        if not release:
            return
        with suppress(Exception):  # drivers of storage raise kinds of their own
            if self._is_newest():
                self._write(-1, released=True)

    def holds(self, *, lately: bool = False) -> bool:
        """Whether nobody else has taken the folder; with ``lately`` whether that was seen within half the lease's time.

        Where storage does not answer, a lease that was renewed within its time is held: nobody may have taken it. After
        that time the error of the storage is raised, since nobody knows.
        """
        if lately and time.monotonic() - self._seen_at < self._seconds / 2:
            return True
        try:
            return self._look()
        except Exception:  # drivers of storage raise kinds of their own
            if time.monotonic() - self._renewed_at < self._seconds:
                return True
            raise

    def _look(self) -> bool:
        looked_at = time.monotonic()
        is_newest = self._is_newest()
        self._seen_at = looked_at if is_newest else float("-inf")
        return is_newest

    def _keep(self) -> None:
        while not self._ended.wait(self._pause):
            with suppress(Exception):  # looked again next time; meanwhile it is renewed
                if not self._look():
                    log.warning("another process has taken %s over", self.folder)
                    return
            self._renew()

    def _renew(self) -> None:
        try:
            began_at = time.monotonic()
            self._write(self._renewals)
            self._renewed_at, self._renewals, self._warned = began_at, self._renewals + 1, False
        except Exception as error:  # noqa: BLE001 - drivers of storage raise kinds of their own; the next may succeed
            if not self._warned:
                log.warning("the lease of %s could not be renewed: %s", self.folder, error)
            self._warned = True

    def _write(self, renewals: int, *, released: bool = False) -> None:
        storage.publish(self._path, self._text(renewals, released=released), durable=False)


def numbers(folder: str, name: re.Pattern[str]) -> list[int]:
    """The numbers in the names of a folder's files that fit ``name`` whole, whose first group is a number or missing.

    A name without one has the number 1.
    """
    found = (name.fullmatch(each) for each in storage.names(folder))
    return [int(match[1] or 1) for match in found if match]


def wait_for_change(read: Callable[[], T], first: T, *, seconds: float, looks: int) -> T:
    """Wait until a file says something else than at first, at most so many seconds by this process's clock.

    Parameters
    ----------
    read : gives what the file says now; called ``looks`` times in all

    Returns
    -------
    What it says then; ``first`` where it has not changed: the lease has ended.
    """
    looked_at = time.monotonic()
    while time.monotonic() - looked_at < seconds:
        time.sleep(seconds / looks)
        if (now := read()) != first:
            return now
    return first
