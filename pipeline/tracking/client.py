"""MLflow's client: imported here first, with what has to be set for it, and how its store is opened and waited for."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow

from pipeline.config.secrets import mask, mask_logs
from pipeline.storage.writable import check_writable
from pipeline.tracking.outage import Answer, reason, retry_during_outage

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow looks for git; a machine without it is fine
for _name, _level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("mlflow.system_metrics", 100)):
    logging.getLogger(_name).setLevel(_level)
mask_logs("mlflow", "alembic")  # they write through handlers of their own
# A traceback for each call to a database that is down; we get the error itself, and say it once.
logging.getLogger("mlflow.store.db.utils").setLevel(100)
# MLflow's own tables ask SQLAlchemy for it, whatever one does with them.
warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning, module=r"mlflow\.")
# It writes a line for each new try of each call; we say once that the server is down.
logging.getLogger("urllib3.connectionpool").addFilter(lambda record: "/mlflow/" not in record.getMessage())

# MLflow's client tries a call to a dead server 8 times, two minutes each, before it says so. Here a call ends after 2
# tries of 6 s: what is urgent fails soon, and what can wait is offered again from this side, where a person is told
# about it. Values that the user has set stay.
TIMEOUT, CALL_SECONDS, UPLOAD_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", "6", "120"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# MLflow makes the tables of a new database in some seconds.
TABLES_SECONDS = 120.0
os.environ.setdefault(TIMEOUT, CALL_SECONDS)
os.environ.setdefault(_RETRIES, "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for a result's path

_uploads: list[int] = []  # the threads that do it now
_uploads_lock = threading.Lock()


def open_database(uri: str, setting: str = "tracking.uri") -> None:
    """Make the folder of a SQLite store, and open a store that is a database once: MLflow itself tries for minutes.

    Parameters
    ----------
    setting : that names the store, for messages

    Raises
    ------
    NotWritableError
        It is in a folder of this machine that cannot be written.
    OSError
        It cannot be opened.
    """
    path = _database_file(uri)
    if folder := path.parent if path else local_path(uri):
        check_writable(setting, str(folder))
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA user_version")
        elif uri.startswith(("postgresql", "mysql", "mssql")):
            import sqlalchemy

            sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
    except Exception as error:  # each driver raises kinds of its own, or is not installed
        raise OSError(reason(error)) from error


def _database_file(uri: str) -> Path | None:
    """The file of a SQLite store, without the options that may follow it (``?timeout=60``); None of any other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def local_path(uri: str) -> Path | None:
    """The folder of this machine that a URI of MLflow means, a path or a ``file:`` URI; None where it means none."""
    parts = urlsplit(uri)
    is_local = parts.scheme == "file" or (parts.scheme == "" and not uri.startswith("databricks"))
    return Path(unquote(parts.path)) if is_local and parts.path else None


@contextmanager
def alone_in_store(uri: str) -> Iterator[None]:
    """Let one process of this host at a time be at the tables of a SQLite store while the block runs, which a new store
    has by then: of two that open a new store at once, MLflow ends one with an error of its migrations.

    Raises
    ------
    OSError
        Another process takes longer than `TABLES_SECONDS`.
    """
    database = _database_file(uri)
    if database is None:  # a server makes the tables of its own store
        yield
        return
    import fcntl

    with database.with_name(f".{database.name}.lock").open("w") as lock:
        give_up_at = time.monotonic() + TABLES_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise OSError(f"another process has held {lock.name} for {TABLES_SECONDS:g} s") from None
            time.sleep(0.1)
        _make_tables(database)
        yield


def _make_tables(database: Path) -> None:
    """Make a new store under another name, and put it in its place with all its tables: MLflow refuses one whose maker
    was killed between two of its migrations."""
    if database.exists() and database.stat().st_size:
        return
    made = database.with_name(f".{database.name}.new")
    for left in (made, made.with_name(f"{made.name}-journal")):  # by one that was killed
        left.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
    made.replace(database)


def leave_active_run() -> None:
    """Leave the active run as it is, for another process that goes on with it: MLflow itself would mark it as finished,
    at the latest when this process exits."""
    from mlflow.tracking import fluent

    if mlflow.active_run() is not None:
        fluent._active_run_stack.get().pop()


def store_name() -> str:
    """The tracking URI in use; a password that it may contain is masked."""
    return mask(mlflow.get_tracking_uri())


def runs_are_shown(uri: str) -> str:
    """Where a person sees the runs of a store, as the end of "runs: ": the address of a server, which has MLflow's UI
    itself, or else the command that starts the UI on the store. A password is masked."""
    if uri.startswith(("http://", "https://", "databricks")):
        return f"in MLflow at {mask(uri)}"
    mlflow_command = "mlflow" if shutil.which("mlflow") else f"{shlex.quote(sys.executable)} -m mlflow"
    return f"`{mlflow_command} ui --backend-store-uri {shlex.quote(mask(uri))}` shows them in MLflow"


def call_store(what: str, call: Callable[[], Answer], outage_seconds: float) -> Answer:
    """`retry_during_outage`, with the name of the store in its messages."""
    return retry_during_outage(f"{what} at {store_name()}", call, outage_seconds)


def longest_call_seconds() -> float:
    """The time after which a call to the store that has not ended hangs: its tries, and the pauses between them."""
    return (1 + int(os.environ[_RETRIES])) * float(os.environ[TIMEOUT]) + 8.0


@contextmanager
def time_to_upload() -> Iterator[None]:
    """Give calls within the block the time that an upload takes: the server answers when it has stored it.

    MLflow reads that time from the environment of the process: with uploads in several threads, the last one to end
    sets it back.
    """
    with _uploads_lock:
        is_ours = bool(_uploads) or os.environ.get(TIMEOUT) == CALL_SECONDS  # else it is the user's own value
        if is_ours:
            _uploads.append(threading.get_ident())
            os.environ[TIMEOUT] = UPLOAD_SECONDS
    try:
        yield
    finally:
        with _uploads_lock:
            if is_ours:
                _uploads.remove(threading.get_ident())
                if not _uploads:
                    os.environ[TIMEOUT] = CALL_SECONDS
