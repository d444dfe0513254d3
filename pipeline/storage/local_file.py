"""Files on a local disk that are there with all their bytes or not at all, also after the machine dies."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What disks that are mounted from elsewhere (FUSE) say where a folder is synced.
_FOLDERS_CANNOT_BE_SYNCED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
# A file under a passing name that has not grown for so long has been left by a process that was killed: no clocks are
# that far apart, and no write to a disk stands still for so long and goes on.
_ABANDONED_SECONDS = 3600.0


def create(target: Path, data: bytes) -> bool:
    """Whether this call made the file: see `storage.create`."""
    with under_passing_name(target, data, durable=True) as temporary:
        try:
            os.link(temporary, target)
        except FileExistsError:
            # A network disk may answer so to its own second try, and the link is there.
            return temporary.stat().st_nlink == 2
        except OSError:  # a disk without hard links
            return _rename_once(temporary, target)
    return True


def _rename_once(temporary: Path, target: Path) -> bool:
    """Rename a file where none has the new name: an empty one, opened exclusively, keeps the place until then."""
    try:
        target.open("xb").close()
    except FileExistsError:
        return False
    try:
        temporary.replace(target)
    except BaseException:
        target.unlink()
        raise
    return True


@contextmanager
def under_passing_name(target: Path, data: bytes, *, durable: bool) -> Iterator[Path]:
    """The data in a file beside ``target`` under a passing name, to be renamed or linked within this context.

    ``durable``: bytes are on the disk before, and the names, also of new folders, after.
    """
    there_before = next(folder for folder in target.parents if folder.exists())
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        for folder in target.parents:
            _sync_folder(folder)
            if folder == there_before:
                break


def remove_abandoned(folder: Path, name: re.Pattern[str]) -> None:
    """Delete what processes that were killed have left in a folder of files that they wrote under passing names.

    Parameters
    ----------
    name : what the files were to be called; others stay
    """
    for path in folder.glob(".*"):
        begun = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}", path.name)
        if begun and name.fullmatch(begun[1]) and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: syncing a file keeps its bytes, not the name that it was given."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_CANNOT_BE_SYNCED:
            raise
    finally:
        os.close(descriptor)
