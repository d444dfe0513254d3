"""A real PostgreSQL on this machine that tests may stop and start again."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg2
from debian import need
from mlflow_server import free_port

START_SECONDS = 60.0
USER, DATABASE = "sparknorm", "postgres"


class PostgresServer:
    """A new, empty cluster in a temporary folder, always on the same port of the loopback address.

    uri : for SQLAlchemy, with a password that is made for this server
    """

    def __init__(self) -> None:
        self._programs = need("initdb", package="postgresql", below="/usr/lib/postgresql/*/bin").parent
        # The path of a Unix socket has at most 107 bytes: not below pytest's own long folders.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._as_user = _other_user(self._folder)
        self._port, self._password = free_port(), secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"postgresql+psycopg2://{USER}:{self._password}@127.0.0.1:{self._port}/{DATABASE}"
        words = ["--username", USER, "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        self._run("initdb", "--pgdata", self._data, "--pwfile", self._password_file(), *words).wait(START_SECONDS)

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def _password_file(self) -> str:
        path = self._folder / "password"
        path.write_text(self._password)
        path.chmod(0o644)  # its folder is closed to others
        return str(path)

    def _run(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as output:
            return subprocess.Popen(
                [self._programs / program, *words],
                cwd=self._folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._as_user,
            )

    def start(self) -> None:
        """Returns when it answers."""
        address = ["-h", "127.0.0.1", "-p", str(self._port), "-k", str(self._folder)]
        # What only a crash of the machine would need is off.
        self._process = self._run("postgres", "-D", self._data, *address, "-c", "fsync=off")
        give_up_at = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.stop()
                raise RuntimeError(f"no PostgreSQL: {self.log[-2000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            self.rows("SELECT 1")
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self, *, at_once: bool = False) -> None:
        """Connections are closed on the clients, with a word to them unless ``at_once``, which is as after a crash."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
            self._process.wait(timeout=60)
            self._process = None

    def remove(self) -> None:
        """Stop it and delete all it left."""
        self.stop(at_once=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of one query, through a connection of its own; ``%s`` stands for a value."""
        connection = psycopg2.connect(
            host="127.0.0.1", port=self._port, user=USER, password=self._password, dbname=DATABASE, connect_timeout=5
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute(query, values)
                return cursor.fetchall()
        finally:
            connection.close()


def _other_user(folder: Path) -> dict[str, Any]:
    """What makes a process another user's: PostgreSQL does not run as root. The folder becomes that user's."""
    if os.geteuid() != 0:
        return {}
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
