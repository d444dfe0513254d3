"""Storage that fails for a moment: how that is told from a file that cannot be read, and how long it is tried again.

Drivers of remote storage raise kinds of their own (botocore's and aiohttp's errors are no OSError), and one kind for a
file that is forbidden and for a token that has expired. Here is the one place that tells them apart.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

log = logging.getLogger(__name__)

# How long a call is made again after it failed first, unless `retry_for` says otherwise; and the pauses between tries.
RETRY_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0

# What a later try would meet again: it is about this file, or about this disk, and not about the way to it.
_ABOUT_THE_FILE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FINAL_NUMBERS = {errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP,
                  errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # fmt: skip
# A write that finds the disk full does not say which.
_FULL = {errno.ENOSPC, errno.EDQUOT}
# S3's words for "who are you?", which drivers give out as "you may not": new credentials may be on their way.
_ABOUT_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken",
                      "InvalidAccessKeyId", "InvalidSecurity", "SignatureDoesNotMatch",
                      "RequestTimeTooSkewed"}  # fmt: skip
# What Python raises where a call was wrong; drivers derive theirs from these where an argument was.
_MISTAKES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, NameError, ImportError,
             AssertionError, RuntimeError, EOFError, MemoryError)  # fmt: skip

_retry_seconds: ContextVar[float] = ContextVar("retry_seconds", default=RETRY_SECONDS)

Answer = TypeVar("Answer")


class UnreachableError(OSError):
    """Storage cannot be reached now. It says nothing about whether a file is there, or whether it is whole."""


@contextmanager
def retry_for(seconds: float) -> Iterator[None]:
    """Within this context, calls of this thread to storage are made again for so long; with 0 they are made once.

    For callers who try again by themselves, or who must not wait.
    """
    token = _retry_seconds.set(seconds)
    try:
        yield
    finally:
        _retry_seconds.reset(token)


def is_outage(error: BaseException) -> bool:
    """Whether storage, or the way to it, failed: the same call may succeed later. False if it is about the file."""
    if isinstance(error, PermissionError):
        return _s3_code(error) in _ABOUT_CREDENTIALS
    if isinstance(error, OSError):
        return not isinstance(error, _ABOUT_THE_FILE) and error.errno not in _FINAL_NUMBERS
    return isinstance(error, Exception) and not isinstance(error, _MISTAKES)


def is_unexplained(error: BaseException) -> bool:
    """Whether S3 refused a HEAD, whose answer has no room for a reason: the file may be forbidden, or the key wrong."""
    return _s3_code(error) in ("400", "403")


def is_empty_file(error: BaseException) -> bool:
    """Whether S3 refused to give bytes of a file from its start on, since it has none."""
    return _s3_code(error) in ("InvalidRange", "416")


def _s3_code(error: BaseException) -> str:
    """The code in S3's own answer, which drivers keep as the cause of their error; empty where there is none."""
    answer = getattr(error.__cause__, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def retry(call: Callable[[], Answer], done: str, path: str) -> Answer:
    """The result of ``call``, made again while storage fails: for `RETRY_SECONDS` from its first failure on.

    Parameters
    ----------
    done
        What is done to the file, for messages: "read", "written", "listed".
    path
        Of the file or folder.

    Raises
    ------
    UnreachableError
        Storage still fails; the file, this host and the reason are named. The driver's own error is its cause.
    OSError
        It is about the file: it is missing, forbidden, a folder. The file is named.
    """
    failed_at, tries, pause = 0.0, 0, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            if not is_outage(error):
                raise _with_name(error, path) from error.__cause__
            tries += 1
            failed_at = failed_at or time.monotonic()
            left = failed_at + _retry_seconds.get() - time.monotonic()
            text = f"{path} cannot be {done} from {socket.gethostname()}: {_reason(error)}"
            if left <= 0:
                waited = f" ({tries} tries in {time.monotonic() - failed_at:.0f} s)" if tries > 1 else ""
                raise UnreachableError(f"{text}{waited}") from error
            if tries == 1:
                log.warning("%s; trying again for up to %g s", text, _retry_seconds.get())
        # No draw from the global generator, which a training's bits hang on.
        time.sleep(min(left, pause * random.SystemRandom().uniform(0.5, 1.5)))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _reason(error: Exception) -> str:
    """A driver's error in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _with_name(error: Exception, path: str) -> Exception:
    """The same error naming its file, which drivers leave out."""
    if type(error) is FileNotFoundError and error.filename is None:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if type(error) is PermissionError and error.filename is None:
        return PermissionError(errno.EACCES, str(error), path)
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
        return OSError(error.errno, f"{os.strerror(error.errno)} on {socket.gethostname()}", path)
    return error
