"""Find Java, or say in one line how to get it; start it without its warning about a module that Spark asks for.

Standard library only: `make setup` runs this file before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

MINIMUM = 17
# How long `java -version` may take, on a machine that is busy.
_ANSWER_SECONDS = 60.0
ADVICE = (
    "install it (Debian, Ubuntu: `apt-get install openjdk-17-jre-headless`; Fedora: `dnf install java-17-openjdk`; "
    "macOS: `brew install openjdk@17`) or point JAVA_HOME at it"
)

# Spark 4's launcher adds this module to every JVM it starts, and Java has no option that leaves the warning out.
_INCUBATOR_WARNING = b"WARNING: Using incubator modules: jdk.incubator.vector"


class JavaError(RuntimeError):
    """Java is missing or too old."""


def require_java() -> str:
    """The path of a Java that Spark can use.

    Raises
    ------
    JavaError
        There is none, it is older than 17, or it does not run.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "there is no `java` on the PATH"
        raise JavaError(f"Spark needs Java {MINIMUM} or newer, but {where}: {ADVICE}")
    try:
        report = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"does not say within {_ANSWER_SECONDS:g} s which version it is"
        raise JavaError(f"Spark needs Java {MINIMUM} or newer, but {java} {why}: {ADVICE}") from None
    except OSError as error:
        raise JavaError(f"Spark needs Java {MINIMUM} or newer, but {java} does not run ({error}): {ADVICE}") from None
    found = re.search(r'version "(?:1\.)?(\d+)', report.stderr + report.stdout)
    if found is None or int(found[1]) < MINIMUM:
        version = f"version {found[1]}" if found else "of an unknown version"
        raise JavaError(f"Spark needs Java {MINIMUM} or newer, but {java} is {version}: {ADVICE}")
    return java


class JavaErrors:
    """The write end of a pipe, to be a child's standard error (see `without_incubator_warning`)."""

    def __init__(self, shown: Callable[[str], str]):
        self._shown = shown
        self._held: list[str] | None = []  # None once lines are written as they come
        self._lock = threading.Lock()
        reading, self._writing = os.pipe()
        self._thread = threading.Thread(
            target=self._forward, args=(reading,), name="sparknorm-java-stderr", daemon=True
        )
        self._thread.start()

    def fileno(self) -> int:
        """The file descriptor, for `subprocess`."""
        return self._writing

    def close(self) -> None:
        """Leave the pipe to the child."""
        os.close(self._writing)

    def release(self) -> None:
        """Write what the child has written so far, and from now on each line as it comes."""
        with self._lock:
            held, self._held = self._held or [], None
            for line in held:
                _write(line)

    def held_lines(self) -> list[str]:
        """What a child that has ended wrote, where it was not released."""
        self._thread.join(timeout=5)
        with self._lock:
            return [line.rstrip() for line in self._held or []]

    def _forward(self, reading: int) -> None:
        """Read until the pipe's last writer has closed it."""
        with open(reading, "rb") as lines:
            for line in lines:
                if line.rstrip() == _INCUBATOR_WARNING:
                    continue
                text = self._shown(line.decode(errors="surrogateescape"))
                with self._lock:
                    if self._held is None:
                        _write(text)
                    else:
                        self._held.append(text)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal: go on reading, or the JVM would block
        os.write(2, text.encode(errors="surrogateescape"))


@contextlib.contextmanager
def without_incubator_warning(shown: Callable[[str], str] = str) -> Iterator[JavaErrors]:
    """Give what is to be a child's standard error: all that the child writes there appears on this process's standard
    error but that one warning. The child must be started within the block, and where that fails nothing appears.

    Parameters
    ----------
    shown : makes of each line what appears of it
    """
    errors = JavaErrors(shown)
    try:
        yield errors
        errors.release()
    finally:
        errors.close()


if __name__ == "__main__":
    try:
        require_java()
    except JavaError as problem:
        sys.exit(str(problem))
